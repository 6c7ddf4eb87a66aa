"""``python -m vllm_monitoring.draw``: dashboards as Grafana's dark theme shows them, for the docs. Asks Prometheus."""

from __future__ import annotations

import argparse
import functools
import http.client
import io
import itertools
import math
import re
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

import matplotlib as mpl
import msgspec
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import FancyBboxPatch
from matplotlib.textpath import text_to_path
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image

from vllm_monitoring import boards

OURS: Final = Path(__file__).parents[1] / "grafana/dashboards"
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
CLOCK_STEPS: Final = (5, 15, 30, *(60 * minutes for minutes in (1, 2, 5, 10, 15, 30, 60, 120, 360, 720, 1440, 10080)))
"""Seconds between ticks of the x axis."""
ENTRIES_MAX, TICKS_MAX, POINTS_MAX = 6, 6, 250
"""Of a legend, an axis, a series."""
EMPTY: Final = 1e-9
"""Below this a heatmap's cell is empty, as in Grafana's filterValues."""
VALUE: Final = "Value #"
"""Before a query's letter it names its column of a table."""

Ask = Callable[[str, bool], "list[Series]"]
"""Given an expression, and whether of the window's last moment alone."""


class DrawError(Exception):
    """What was given cannot be drawn; one sentence."""


class Series(msgspec.Struct, frozen=True):
    """One of Prometheus' answer: pairs of unix seconds and value, ``value`` of the last moment."""

    metric: dict[str, str]
    values: list[tuple[float, str]] = []
    value: tuple[float, str] = (0, "nan")


class Window(msgspec.Struct, frozen=True):
    """What is looked at, in unix seconds, of series scraped each ``interval_s``."""

    begin: float
    end: float
    interval_s: float

    def __post_init__(self) -> None:
        if not (self.begin < self.end and self.interval_s > 0):
            raise DrawError("--from must be before --to, and --interval above 0")

    @property
    def step_s(self) -> float:
        """A multiple of the interval, so that a panel has at most POINTS_MAX."""
        return self.interval_s * math.ceil((self.end - self.begin) / self.interval_s / POINTS_MAX)

    @property
    def times(self) -> NDArray[np.float64]:
        """Of every step."""
        steps = int((self.end - self.begin) / self.step_s)
        return np.linspace(self.begin, self.begin + steps * self.step_s, steps + 1)

    def placed(self, series: Series) -> NDArray[np.float64]:
        """Its values at ``times``, NaN where it has none: there Grafana's line breaks."""
        row = np.full(len(self.times), np.nan)
        for time, value in series.values:
            row[round((time - self.begin) / self.step_s)] = float(value)
        row[np.isinf(row)] = np.nan
        return row


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


def draw(board: dict[str, Any], ask: Ask, window: Window) -> Figure:
    """A dashboard's JSON as a figure.

    Raises:
        DrawError: a panel is of a kind that our dashboards do not have; whatever ``ask`` raises.
    """
    with mpl.rc_context({**mpl.rcParamsDefault, "font.family": "DejaVu Sans"}):
        page = Page(HEAD + GAP + UNIT * max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in board["panels"]))
        begin, end = (datetime.fromtimestamp(time, UTC) for time in (window.begin, window.end))
        page.text(2 * GAP, HEAD / 2, board["title"], size=17, weight="bold")
        page.text(WIDTH - 2 * GAP, HEAD / 2, f"{begin:%Y-%m-%d %H:%M:%S} to {end:%H:%M:%S} UTC", FAINT, ha="right")
        for panel in board["panels"]:
            _panel(page, panel, ask, window)
        return page.figure


