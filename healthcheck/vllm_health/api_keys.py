"""API keys in a file, one key per line. Pure."""

from __future__ import annotations


def keys_in(text: str) -> list[str]:
    """Return the keys in a file's ``text``, without surrounding spaces. Empty lines hold no key."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def is_usable(key: str) -> bool:
    """Whether an HTTP header can carry ``key``: printable ASCII without a space (RFC 6750, 2.1)."""
    return key.isascii() and key.isprintable() and " " not in key
