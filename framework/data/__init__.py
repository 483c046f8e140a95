"""Prompts, and the embedded shapes world that everything runs on without downloads."""