def _panel(page: Page, panel: dict[str, Any], ask: Ask, window: Window) -> None:
    at, column = panel["gridPos"], (WIDTH - GAP) / 24
    box = Box(GAP + at["x"] * column, HEAD + at["y"] * UNIT, at["w"] * column - GAP, at["h"] * UNIT - GAP)
    if panel["type"] == "row":
        page.text(box.x + 4, box.y + box.h / 2, f"▾  {panel['title']}", size=15, weight="bold")
        return
    if panel["type"] not in KINDS:
        raise DrawError(f"{panel['title']}: a panel of the kind {panel['type']} cannot be drawn")
    page.box(box, CARD, radius=3)
    page.text(box.x + 10, box.y + 17, _cut(panel["title"], box.w - 20, 13, "bold"), size=13, weight="bold")
    answers = []
    for target in panel["targets"]:
        expr = boards.filled(target["expr"], interval_s=window.interval_s, step_s=window.step_s)
        answers.append(sorted(ask(expr, target["instant"]), key=lambda series: sorted(series.metric.items())))
    inner = Box(box.x + 10, box.y + 36, box.w - 20, box.h - 44)
    if any(answers):
        KINDS[panel["type"]](page, inner, panel, answers, window)
    else:
        nothing = panel["fieldConfig"]["defaults"].get("noValue") or "No data"
        page.text(inner.x + inner.w / 2, inner.y + inner.h / 2 - 8, nothing, FAINT, 16, ha="center")


def _stat(page: Page, box: Box, panel: dict[str, Any], answers: list[list[Series]], _: Window) -> None:
    shown, value = panel["fieldConfig"]["defaults"], float(answers[0][0].value[1])
    text = formatted(value, shown["unit"], shown.get("decimals"))
    size = min(38.0, 38 * 0.9 * box.w / _width(text, 38, "bold"))
    color = _threshold(value, shown["thresholds"])
    page.text(box.x + box.w / 2, box.y + box.h / 2 - 4, text, color, size, weight="bold", ha="center")


def _lines(page: Page, box: Box, panel: dict[str, Any], answers: list[list[Series]], window: Window) -> None:
    shown, named = panel["fieldConfig"]["defaults"], _named(panel, answers)
    entries = [(name, color) for (name, _), color in zip(named, itertools.cycle(PALETTE), strict=False)]
    rows = np.array([window.placed(series) for _, series in named])
    below = np.zeros_like(rows)
    if shown["custom"].get("stacking", {}).get("mode") == "normal":
        below[1:] = np.cumsum(np.nan_to_num(rows), axis=0)[:-1]
    top = _top(float(np.nan_to_num(rows + below).max()), shown)
    axes = _plot(page, _legend(page, box, entries), window, _ticks(top, shown["unit"]))
    axes.set_ylim(0, top)
    for (_, color), row, under in zip(entries, rows, below, strict=True):
        opacity = shown["custom"]["fillOpacity"] / 100
        axes.fill_between(window.times, under, under + row, color=color, alpha=opacity, linewidth=0)
        axes.plot(window.times, under + row, color=color, linewidth=1.1, clip_on=False)
    if shown["custom"].get("thresholdsStyle", {}).get("mode") == "dashed":
        for step in shown["thresholds"]["steps"][1:]:
            axes.axhline(step["value"], color=NAMED[step["color"]], linewidth=1.2, dashes=(7, 5))


def _heat(page: Page, box: Box, panel: dict[str, Any], answers: list[list[Series]], window: Window) -> None:
    cumulative = sorted((float(series.metric["le"]), window.placed(series).tolist()) for series in answers[0])
    bounds = [0.0, *(bound for bound, _ in cumulative)]
    counts = np.diff(np.array([row for _, row in cumulative]), axis=0, prepend=0)
    counts[~(counts > EMPTY)] = np.nan
    full = np.flatnonzero(~np.isnan(counts).all(axis=1)).tolist() or [0, len(counts) - 1]
    low, high = full[0], full[-1] + 1
    unit = panel["options"]["yAxis"].get("unit", "none")
    ticks = [(edge, formatted(bounds[edge], unit)) for edge in range(low, high + 1, math.ceil((high - low) / 8))]
    axes = _plot(page, Box(box.x, box.y, box.w, box.h - 20), window, ticks)
    axes.set_ylim(low, high)
    axes.grid(visible=False)
    sides = np.append(window.times - window.step_s, window.times[-1])
    colors = mpl.colormaps["Spectral_r"]
    cells = axes.pcolormesh(sides, range(low, high + 1), counts[low:high], cmap=colors, edgecolor=CARD, linewidth=0.4)
    strip, (least, most) = Box(box.x + box.w - 166, box.y + box.h - 9, 110, 8), cells.get_clim()
    page.axes(strip).pcolormesh(np.linspace(0, 1, 64)[None], cmap=colors)
    page.figure.axes[-1].axis("off")
    page.text(strip.x - 6, strip.y + 4, formatted(least or 0, "short"), FAINT, 11, ha="right")
    page.text(strip.x + strip.w + 6, strip.y + 4, formatted(most or 0, "short"), FAINT, 11)


