"""``python -m vllm_monitoring.draw``: draw dashboards for the docs as Grafana shows them.

The data comes from a Prometheus server.
"""

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

from vllm_monitoring import dashboard_queries
from vllm_monitoring.page import (
    CARD,
    CELL,
    COLORS,
    FAINT,
    GAP,
    GRID,
    HEAD,
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
from vllm_monitoring.prometheus_query import DrawError, Series, Window, query

DASHBOARDS: Final = Path(__file__).parents[1] / "grafana/dashboards"
"""Folder of this project's dashboards."""
CLOCK_STEPS: Final = (5, 15, 30, *(60 * minutes for minutes in (1, 2, 5, 10, 15, 30, 60, 120, 360, 720, 1440, 10080)))
"""Allowed seconds between ticks of the x axis."""
EMPTY: Final = 1e-9
"""A heatmap cell with a count up to this is empty. Source: Grafana's filterValues."""
VALUE: Final = "Value #"
"""Grafana names a value column of a table so, followed by the query's refId."""

QueryFunction = Callable[[str, bool], "list[Series]"]
"""Return the series of an expression. The second argument: query only the end of the window."""


def draw(dashboard: dict[str, Any], run_query: QueryFunction, window: Window) -> Figure:
    """Return a figure of a dashboard's JSON.

    Raises:
        DrawError: a panel's type is not in KINDS, or ``run_query`` fails.
    """
    with mpl.rc_context({**mpl.rcParamsDefault, "font.family": "DejaVu Sans"}):
        page = Page(
            HEAD + GAP + UNIT * max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in dashboard["panels"])
        )
        begin, end = (datetime.fromtimestamp(time, UTC) for time in (window.begin, window.end))
        page.text(2 * GAP, HEAD / 2, dashboard["title"], size=17, weight="bold")
        page.text(WIDTH - 2 * GAP, HEAD / 2, f"{begin:%Y-%m-%d %H:%M:%S} to {end:%H:%M:%S} UTC", FAINT, ha="right")
        for panel in dashboard["panels"]:
            _panel(page, panel, run_query, window)
        return page.figure


def _panel(page: Page, panel: dict[str, Any], run_query: QueryFunction, window: Window) -> None:
    """Draw one panel or the title of a row."""
    grid, column = panel["gridPos"], (WIDTH - GAP) / 24
    box = Box(GAP + grid["x"] * column, HEAD + grid["y"] * UNIT, grid["w"] * column - GAP, grid["h"] * UNIT - GAP)
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
        raise DrawError(f"{panel['title']}: panels of the type {panel['type']} cannot be drawn; use {', '.join(KINDS)}")
    page.box(box, CARD, radius=3)
    page.text(box.x + 10, box.y + 17, cut(panel["title"], box.w - 20, 13, "bold"), size=13, weight="bold")
    results = []
    for target in panel["targets"]:
        expr = dashboard_queries.substitute_variables(
            target["expr"], interval_s=window.interval_s, step_s=window.step_s
        )
        results.append(sorted(run_query(expr, target["instant"]), key=lambda series: sorted(series.metric.items())))
    inner = Box(box.x + 10, box.y + 36, box.w - 20, box.h - 44)
    if any(results):
        KINDS[panel["type"]](page, inner, panel, results, window)
    else:
        text = panel["fieldConfig"]["defaults"].get("noValue") or "No data"
        page.text(inner.x + inner.w / 2, inner.y + inner.h / 2 - 8, text, FAINT, 16, ha="center")


def _stat(page: Page, box: Box, panel: dict[str, Any], results: list[list[Series]], _: Window) -> None:
    """Draw the panel's value in the middle of ``box``."""
    config, value = panel["fieldConfig"]["defaults"], float(results[0][0].value[1])
    text = formatted(value, config["unit"], config.get("decimals"))
    size = min(38.0, 38 * 0.9 * box.w / width(text, 38, "bold"))
    color = _threshold(value, config["thresholds"])
    page.text(box.x + box.w / 2, box.y + box.h / 2 - 4, text, color, size, weight="bold", ha="center")


