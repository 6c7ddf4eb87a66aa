"""The kinds of panels that our dashboards are made of, over the grafana-foundation-sdk.

Every panel says in its description what good looks like. Queries name the dashboards' variables: $datasource,
$namespace, $model and, where single replicas are shown, $pod; each of them may be All.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
from grafana_foundation_sdk.builders import (
    common,
    dashboard,
    heatmap,
    prometheus,
    stat,
    statetimeline,
    table,
    timeseries,
)
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as shown
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from vllm_health import metrics

OF_MODEL: Final = f'namespace=~"$namespace", {metrics.MODEL_NAME}=~"$model"'
"""Selects what the variables choose, of series by model."""
OF_POD: Final = f'{OF_MODEL}, pod=~"$pod"'
OF_TARGET: Final = 'namespace=~"$namespace", pod=~"$pod"'
"""As OF_POD, of series that name no model."""
RATE: Final = "$__rate_interval"
TAG: Final = "vllm-launch"
TOKENS_PER_SECOND: Final = "suffix: tok/s"

GREEN, YELLOW, RED, BLUE, PURPLE, GREY = "green", "yellow", "red", "blue", "purple", "text"
_GRAFANA: Final = {"light green": "super-light-green", "dark red": "dark-red", "grey": GREY}
STATES: Final = {name: _GRAFANA.get(color, color) for name, color in metrics.COLORS.items()}
"""Grafana's name for the colour of each of the prober's states, which panels show as its place in here."""

Panel = Any
"""The SDK has no common base for its panel builders."""
Steps = Sequence[tuple[float | None, str]]
"""Colours from a value on, the first from None on."""


class Column(msgspec.Struct, frozen=True):
    """Of a table: a query that gives one value for each row; ``states``: the place of one in STATES."""

    name: str
    expr: str
    unit: str = "short"
    steps: Steps = ()
    decimals: int = 0
    states: bool = False


def select(metric: str, labels: str, *more: str) -> str:
    """``metric{labels, more…}``."""
    return f"{metric}{{{', '.join((labels, *more))}}}"


def state_code(labels: str, by: str) -> str:
    """The state of each replica as its place in STATES: Grafana maps numbers to words, and a label not to a colour."""
    series = metrics.PREFIX + "state"
    selected = {name: select(series, labels, f'state="{name}"') for name in STATES}
    places = [f"{place} * {one}" for place, one in enumerate(selected.values())]
    return f"sum by ({by}) ({' or '.join(places)})"


def quantile(share: float, buckets: str) -> str:
    """``buckets`` is a vector with the label le."""
    return f"histogram_quantile({share:g}, {buckets})"


def stat_panel(title: str, good: str, expr: str, unit: str = "short", *, steps: Steps = (), decimals: int = 0) -> Panel:
    """One number, now."""
    return (
        stat.Panel()
        .title(title)
        .description(good)
        .unit(unit)
        .decimals(decimals)
        .with_target(_query(expr, title, instant=True))
        .thresholds(_thresholds(steps or ((None, GREY),)))
        .graph_mode(shown.BigValueGraphMode.NONE)
        .no_value("none")
        .span(4)
        .height(4)
    )


def lines(
    title: str,
    good: str,
    unit: str,
    queries: Mapping[str, str],
    *,
    stacked: bool = False,
    limit: float | None = None,
    top: float | None = None,
    counts: bool = False,
    runbook: str | None = None,
    span: int = 8,
) -> Panel:
    """Series over time from queries by their legends.

    ``limit`` is where trouble begins, a dashed red line; the axis reaches at least to ``top``, so that a line at
    nothing looks like nothing; ``counts`` are whole numbers.
    """
    panel = (
        timeseries.Panel()
        .title(title)
        .description(good)
        .unit(unit)
        .min(0)
        .fill_opacity(40 if stacked else 8)
        .line_width(0 if stacked else 1)
        .show_points(shown.VisibilityMode.NEVER)
        .legend(common.VizLegendOptions().show_legend(True).placement(shown.LegendPlacement.BOTTOM))  # noqa: FBT003
        .tooltip(common.VizTooltipOptions().mode(shown.TooltipDisplayMode.MULTI).sort(shown.SortOrder.DESCENDING))
        .span(span)
        .height(8)
    )
    for ref, (legend, expr) in zip(_REFS, queries.items(), strict=False):
        panel = panel.with_target(_query(expr, legend, ref))
    if top is not None:
        panel = panel.axis_soft_max(top)
    if counts:
        panel = panel.decimals(0)
    if stacked:
        panel = panel.stacking(common.StackingConfig().mode(shown.StackingMode.NORMAL).group("A"))
    if limit is not None:
        panel = panel.thresholds(_thresholds(((None, "transparent"), (limit, RED)))).thresholds_style(
            common.GraphThresholdsStyleConfig().mode(shown.GraphThresholdsStyleMode.DASHED)
        )
    return _linked(panel, runbook)


def heat(title: str, good: str, unit: str, buckets: str, *, runbook: str | None = None, span: int = 8) -> Panel:
    """How a histogram spreads over time: it shows two groups where a percentile shows a number that is neither."""
    panel = (
        heatmap.Panel()
        .title(title)
        .description(good)
        .with_target(_query(buckets, "{{le}}", table_or_heatmap=PromQueryFormat.HEATMAP))
        .y_axis(heatmap.YAxisConfig().unit(unit))
        .color(heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Spectral").steps(64))
        .span(span)
        .height(8)
    )
    return _linked(panel, runbook)


def timeline(title: str, good: str, expr: str, legend: str, *, runbook: str | None = None, span: int = 24) -> Panel:
    """States over time; ``expr`` gives their places in STATES."""
    panel = (
        statetimeline.Panel()
        .title(title)
        .description(good)
        .with_target(_query(expr, legend))
        .mappings(_states())
        .show_value(shown.VisibilityMode.NEVER)
        .legend(common.VizLegendOptions().show_legend(True).placement(shown.LegendPlacement.BOTTOM))  # noqa: FBT003
        .row_height(0.8)
        .span(span)
        .height(8)
    )
    return _linked(panel, runbook)


def rows(title: str, good: str, by: Sequence[str], columns: Sequence[Column], *, about: str, height: int = 8) -> Panel:
    """A table with a row for each value of the labels ``by`` and a link from it to the dashboard ``about``."""
    panel = table.Panel().title(title).description(good).span(24).height(height).no_value("")
    titles = {label: label.removesuffix("_name").capitalize() for label in by}
    names = dict(titles)
    for ref, column in zip(_REFS, columns, strict=False):
        names[f"Value #{ref}"] = column.name
        query = _query(column.expr, "", ref, instant=True, table_or_heatmap=PromQueryFormat.TABLE)
        panel = panel.with_target(query)
        properties = [_property("unit", column.unit), _property("decimals", column.decimals)]
        if column.states:
            properties.append(_property("mappings", [mapping.to_json() for mapping in _states()]))
        if column.steps or column.states:
            steps = {"mode": "absolute", "steps": [{"value": value, "color": color} for value, color in column.steps]}
            colored = "color-text" if column.steps else "color-background"
            properties += [_property("thresholds", steps)] if column.steps else []
            properties.append(_property("custom.cellOptions", {"type": colored}))
        panel = panel.override_by_name(column.name, properties)
    variables = {"namespace": "namespace", metrics.MODEL_NAME: "model", "pod": "pod"}
    chosen = "&".join(f"var-{variables[it]}=${{__data.fields.{titles[it]}}}" for it in by if it in variables)
    link = {"title": "Look at it", "url": f"/d/{about}?{chosen}&${{__url_time_range}}&var-datasource=${{datasource}}"}
    return (
        panel.override_by_name(titles[by[-1]], [_property("links", [link])])
        .with_transformation(model.DataTransformerConfig(id_val="merge", options={}))
        .with_transformation(
            model.DataTransformerConfig(
                id_val="organize", options={"excludeByName": {"Time": True}, "renameByName": names, "indexByName": {}}
            )
        )
    )


class Row(msgspec.Struct, frozen=True):
    """Panels below a title; ``folded`` until somebody opens it."""

    title: str
    panels: Sequence[Panel]
    folded: bool = False


def board(uid: str, title: str, purpose: str, rows_of_it: Sequence[Row], *, pods: bool) -> str:
    """The JSON of a dashboard."""
    built = (
        dashboard.Dashboard(title)
        .uid(uid)
        .description(purpose)
        .tags([TAG])
        .readonly()
        .refresh("30s")
        .time("now-3h", "now")
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
        .link(
            dashboard.DashboardLink("vLLM")
            .type(model.DashboardLinkType.DASHBOARDS)
            .tags([TAG])
            .keep_time(True)  # noqa: FBT003
            .include_vars(True)  # noqa: FBT003
        )
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
    )
    ready = metrics.PREFIX + "ready"
    chosen = [("namespace", "namespace", ready), (metrics.MODEL_NAME, "model", f'{ready}{{namespace=~"$namespace"}}')]
    if pods:
        chosen.append(("pod", "pod", f"{ready}{{{OF_MODEL}}}"))
    for label, name, series in chosen:
        built = built.with_variable(
            dashboard.QueryVariable(name)
            .label(name.capitalize())
            .query(f"label_values({series}, {label})")
            .datasource(_SOURCE)
            .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
            .sort(model.VariableSort.ALPHABETICAL_ASC)
            .include_all(True)  # noqa: FBT003
            .all_value(".*")
            .multi(True)  # noqa: FBT003
            .current(model.VariableOption(text="All", value="$__all"))
        )
    numbers = itertools.count(1)
    for one in rows_of_it:
        row = dashboard.Row(one.title)
        panels = [panel.id(next(numbers)).datasource(_SOURCE) for panel in one.panels]
        if one.folded:
            for panel in panels:
                row = row.with_panel(panel)
            built = built.with_row(row.collapsed(True))  # noqa: FBT003
        else:
            built = built.with_row(row)
            for panel in panels:
                built = built.with_panel(panel)
    return JSONEncoder(sort_keys=True, indent=1).encode(built.build()) + "\n"


_SOURCE: Final = shown.DataSourceRef(type_val="prometheus", uid="${datasource}")


_REFS: Final = string.ascii_uppercase
"""Names of a panel's queries, by which transformations know them."""