def _states(page: Page, box: Box, panel: dict[str, Any], answers: list[list[Series]], window: Window) -> None:
    named, states = _named(panel, answers), _mapped(panel["fieldConfig"]["defaults"]["mappings"])
    rows = [window.placed(series) for _, series in named]
    occurring = [state for value, state in states.items() if any(value in row for row in rows)]
    ticks = [(place + 0.5, name) for place, (name, _) in enumerate(named)]
    axes = _plot(page, _legend(page, box, occurring), window, ticks)
    axes.set_ylim(len(rows), 0)
    for place, row in enumerate(rows):
        for value, run in itertools.groupby(zip(row.tolist(), window.times, strict=True), key=lambda pair: pair[0]):
            if value in states:
                times = [time for _, time in run]
                until = min(times[-1] + window.step_s, window.end)
                axes.barh(place + 0.5, until - times[0], 0.8, times[0], color=states[value][1])


def _table(page: Page, box: Box, panel: dict[str, Any], answers: list[list[Series]], _: Window) -> None:
    rows = _merged([target["refId"] for target in panel["targets"]], answers)
    organized = next(one["options"] for one in panel["transformations"] if one["id"] == "organize")
    properties = {
        one["matcher"]["options"]: {of["id"]: of["value"] for of in one["properties"]}
        for one in panel["fieldConfig"]["overrides"]
    }
    columns = []
    for name in sorted({*itertools.chain(*rows)}, key=lambda name: (name.startswith(VALUE), name)):
        title = organized["renameByName"].get(name, name)
        cells = [_cell(row.get(name), properties.get(title, {})) for row in rows]
        width = max(_width(title, 12, "bold"), *(_width(text, 12) for text, _, _ in cells)) + 16
        if not organized["excludeByName"].get(name):
            columns.append((width, title, cells, name.startswith(VALUE)))
    # Where there is no room for all, the widest are cut.
    most = next(most for most in range(WIDTH, 0, -1) if sum(min(most, width) for width, *_ in columns) <= box.w)
    spare, x = (box.w - sum(min(most, width) for width, *_ in columns)) / len(columns), box.x
    for width, title, cells, right in columns:
        area = Box(x, box.y, min(most, width) + spare, box.h)
        _column(page, area, title, cells, right=right)
        x += area.w


def _column(page: Page, box: Box, title: str, cells: Sequence[tuple[str, str, str]], *, right: bool) -> None:
    """As many of ``cells`` (text, its colour, the ground's) as fit below ``title``; Grafana scrolls to the others."""
    x, align = (box.x + box.w - 8, "right") if right else (box.x + 6, "left")
    page.text(x, box.y + 10, _cut(title, box.w - 10, 12, "bold"), FAINT, weight="bold", ha=align)
    for place, (text, color, ground) in enumerate(cells[: int(box.h / CELL - 0.75)]):
        y = box.y + CELL * (place + 0.75)
        page.box(Box(box.x, y, box.w, 1), GRID)
        page.box(Box(box.x + 1, y + 2, box.w - 2, CELL - 3), ground)
        page.text(x, y + CELL / 2, _cut(text, box.w - 10, 12), color, ha=align)


def _cell(value: str | float | None, shown: dict[str, Any]) -> tuple[str, str, str]:
    """Its text, the text's colour and the ground's, as a column's properties say."""
    if value is None or isinstance(value, str):
        return value or "", TEXT, "none"
    kind = shown.get("custom.cellOptions", {}).get("type")
    if kind == "color-background" and (state := _mapped(shown["mappings"]).get(value)):
        return state[0], PAGE if sum(to_rgb(state[1])) > sum(to_rgb("grey")) else "white", state[1]
    color = _threshold(value, shown["thresholds"]) if kind == "color-text" else TEXT
    return formatted(value, shown.get("unit", "none"), shown.get("decimals")), color, "none"


