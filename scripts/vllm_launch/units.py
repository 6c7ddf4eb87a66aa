"""Binary units of bytes, as numbers and as text."""

from __future__ import annotations

MIB = 1 << 20

GIB = 1 << 30


def gib(size: int) -> str:
    """Return ``size`` bytes as text: "14.96 GiB", or "96 MiB" below a tenth of a GiB."""
    return f"{size / MIB:.0f} MiB" if 0 < abs(size) < GIB / 10 else f"{size / GIB:.2f} GiB"


def size(count: float) -> str:
    """Return ``count`` bytes as text in a fitting unit: "5 MiB", "1.2 GiB". Less precise than ``gib``."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:  # noqa: PLR2004
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def counted(count: int, noun: str) -> str:
    """Return "1 GPU" or "2 GPUs"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