def _lines(page: Page, box: Box, panel: dict[str, Any], results: list[list[Series]], window: Window) -> None:
    """Draw series as lines or stacked areas, with the legend and the dashed limit."""
    config, named = panel["fieldConfig"]["defaults"], _named(panel, results)
    entries = [(name, color) for (name, _), color in zip(named, itertools.cycle(PALETTE), strict=False)]
    rows = np.array([window.aligned(series) for _, series in named])
    bases = np.zeros_like(rows)
    if config["custom"].get("stacking", {}).get("mode") == "normal":
        bases[1:] = np.cumsum(np.nan_to_num(rows), axis=0)[:-1]
    top = _top(float(np.nan_to_num(rows + bases).max()), config)
    axes = _plot(page, legend(page, box, entries), window, y_ticks(top, config["unit"]))
    axes.set_ylim(0, top)
    for (_, color), row, base in zip(entries, rows, bases, strict=True):
        opacity = config["custom"]["fillOpacity"] / 100
        axes.fill_between(window.times, base, base + row, color=color, alpha=opacity, linewidth=0)
        if config["custom"]["lineWidth"]:
            axes.plot(window.times, base + row, color=color, linewidth=1.1, clip_on=False)
    if config["custom"].get("thresholdsStyle", {}).get("mode") == "dashed":
        for step in config["thresholds"]["steps"][1:]:
            axes.axhline(step["value"], color=COLORS[step["color"]], linewidth=1.2, dashes=(7, 5))


def _heatmap(page: Page, box: Box, panel: dict[str, Any], results: list[list[Series]], window: Window) -> None:
    """Draw a histogram over time, one cell per bucket and step, with a colour scale below it."""
    cumulative = sorted((float(series.metric["le"]), window.aligned(series).tolist()) for series in results[0])
    bounds = [0.0, *(bound for bound, _ in cumulative)]
    counts = np.diff(np.array([row for _, row in cumulative]), axis=0, prepend=0)
    counts[~(counts > EMPTY)] = np.nan
    used_buckets = np.flatnonzero(~np.isnan(counts).all(axis=1)).tolist() or [0, len(counts) - 1]
    low, high = used_buckets[0], used_buckets[-1] + 1
    unit = panel["options"]["yAxis"].get("unit", "none")
    ticks = [(edge, formatted(bounds[edge], unit)) for edge in range(low, high + 1, math.ceil((high - low) / 8))]
    axes = _plot(page, Box(box.x, box.y, box.w, box.h - 20), window, ticks)
    axes.set_ylim(low, high)
    axes.grid(visible=False)
    cell_edges = np.append(window.times - window.step_s, window.times[-1])
    colors = mpl.colormaps["Spectral_r"]
    cells = axes.pcolormesh(
        cell_edges, range(low, high + 1), counts[low:high], cmap=colors, edgecolor=CARD, linewidth=0.4
    )
    scale, (smallest, largest) = Box(box.x + box.w - 166, box.y + box.h - 9, 110, 8), cells.get_clim()
    page.axes(scale).pcolormesh(np.linspace(0, 1, 64)[None], cmap=colors)
    page.figure.axes[-1].axis("off")
    page.text(scale.x - 6, scale.y + 4, formatted(smallest or 0, "short"), FAINT, 11, ha="right")
    page.text(scale.x + scale.w + 6, scale.y + 4, formatted(largest or 0, "short"), FAINT, 11)


def _states(page: Page, box: Box, panel: dict[str, Any], results: list[list[Series]], window: Window) -> None:
    """Draw a state timeline: one bar per series, coloured by state."""
    named, states = _named(panel, results), _mapped(panel["fieldConfig"]["defaults"]["mappings"])
    rows = [window.aligned(series) for _, series in named]
    occurring = [state for value, state in states.items() if any(value in row for row in rows)]
    ticks = [(number + 0.5, name) for number, (name, _) in enumerate(named)]
    axes = _plot(page, legend(page, box, occurring), window, ticks)
    axes.set_ylim(len(rows), 0)
    for number, row in enumerate(rows):
        for value, run in itertools.groupby(zip(row.tolist(), window.times, strict=True), key=lambda pair: pair[0]):
            if value in states:
                times = [time for _, time in run]
                until = min(times[-1] + window.step_s, window.end)
                axes.barh(number + 0.5, until - times[0], 0.8, times[0], color=states[value][1])


