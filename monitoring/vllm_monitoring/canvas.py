"""What dashboards are drawn with: a page in pixels, Grafana's colours, and numbers as Grafana's units show them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import FancyBboxPatch
from matplotlib.textpath import text_to_path
from matplotlib.ticker import MaxNLocator

DPI, WIDTH, HEAD, UNIT, GAP, CELL = 100, 1600, 44, 38, 8, 34
"""After the first in pixels: the page, its head, gridPos' unit of height (Grafana's 30 + 8), a gap, a table's row."""
POINT: Final = 72 / DPI
PAGE, CARD, TEXT, FAINT, GRID = "#111217", "#181b1f", "#ccccdc", "#8e8e9b", "#2a2d33"
NAMED: Final = {
    "green": "#73bf69", "super-light-green": "#c8f2c2", "yellow": "#fade2a", "orange": "#ff9830", "red": "#f2495c",
    "dark-red": "#c4162a", "blue": "#5794f2", "purple": "#b877d9", "text": TEXT, "transparent": "none",
}  # fmt: skip
PALETTE: Final = (
    "#73bf69", "#f2cc0c", "#8ab8ff", "#ff780a", "#f2495c", "#5794f2", "#b877d9", "#705da0", "#37872d", "#fade2a",
    "#447ebc", "#c15c17", "#890f02", "#0a437c", "#6d1f62", "#584477",
)  # fmt: skip
"""Grafana's palette-classic, in the order of series."""
SCALES: Final[dict[str, Sequence[tuple[float, str]]]] = {
    "s": ((1e-9, " ns"), (1e-6, " µs"), (1e-3, " ms"), (1, " s"), (60, " min"), (3600, " hour"), (86400, " day")),
    "short": ((1, ""), (1e3, " K"), (1e6, " Mil"), (1e9, " Bil"), (1e12, " Tri")),
    "reqps": ((1, " req/s"), (1e3, "K req/s"), (1e6, "M req/s")),
    "bytes": tuple((1024.0**place, f" {name}B") for place, name in enumerate(("", "Ki", "Mi", "Gi", "Ti", "Pi"))),
    "watt": ((1, " W"), (1e3, " kW"), (1e6, " MW")),
    "celsius": ((1, " °C"),),
    "percentunit": ((0.01, "%"),),
    "percent": ((1, "%"),),
    "none": ((1, ""),),
}
"""Of each unit: from which value on it is shown in what."""
ENTRIES_MAX, TICKS_MAX = 6, 6
"""Of a legend, of an axis."""


class Box(NamedTuple):
    """In pixels from the page's top left."""

    x: float
    y: float
    w: float
    h: float


class Page:
    """A figure that is drawn on in pixels, y downwards."""

    def __init__(self, height: float) -> None:
        self.height = height
        self.figure = Figure(figsize=(WIDTH / DPI, height / DPI), dpi=DPI, facecolor=PAGE)
        self._ground = self.axes(Box(0, 0, WIDTH, height))
        self._ground.set(xlim=(0, WIDTH), ylim=(height, 0))
        self._ground.axis("off")

    def axes(self, box: Box) -> Axes:
        """Empty ones, without a frame."""
        area = (box.x / WIDTH, 1 - (box.y + box.h) / self.height, box.w / WIDTH, box.h / self.height)
        axes = self.figure.add_axes(area, facecolor="none")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, labelcolor=FAINT, labelsize=11 * POINT, pad=5)
        return axes

    def text(self, x: float, y: float, text: str, color: str = TEXT, size: float = 12, **how: Any) -> None:
        """``size`` in pixels; ``y`` is its middle."""
        self._ground.text(x, y, text, color=color, size=size * POINT, va="center_baseline", parse_math=False, **how)

    def box(self, box: Box, color: str, radius: float = 0) -> None:
        """Filled."""
        style = f"round,pad=0,rounding_size={radius}"
        self._ground.add_patch(FancyBboxPatch(box[:2], box.w, box.h, style, facecolor=color, edgecolor="none"))


def legend(page: Page, box: Box, entries: Sequence[tuple[str, str]]) -> Box:
    """Names with their colours at the bottom of ``box``; the room that they leave above them."""
    more = len(entries) - ENTRIES_MAX
    x, line, places = 0.0, 1, []
    for name, color in [*entries[:ENTRIES_MAX], *[(f"… and {more} more", "none")] * (more > 0)]:
        text = cut(name, box.w - 20, 11)
        room = 20 + width(text, 11)
        if x and x + room > box.w:
            x, line = 0.0, line + 1
        places.append((box.x + x, line, text, color))
        x += room + 16
    room = box.h - 18 * line
    for x, line, text, color in places:
        y = box.y + room + 18 * line - 8
        page.box(Box(x, y - 2, 14, 4), color, radius=2)
        page.text(x + 20, y, text, size=11)
    return Box(box.x, box.y, box.w, room - 4)


def formatted(value: float, unit: str, decimals: int | None = None) -> str:
    """As Grafana's unit ``unit`` shows it; with three digits, if ``decimals`` does not say how many."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else f"{value:+}".replace("inf", "Inf")
    one, suffix = _scale(value, unit)
    if decimals is not None:
        return f"{value / one:.{decimals}f}{suffix}"
    digits = max(0, 2 - math.floor(math.log10(abs(value / one)))) if value else 0
    text = f"{value / one:.{digits}f}"
    return (text.rstrip("0").rstrip(".") if digits else text) + suffix


def _scale(value: float, unit: str) -> tuple[float, str]:
    """What one is and the suffix, for values about as large as ``value``."""
    scales = SCALES.get(unit) or [(1, f" {unit.removeprefix('suffix:').strip()}")]
    if not value:
        return min(scales, key=lambda scale: abs(scale[0] - 1))
    return next((scale for scale in reversed(scales) if scale[0] <= abs(value)), scales[0])


def y_ticks(top: float, unit: str) -> list[tuple[float, str]]:
    """Round numbers of the unit from 0 to ``top``, and their texts."""
    one, _ = _scale(top, unit)
    places = [one * place for place in MaxNLocator(TICKS_MAX, steps=[1, 2, 2.5, 5, 10]).tick_values(0, top / one)]
    return [(place, formatted(place, unit)) for place in places if place <= top]


def width(text: str, size: float, weight: str = "normal") -> float:
    """In pixels, of a text of ``size`` pixels."""
    font = FontProperties(family="DejaVu Sans", size=size, weight=weight)
    return float(text_to_path.get_text_width_height_descent(text, font, ismath=False)[0])


def cut(text: str, room: float, size: float, weight: str = "normal") -> str:
    """As much of ``text`` as is not wider than ``room`` pixels."""
    while len(text) > 1 and width(text, size, weight) > room:
        text = text[:-2].rstrip() + "…"
    return text
