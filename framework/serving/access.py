"""Who may ask a service: addresses of this machine, and tokens."""

import ipaddress
from pathlib import Path

from framework.config.registry import one_line

SHORTEST = 16
"""Characters of a token."""


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_token(file: str) -> str:
    """The token that a file holds. Raises ValueError for one that holds none."""
    try:
        token = Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"token_file={file!r} cannot be read: {one_line(error)}") from error
    if not token.isascii() or not token.isprintable() or len(token) < SHORTEST or " " in token:
        raise ValueError(f"token_file={file!r} must hold one word of at least {SHORTEST} ASCII letters and digits")
    return token
