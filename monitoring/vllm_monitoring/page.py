"""The drawing surface of dashboards: a page in pixels, Grafana's colours, and Grafana's number formats."""

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
"""Dots per inch, then sizes in pixels.

WIDTH: page width. HEAD: height of the page header. UNIT: height of one gridPos unit (Grafana: 30 + 8). GAP: between
panels. CELL: height of a table row.
"""
POINT: Final = 72 / DPI
"""Typographic points per pixel."""
PAGE, CARD, TEXT, FAINT, GRID = "#111217", "#181b1f", "#ccccdc", "#8e8e9b", "#2a2d33"
"""Colours of Grafana's dark theme: page, panel, text, secondary text, grid lines."""
COLORS: Final = {
    "green": "#73bf69", "super-light-green": "#c8f2c2", "yellow": "#fade2a", "orange": "#ff9830", "red": "#f2495c",
    "dark-red": "#c4162a", "dark-orange": "#fa6400", "blue": "#5794f2", "purple": "#b877d9", "text": TEXT,
    "transparent": "none",
}  # fmt: skip
"""RGB value of each Grafana colour name."""
PALETTE: Final = (
    "#73bf69", "#f2cc0c", "#8ab8ff", "#ff780a", "#f2495c", "#5794f2", "#b877d9", "#705da0", "#37872d", "#fade2a",
    "#447ebc", "#c15c17", "#890f02", "#0a437c", "#6d1f62", "#584477",
)  # fmt: skip
"""Colours of series, in order: Grafana's palette-classic."""
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
"""Scales of each Grafana unit: pairs of the smallest value that uses the scale and its suffix."""
ENTRIES_MAX, TICKS_MAX = 6, 6
"""Largest number of legend entries and of axis ticks."""


class Box(NamedTuple):
    """A rectangle in pixels. (x, y) is its top left corner, measured from the page's top left."""

    x: float
    y: float
    w: float
    h: float


class Page:
    """A figure with pixel coordinates. y increases downwards."""

    def __init__(self, height: float) -> None:
        self.height = height
        self.figure = Figure(figsize=(WIDTH / DPI, height / DPI), dpi=DPI, facecolor=PAGE)
        self._background = self.axes(Box(0, 0, WIDTH, height))
        self._background.set(xlim=(0, WIDTH), ylim=(height, 0))
        self._background.axis("off")

    def axes(self, box: Box) -> Axes:
        """Return new empty axes in ``box``, without a frame."""
        area = (box.x / WIDTH, 1 - (box.y + box.h) / self.height, box.w / WIDTH, box.h / self.height)
        axes = self.figure.add_axes(area, facecolor="none")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, labelcolor=FAINT, labelsize=11 * POINT, pad=5)
        return axes

    def text(self, x: float, y: float, text: str, color: str = TEXT, size: float = 12, **options: Any) -> None:
        """Draw ``text``. ``size`` is in pixels, ``y`` is the vertical middle, ``options`` go to matplotlib."""
        self._background.text(
            x, y, text, color=color, size=size * POINT, va="center_baseline", parse_math=False, **options
        )

    def box(self, box: Box, color: str, radius: float = 0) -> None:
        """Draw a filled rectangle with corners of ``radius`` pixels."""
        style = f"round,pad=0,rounding_size={radius}"
        self._background.add_patch(FancyBboxPatch(box[:2], box.w, box.h, style, facecolor=color, edgecolor="none"))


def legend(page: Page, box: Box, entries: Sequence[tuple[str, str]]) -> Box:
    """Draw names with their colours at the bottom of ``box``. Return the space left above them."""
    hidden = len(entries) - ENTRIES_MAX
    x, line, positions = 0.0, 1, []
    for name, color in [*entries[:ENTRIES_MAX], *[(f"… and {hidden} more", "none")] * (hidden > 0)]:
        text = cut(name, box.w - 20, 11)
        entry_width = 20 + width(text, 11)
        if x and x + entry_width > box.w:
            x, line = 0.0, line + 1
        positions.append((box.x + x, line, text, color))
        x += entry_width + 16
    height = box.h - 18 * line
    for x, line, text, color in positions:
        y = box.y + height + 18 * line - 8
        page.box(Box(x, y - 2, 14, 4), color, radius=2)
        page.text(x + 20, y, text, size=11)
    return Box(box.x, box.y, box.w, height - 4)


def formatted(value: float, unit: str, decimals: int | None = None) -> str:
    """Return ``value`` as Grafana's ``unit`` shows it, with three significant digits if ``decimals`` is None."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else f"{value:+}".replace("inf", "Inf")
    divisor, suffix = _scale(value, unit)
    if decimals is not None:
        return f"{value / divisor:.{decimals}f}{suffix}"
    digits = max(0, 2 - math.floor(math.log10(abs(value / divisor)))) if value else 0
    text = f"{value / divisor:.{digits}f}"
    return (text.rstrip("0").rstrip(".") if digits else text) + suffix


def _scale(value: float, unit: str) -> tuple[float, str]:
    """Return the divisor and the suffix for values about as large as ``value``."""
    scales = SCALES.get(unit) or [(1, f" {unit.removeprefix('suffix:').strip()}")]
    if not value:
        return min(scales, key=lambda scale: abs(scale[0] - 1))
    return next((scale for scale in reversed(scales) if scale[0] <= abs(value)), scales[0])


def y_ticks(top: float, unit: str) -> list[tuple[float, str]]:
    """Return tick positions from 0 to ``top`` and their texts. The positions are round numbers of the unit."""
    divisor, _ = _scale(top, unit)
    ticks = MaxNLocator(TICKS_MAX, steps=[1, 2, 2.5, 5, 10]).tick_values(0, top / divisor)
    return [(divisor * tick, formatted(divisor * tick, unit)) for tick in ticks if divisor * tick <= top]


def width(text: str, size: float, weight: str = "normal") -> float:
    """Return the width in pixels of a text of ``size`` pixels."""
    font = FontProperties(family="DejaVu Sans", size=size, weight=weight)
    return float(text_to_path.get_text_width_height_descent(text, font, ismath=False)[0])


def cut(text: str, width_px: float, size: float, weight: str = "normal") -> str:
    """Return ``text``, shortened with "…" if it is wider than ``width_px`` pixels."""
    while len(text) > 1 and width(text, size, weight) > width_px:
        text = text[:-2].rstrip() + "…"
    return text
