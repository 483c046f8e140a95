"""The functions behind the command line: keyword-only roots that a configuration is bound to."""
