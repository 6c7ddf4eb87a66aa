"""Bytes in binary units, as numbers and for people."""

from __future__ import annotations

MIB = 1 << 20

GIB = 1 << 30


def gib(size: int) -> str:
    """Bytes for people: "14.96 GiB"; below a tenth of one, "96 MiB"."""
    return f"{size / MIB:.0f} MiB" if 0 < abs(size) < GIB / 10 else f"{size / GIB:.2f} GiB"
