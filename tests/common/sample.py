"""The part of a long comparison with vLLM that one run makes. The date chooses it, so that all parts get their turn.

JUDGE_DAY repeats the part of another day (2026-12-01). JUDGE_DAY=all takes all parts.
"""

from __future__ import annotations

import datetime as dt
import os
from collections.abc import Sequence
from typing import TypeVar

Case = TypeVar("Case")


def day() -> dt.date:
    """Return the day whose part is taken."""
    text = os.environ.get("JUDGE_DAY", "")
    return dt.datetime.now(tz=dt.UTC).date() if text in {"", "all"} else dt.date.fromisoformat(text)


def part_of(cases: Sequence[Case], parts: int) -> list[Case]:
    """Return every ``parts``-th of ``cases``, from the day's first one on, or all."""
    if os.environ.get("JUDGE_DAY") == "all":
        return list(cases)
    return list(cases[day().toordinal() % parts :: parts])
