"""Gin files: read, checked by name and type, then built. Nothing else of the library knows gin."""
