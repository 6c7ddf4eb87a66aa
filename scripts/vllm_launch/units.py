"""Bytes in binary units, as numbers and for people."""

from __future__ import annotations

MIB = 1 << 20

GIB = 1 << 30


def gib(size: int) -> str:
    """Bytes for people: "14.96 GiB"; below a tenth of one, "96 MiB"."""
    return f"{size / MIB:.0f} MiB" if 0 < abs(size) < GIB / 10 else f"{size / GIB:.2f} GiB"


def size(count: float) -> str:
    """Bytes for people, in the unit that suits: "5 MiB", "1.2 GiB"; with less precision than ``gib``."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:  # noqa: PLR2004
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
