"""``python -m vllm_monitoring.draw``: dashboards as Grafana's dark theme shows them, for the docs. Asks Prometheus."""

from __future__ import annotations

import argparse
import functools
import io
import itertools
import math
import re
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
import msgspec
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from vllm_monitoring import boards
from vllm_monitoring.answers import DrawError, Series, Window, asked
from vllm_monitoring.canvas import (
    CARD,
    CELL,
    FAINT,
    GAP,
    GRID,
    HEAD,
    NAMED,
    PAGE,
    PALETTE,
    TEXT,
    TICKS_MAX,
    UNIT,
    WIDTH,
    Box,
    Page,
    cut,
    formatted,
    legend,
    width,
    y_ticks,
)

OURS: Final = Path(__file__).parents[1] / "grafana/dashboards"
CLOCK_STEPS: Final = (5, 15, 30, *(60 * minutes for minutes in (1, 2, 5, 10, 15, 30, 60, 120, 360, 720, 1440, 10080)))
"""Seconds between ticks of the x axis."""
EMPTY: Final = 1e-9
"""Below this a heatmap's cell is empty, as in Grafana's filterValues."""
VALUE: Final = "Value #"
"""Before a query's letter it names its column of a table."""

Ask = Callable[[str, bool], "list[Series]"]
"""Given an expression, and whether of the window's last moment alone."""


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
        page.text(
            box.x + 4,
            box.y + box.h / 2,
            f"{'▸' if panel['collapsed'] else '▾'}  {panel['title']}",
            size=15,
            weight="bold",
        )
        return
    if panel["type"] not in KINDS:
        raise DrawError(f"{panel['title']}: a panel of the kind {panel['type']} cannot be drawn")
    page.box(box, CARD, radius=3)
    page.text(box.x + 10, box.y + 17, cut(panel["title"], box.w - 20, 13, "bold"), size=13, weight="bold")
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
    size = min(38.0, 38 * 0.9 * box.w / width(text, 38, "bold"))
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
    axes = _plot(page, legend(page, box, entries), window, y_ticks(top, shown["unit"]))
    axes.set_ylim(0, top)
    for (_, color), row, under in zip(entries, rows, below, strict=True):
        opacity = shown["custom"]["fillOpacity"] / 100
        axes.fill_between(window.times, under, under + row, color=color, alpha=opacity, linewidth=0)
        if shown["custom"]["lineWidth"]:
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
    axes = _plot(page, legend(page, box, occurring), window, ticks)
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
        wide = max(width(title, 12, "bold"), *(width(text, 12) for text, _, _ in cells)) + 16
        if not organized["excludeByName"].get(name):
            columns.append((wide, title, cells, name.startswith(VALUE)))
    # Where there is no room for all, the widest are cut.
    most = next(most for most in range(WIDTH, 0, -1) if sum(min(most, wide) for wide, *_ in columns) <= box.w)
    spare, x = (box.w - sum(min(most, wide) for wide, *_ in columns)) / len(columns), box.x
    for wide, title, cells, right in columns:
        area = Box(x, box.y, min(most, wide) + spare, box.h)
        _column(page, area, title, cells, right=right)
        x += area.w


def _column(page: Page, box: Box, title: str, cells: Sequence[tuple[str, str, str]], *, right: bool) -> None:
    """As many of ``cells`` (text, its colour, the ground's) as fit below ``title``; Grafana scrolls to the others."""
    x, align = (box.x + box.w - 8, "right") if right else (box.x + 6, "left")
    page.text(x, box.y + 10, cut(title, box.w - 10, 12, "bold"), FAINT, weight="bold", ha=align)
    for place, (text, color, ground) in enumerate(cells[: int(box.h / CELL - 0.75)]):
        y = box.y + CELL * (place + 0.75)
        page.box(Box(box.x, y, box.w, 1), GRID)
        page.box(Box(box.x + 1, y + 2, box.w - 2, CELL - 3), ground)
        page.text(x, y + CELL / 2, cut(text, box.w - 10, 12), color, ha=align)


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
    left = max(width(text, 11) for _, text in ticks) + 6
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
