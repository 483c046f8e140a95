"""Reward models: one model a file. A failed score is invalid, never zero."""