def _merged(refs: Sequence[str], answers: list[list[Series]]) -> list[dict[str, str | float]]:
    """Rows of labels and values, as Grafana's transformation merge makes them.

    Rows become one where no label of both differs, __name__ among them (grafana-data's transformers/merge.ts).
    """
    rows: list[dict[str, str | float]] = []
    for ref, answer in zip(refs, answers, strict=True):
        for series in answer:
            new: dict[str, str | float] = {**series.metric, VALUE + ref: float(series.value[1])}
            alike = [row for row in rows if all(row.get(name, value) == value for name, value in new.items())]
            for row in alike:
                row.update(new)
            if not alike:
                rows.append(new)
    return rows


KINDS: Final = {"stat": _stat, "timeseries": _lines, "heatmap": _heat, "state-timeline": _states, "table": _table}


def _plot(page: Page, box: Box, window: Window, ticks: Sequence[tuple[float, str]]) -> Axes:
    """Axes over time in ``box``, with ``ticks`` of y and their texts."""
    left = max(_width(text, 11) for _, text in ticks) + 6
    axes = page.axes(Box(box.x + left, box.y, box.w - left - 4, box.h - 22))
    axes.set_xlim(window.begin, window.end)
    fitting = (step for step in CLOCK_STEPS if (window.end - window.begin) / step <= TICKS_MAX)
    every = next(fitting, CLOCK_STEPS[-1])
    clock = range(math.ceil(window.begin / every) * every, math.ceil(window.end), every)
    shape = "%H:%M:%S" if every % 60 else "%H:%M"
    axes.set_xticks(clock, [f"{datetime.fromtimestamp(time, UTC):{shape}}" for time in clock])
    axes.set_yticks([place for place, _ in ticks], [text for _, text in ticks])
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    return axes


def _legend(page: Page, box: Box, entries: Sequence[tuple[str, str]]) -> Box:
    """Names with their colours at the bottom of ``box``; the room that they leave above them."""
    more = len(entries) - ENTRIES_MAX
    x, line, places = 0.0, 1, []
    for name, color in [*entries[:ENTRIES_MAX], *[(f"… and {more} more", "none")] * (more > 0)]:
        text = _cut(name, box.w - 20, 11)
        width = 20 + _width(text, 11)
        if x and x + width > box.w:
            x, line = 0.0, line + 1
        places.append((box.x + x, line, text, color))
        x += width + 16
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


def _ticks(top: float, unit: str) -> list[tuple[float, str]]:
    """Round numbers of the unit from 0 to ``top``, and their texts."""
    one, _ = _scale(top, unit)
    places = [one * place for place in MaxNLocator(TICKS_MAX, steps=[1, 2, 2.5, 5, 10]).tick_values(0, top / one)]
    return [(place, formatted(place, unit)) for place in places if place <= top]


def _top(peak: float, shown: dict[str, Any]) -> float:
    """Where the y axis ends: a tenth above what is drawn, and at 100 where all of that is 0.

    Source: uPlot's rangeNum, Grafana's UPlotScaleBuilder.
    """
    soft = shown["custom"].get("axisSoftMax", 0)
    if "max" in shown or 0 < soft >= peak:
        return float(shown.get("max", soft))
    if peak < EMPTY:
        return 100
    digit = 10.0 ** (math.floor(math.log10(peak)) - 1)
    return math.ceil(1.1 * peak / digit) * digit


def _named(panel: dict[str, Any], answers: list[list[Series]]) -> list[tuple[str, Series]]:
    """Every series with its legend."""

    def name(legend: str, labels: dict[str, str]) -> str:
        return re.sub(r"{{\s*(\w+)\s*}}", lambda label: labels.get(label[1], ""), legend)

    legends = [target["legendFormat"] for target in panel["targets"]]
    return [(name(legend, one.metric), one) for legend, answer in zip(legends, answers, strict=True) for one in answer]