def _table(page: Page, box: Box, panel: dict[str, Any], results: list[list[Series]], _: Window) -> None:
    """Draw a table whose columns share the width of ``box``."""
    rows = _merged([target["refId"] for target in panel["targets"]], results)
    organize = next(step["options"] for step in panel["transformations"] if step["id"] == "organize")
    properties = {
        override["matcher"]["options"]: {entry["id"]: entry["value"] for entry in override["properties"]}
        for override in panel["fieldConfig"]["overrides"]
    }
    columns = []
    for name in sorted({*itertools.chain(*rows)}, key=lambda name: (name.startswith(VALUE), name)):
        title = organize["renameByName"].get(name, name)
        cells = [_cell(row.get(name), properties.get(title, {})) for row in rows]
        wanted = max(width(title, 12, "bold"), *(width(text, 12) for text, _, _ in cells)) + 16
        if not organize["excludeByName"].get(name):
            columns.append((wanted, title, cells, name.startswith(VALUE)))
    # If the columns do not fit, the widest become narrower.
    widest = next(limit for limit in range(WIDTH, 0, -1) if sum(min(limit, wanted) for wanted, *_ in columns) <= box.w)
    spare, x = (box.w - sum(min(widest, wanted) for wanted, *_ in columns)) / len(columns), box.x
    for wanted, title, cells, right in columns:
        area = Box(x, box.y, min(widest, wanted) + spare, box.h)
        _column(page, area, title, cells, right=right)
        x += area.w


def _column(page: Page, box: Box, title: str, cells: Sequence[tuple[str, str, str]], *, right: bool) -> None:
    """Draw ``title`` and the ``cells`` that fit below it: (text, text colour, background).

    In Grafana the user scrolls to the rest.
    """
    x, align = (box.x + box.w - 8, "right") if right else (box.x + 6, "left")
    page.text(x, box.y + 10, cut(title, box.w - 10, 12, "bold"), FAINT, weight="bold", ha=align)
    for number, (text, color, background) in enumerate(cells[: int(box.h / CELL - 0.75)]):
        y = box.y + CELL * (number + 0.75)
        page.box(Box(box.x, y, box.w, 1), GRID)
        page.box(Box(box.x + 1, y + 2, box.w - 2, CELL - 3), background)
        page.text(x, y + CELL / 2, cut(text, box.w - 10, 12), color, ha=align)


def _cell(value: str | float | None, properties: dict[str, Any]) -> tuple[str, str, str]:
    """Return a cell's text, text colour and background colour from its column's properties."""
    if value is None or isinstance(value, str):
        return value or "", TEXT, "none"
    kind = properties.get("custom.cellOptions", {}).get("type")
    if kind == "color-background" and (state := _mapped(properties["mappings"]).get(value)):
        return state[0], PAGE if sum(to_rgb(state[1])) > sum(to_rgb("grey")) else "white", state[1]
    color = _threshold(value, properties["thresholds"]) if kind == "color-text" else TEXT
    return formatted(value, properties.get("unit", "none"), properties.get("decimals")), color, "none"


def _merged(refs: Sequence[str], results: list[list[Series]]) -> list[dict[str, str | float]]:
    """Return table rows of labels and values, as Grafana's transformation merge makes them.

    Two rows become one if all labels that both have are equal, also __name__. Source: grafana-data's
    transformers/merge.ts.
    """
    rows: list[dict[str, str | float]] = []
    for ref, result in zip(refs, results, strict=True):
        for series in result:
            new: dict[str, str | float] = {**series.metric, VALUE + ref: float(series.value[1])}
            matching = [row for row in rows if all(row.get(name, value) == value for name, value in new.items())]
            for row in matching:
                row.update(new)
            if not matching:
                rows.append(new)
    return rows


KINDS: Final = {"stat": _stat, "timeseries": _lines, "heatmap": _heatmap, "state-timeline": _states, "table": _table}


def _plot(page: Page, box: Box, window: Window, ticks: Sequence[tuple[float, str]]) -> Axes:
    """Return axes over time in ``box``. ``ticks``: positions on the y axis and their texts."""
    left = max(width(text, 11) for _, text in ticks) + 6
    axes = page.axes(Box(box.x + left, box.y, box.w - left - 4, box.h - 22))
    axes.set_xlim(window.begin, window.end)
    fitting_steps = (step for step in CLOCK_STEPS if (window.end - window.begin) / step <= TICKS_MAX)
    step_s = next(fitting_steps, CLOCK_STEPS[-1])
    times = range(math.ceil(window.begin / step_s) * step_s, math.ceil(window.end), step_s)
    time_format = "%H:%M:%S" if step_s % 60 else "%H:%M"
    axes.set_xticks(times, [f"{datetime.fromtimestamp(time, UTC):{time_format}}" for time in times])
    axes.set_yticks([position for position, _ in ticks], [text for _, text in ticks])
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    return axes


