"""A reward model behind a pipe or a port: what is said, and who answers."""