def _mapped(mappings: Sequence[dict[str, Any]]) -> dict[float, tuple[str, str]]:
    """The text and the colour of each value."""
    options = itertools.chain.from_iterable(mapping["options"].items() for mapping in mappings)
    return {float(value): (to["text"], NAMED[to["color"]]) for value, to in options}


def _threshold(value: float, thresholds: dict[str, Any]) -> str:
    reached = [step["color"] for step in thresholds["steps"] if step["value"] is None or value >= step["value"]]
    return NAMED[reached[-1]]


def _width(text: str, size: float, weight: str = "normal") -> float:
    """In pixels, of a text of ``size`` pixels."""
    font = FontProperties(family="DejaVu Sans", size=size, weight=weight)
    return float(text_to_path.get_text_width_height_descent(text, font, ismath=False)[0])


def _cut(text: str, room: float, size: float, weight: str = "normal") -> str:
    """As much of ``text`` as is not wider than ``room`` pixels."""
    while len(text) > 1 and _width(text, size, weight) > room:
        text = text[:-2].rstrip() + "…"
    return text


class _Found(msgspec.Struct):
    result: list[Series]


class _Answer(msgspec.Struct):
    data: _Found


def asked(url: str, window: Window, expr: str, instant: bool) -> list[Series]:  # noqa: FBT001 - an Ask has no names
    """What the Prometheus at ``url`` answers.

    Raises:
        DrawError: none is there, or it cannot evaluate ``expr``.
    """
    when = {"time": window.end} if instant else {"start": window.begin, "end": window.end, "step": window.step_s}
    query = f"query{'' if instant else '_range'}?{urllib.parse.urlencode({'query': expr, **when})}"
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/api/v1/{query}", timeout=30) as answer:  # noqa: S310 - as told
            return msgspec.json.decode(answer.read(), type=_Answer).data.result
    except urllib.error.HTTPError as error:
        raise DrawError(f"{url}: {error.code} {error.reason}, asked for {expr}") from None
    except (OSError, ValueError, http.client.HTTPException, msgspec.MsgspecError) as error:
        raise DrawError(
            f"{url}: no Prometheus answers there: {getattr(error, 'reason', type(error).__name__)}"
        ) from None


def write(figure: Figure, path: Path) -> None:
    """A PNG of 256 colours, a third as large: flat areas keep theirs, edges of letters change by what nobody sees."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    with Image.open(drawn) as image:
        few = image.convert("RGB").quantize(256, kmeans=1, dither=Image.Dither.NONE)
    few.save(path, optimize=True)


def _read(path: Path) -> dict[str, Any]:
    try:
        board = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise DrawError(f"{path}: {error}") from None
    if not board.get("panels"):
        raise DrawError(f"{path}: no dashboard, as it has no panels")
    return board


def main(argv: list[str] | None = None) -> int:
    """The exit code; 2 is a mistake in what was given, said in one line."""
    parser = argparse.ArgumentParser(prog="python -m vllm_monitoring.draw", description=__doc__, allow_abbrev=False)
    parser.add_argument("--prometheus", required=True, metavar="URL")
    parser.add_argument("--from", required=True, type=float, dest="begin", metavar="TIME", help="in unix seconds")
    parser.add_argument("--to", required=True, type=float, dest="end", metavar="TIME", help="in unix seconds")
    parser.add_argument("--interval", type=float, default=15, metavar="SECONDS", help="between scrapes; default: 15")
    parser.add_argument("--to-folder", required=True, type=Path, metavar="FOLDER")
    parser.add_argument("boards", nargs="*", type=Path, metavar="BOARD.json", help="default: all of ours")
    given = parser.parse_args(argv)
    try:
        window = Window(given.begin, given.end, given.interval)
        ask = functools.partial(asked, given.prometheus, window)
        given.to_folder.mkdir(parents=True, exist_ok=True)
        for path in given.boards or sorted(OURS.glob("*.json")):
            write(draw(_read(path), ask, window), given.to_folder / f"{path.stem}.png")
    except DrawError as error:
        print(f"vllm_monitoring: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"vllm_monitoring: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