def _top(peak: float, config: dict[str, Any]) -> float:
    """Return the end of the y axis: 10 % above ``peak``, or 100 if every value is 0. The panel's config comes first.

    Source: uPlot's rangeNum, Grafana's UPlotScaleBuilder.
    """
    soft_max = config["custom"].get("axisSoftMax", 0)
    if "max" in config or 0 < soft_max >= peak:
        return float(config.get("max", soft_max))
    if peak < EMPTY:
        return 100
    digit = 10.0 ** (math.floor(math.log10(peak)) - 1)
    return math.ceil(1.1 * peak / digit) * digit


def _named(panel: dict[str, Any], results: list[list[Series]]) -> list[tuple[str, Series]]:
    """Return every series with its legend text."""

    def name(legend: str, labels: dict[str, str]) -> str:
        return re.sub(r"{{\s*(\w+)\s*}}", lambda label: labels.get(label[1], ""), legend)

    legends = [target["legendFormat"] for target in panel["targets"]]
    return [
        (name(legend, series.metric), series)
        for legend, result in zip(legends, results, strict=True)
        for series in result
    ]


def _mapped(mappings: Sequence[dict[str, Any]]) -> dict[float, tuple[str, str]]:
    """Return the text and the colour of each mapped value."""
    options = itertools.chain.from_iterable(mapping["options"].items() for mapping in mappings)
    return {float(value): (option["text"], COLORS[option["color"]]) for value, option in options}


def _threshold(value: float, thresholds: dict[str, Any]) -> str:
    """Return the colour of the highest threshold that ``value`` reaches."""
    reached = [step["color"] for step in thresholds["steps"] if step["value"] is None or value >= step["value"]]
    return COLORS[reached[-1]]


def write(figure: Figure, path: Path) -> None:
    """Write a PNG with 256 colours. The file is a third as large as with full colour. Flat areas keep their colour."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    with Image.open(drawn) as image:
        reduced = image.convert("RGB").quantize(256, kmeans=1, dither=Image.Dither.NONE)
    reduced.save(path, optimize=True)


def _read(path: Path) -> dict[str, Any]:
    """Return the dashboard in the file ``path``.

    Raises:
        DrawError: the file is not a dashboard's JSON.
    """
    try:
        dashboard = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise DrawError(f"{path}: {error}") from None
    if not dashboard.get("panels"):
        raise DrawError(f"{path}: this is not a dashboard: it has no panels")
    return dashboard


def main(argv: list[str] | None = None) -> int:
    """Draw the dashboards and return the exit code. 2: the input is wrong, and stderr has one line about it."""
    parser = argparse.ArgumentParser(prog="python -m vllm_monitoring.draw", description=__doc__, allow_abbrev=False)
    parser.add_argument("--prometheus", required=True, metavar="URL", help="Prometheus to query")
    parser.add_argument("--from", required=True, type=float, dest="begin", metavar="TIME", help="in Unix seconds")
    parser.add_argument("--to", required=True, type=float, dest="end", metavar="TIME", help="in Unix seconds")
    parser.add_argument("--interval", type=float, default=15, metavar="SECONDS", help="scrape interval; default: 15")
    parser.add_argument("--to-folder", required=True, type=Path, metavar="FOLDER", help="for the PNG files")
    parser.add_argument(
        "dashboards", nargs="*", type=Path, metavar="DASHBOARD.json", help="default: all of this project's"
    )
    options = parser.parse_args(argv)
    try:
        window = Window(options.begin, options.end, options.interval)
        run_query = functools.partial(query, options.prometheus, window)
        options.to_folder.mkdir(parents=True, exist_ok=True)
        for path in options.dashboards or sorted(DASHBOARDS.glob("*.json")):
            write(draw(_read(path), run_query, window), options.to_folder / f"{path.stem}.png")
    except DrawError as error:
        print(f"vllm_monitoring: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"vllm_monitoring: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
