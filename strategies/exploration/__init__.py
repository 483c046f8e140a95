"""How the branches of a group differ."""
