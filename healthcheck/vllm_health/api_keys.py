"""API keys in a file: one a line. Pure."""

from __future__ import annotations


def keys_in(text: str) -> list[str]:
    """Return the keys that a file's ``text`` holds, without the spaces around them and without empty lines."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def is_usable(key: str) -> bool:
    """Whether an HTTP header can carry ``key``: printable ASCII without a space (RFC 6750, 2.1)."""
    return key.isascii() and key.isprintable() and " " not in key
