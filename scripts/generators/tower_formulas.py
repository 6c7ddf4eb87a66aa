"""Finds how sizes depend on the keys of a configuration: ``Formulas(changes).of(size, ...)``.

A formula is text: "3*vision_config.hidden_size", "vision_config.depth-1", or
"vision_config.image_size^2*vision_config.patch_size^-2+1". A list of keys counts as its length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

POWERS = (1, 2, -1, -2, 3)


class Change(NamedTuple):
    """What a tower is before and after the key at ``path`` changes from ``old`` to ``new``."""

    path: str
    old: int
    new: int
    before: Mapping[str, Any]
    after: Mapping[str, Any]


class Formulas:
    """Formulas of sizes. ``defaults`` has the old values of all keys that the formulas so far contain."""

    def __init__(self, changes: Sequence[Change]) -> None:
        self._changes = changes
        self.defaults: dict[str, int] = {}

    def of(self, size: int, select: Callable[[Mapping[str, Any]], int]) -> str:
        """Return the formula of ``size``, which ``select`` finds in the rows before and after a change."""
        relevant = [(change, select(change.after)) for change in self._changes if select(change.after) != size]
        if not relevant:
            return str(size)
        formula = _product(size, relevant) or _sum(size, relevant)
        if formula is None:
            return str(size)
        self.defaults |= {change.path: change.old for change, _ in relevant}
        return formula


def _product(size: int, relevant: Sequence[tuple[Change, int]]) -> str | None:
    """Return a product of powers, with 1 or 2 more for class tokens, or None."""
    for more in (0, 1, 2):
        factor, words = Fraction(size - more), []
        for change, new_size in relevant:
            power = _power(change, size - more, new_size - more)
            if power is None:
                break
            factor /= Fraction(change.old) ** power
            words.append(change.path if power == 1 else f"{change.path}^{power}")
        else:
            head = [] if factor == 1 else [str(factor)]
            return "*".join([*head, *words]) + (f"+{more}" if more else "")
    return None


def _power(change: Change, size: int, new_size: int) -> int | None:
    ratio = Fraction(change.new, change.old)
    return next((power for power in POWERS if size and Fraction(new_size, size) == ratio**power), None)


def _sum(size: int, relevant: Sequence[tuple[Change, int]]) -> str | None:
    """Return a sum of multiples of keys and a constant, or None if one is not a whole number."""
    words, rest = [], Fraction(size)
    for change, new_size in relevant:
        slope = Fraction(new_size - size, change.new - change.old)
        rest -= slope * change.old
        words.append(change.path if slope == 1 else f"{slope}*{change.path}")
    total = "+".join(words) + (f"{'+' * (rest > 0)}{rest}" if rest else "")
    return total.replace("+-", "-")
