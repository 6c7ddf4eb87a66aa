"""One invalid value in the settings, and reading the values that rules compare."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

Engine = Mapping[str, object]
"""vLLM's options that the user set, by dest: ``Settings.engine``."""


class Mistake(NamedTuple):
    """One invalid value. ``key``: of ``Settings.origin``. ``problem``: what is wrong. ``remedy``: what to do."""

    key: str
    problem: str
    remedy: str


def number(engine: Engine, dest: str, default: int) -> int:
    """Return the whole number that the user set for ``dest``, else ``default``."""
    value = engine.get(dest)
    return value if isinstance(value, int) else default


def table(engine: Engine, dest: str) -> Mapping[str, object]:
    """Return the JSON object that the user set for ``dest``, else {}."""
    value = engine.get(dest)
    return value if isinstance(value, dict) else {}
