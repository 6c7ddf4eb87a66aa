"""Aligns rows of text in columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence


def columns(rows: Sequence[tuple[str, ...]], width: int) -> Iterator[str]:
    """Yield the lines of ``rows`` in aligned columns. The last column is wrapped, so that lines fit in ``width``."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]) - 1)]
    indent = 2 + sum(widths) + 2 * len(widths)
    for row in rows:
        head = "  " + "".join(f"{cell:{size}}  " for cell, size in zip(row[:-1], widths, strict=True))
        text = textwrap.wrap(row[-1], max(width - indent, 30), break_on_hyphens=False) or [""]
        yield (head + text[0]).rstrip()
        yield from (" " * indent + line for line in text[1:])