def _query(
    expr: str, legend: str, ref: str = "A", *, instant: bool = False, table_or_heatmap: PromQueryFormat | None = None
) -> prometheus.Dataquery:
    query = prometheus.Dataquery().ref_id(ref).expr(expr).legend_format(legend).datasource(_SOURCE)
    query = query.instant() if instant else query.range()
    return query.format(table_or_heatmap) if table_or_heatmap else query


def _thresholds(steps: Steps) -> dashboard.ThresholdsConfig:
    return (
        dashboard.ThresholdsConfig()
        .mode(model.ThresholdsMode.ABSOLUTE)
        .steps([model.Threshold(value=value, color=color) for value, color in steps])
    )


def _states() -> list[model.ValueMapping]:
    places = {
        str(place): model.ValueMappingResult(text=name.replace("_", " "), color=color, index=place)
        for place, (name, color) in enumerate(STATES.items())
    }
    return [model.ValueMap(options=places)]


def _property(name: str, value: object) -> model.DynamicConfigValue:
    return model.DynamicConfigValue(id_val=name, value=value)


def _linked(panel: Panel, runbook: str | None) -> Panel:
    """A link from the panel's corner to what to do."""
    if runbook is None:
        return panel
    return panel.links([dashboard.DashboardLink(runbook.rsplit("/", 1)[-1].removesuffix(".md")).url(runbook)])
