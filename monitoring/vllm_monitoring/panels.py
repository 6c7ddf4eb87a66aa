"""The panel types of the dashboards, built with the grafana-foundation-sdk.

Every panel's description says what the panel shows, then "Normal: …" with the normal values. Where useful, it continues
with "Look when: …" and "Runbook: …".

Queries use the dashboards' variables: $datasource, $namespace, $model and, for single replicas, $pod. Each variable
may be All.
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
from grafana_foundation_sdk.models import common as models
from grafana_foundation_sdk.models import dashboard as dashboard_models
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from vllm_health import metrics

OF_MODEL: Final = f'namespace=~"$namespace", {metrics.MODEL_NAME}=~"$model"'
"""Label matchers for series with a model: the chosen namespaces and models."""
OF_POD: Final = f'{OF_MODEL}, pod=~"$pod"'
"""As OF_MODEL, and the chosen pods."""
OF_TARGET: Final = 'namespace=~"$namespace", pod=~"$pod"'
"""As OF_POD, for series without a model."""
RATE: Final = "$__rate_interval"
TAG: Final = "vllm-launch"
"""Tag of every dashboard. The dashboards link to each other by it."""
TOKENS_PER_SECOND: Final = "suffix: tok/s"

GREEN, YELLOW, RED, BLUE, PURPLE, GREY = "green", "yellow", "red", "blue", "purple", "text"
_GRAFANA: Final = {"light green": "super-light-green", "dark red": "dark-red", "chocolate": "dark-orange", "grey": GREY}
STATES: Final = {name: _GRAFANA.get(color, color) for name, color in metrics.COLORS.items()}
"""Grafana's colour name for each of the prober's states. Panels use a state's index in this mapping as its number."""

Panel = Any
"""The SDK has no common base for its panel builders."""
Steps = Sequence[tuple[float | None, str]]
"""Colours by lower bound. The first lower bound is None."""


class Column(msgspec.Struct, frozen=True):
    """A table column: a query with one value for each row. ``states``: the value is an index in STATES."""

    name: str
    expr: str
    unit: str = "short"
    steps: Steps = ()
    decimals: int = 0
    states: bool = False


def select(metric: str, labels: str, *more: str) -> str:
    """Return the selector ``metric{labels, more…}``."""
    return f"{metric}{{{', '.join((labels, *more))}}}"


def state_code(labels: str, by: str) -> str:
    """Return the query for each replica's state as its index in STATES.

    It is a number because Grafana can map a number to a text and a colour, but not a label.
    """
    series = metrics.PREFIX + "state"
    selectors = [select(series, labels, f'state="{name}"') for name in STATES]
    terms = [f"{index} * {selector}" for index, selector in enumerate(selectors)]
    return f"sum by ({by}) ({' or '.join(terms)})"


def quantile(share: float, buckets: str) -> str:
    """Return the query for a quantile. ``buckets`` is a query whose result has the label le."""
    return f"histogram_quantile({share:g}, {buckets})"


def stat_panel(
    title: str, description: str, expr: str, unit: str = "short", *, steps: Steps = (), decimals: int = 0
) -> Panel:
    """Return a panel with one number, the current value."""
    return (
        stat.Panel()
        .title(title)
        .description(description)
        .unit(unit)
        .decimals(decimals)
        .with_target(_query(expr, title, instant=True))
        .thresholds(_thresholds(steps or ((None, GREY),)))
        .graph_mode(models.BigValueGraphMode.NONE)
        .no_value("none")
        .span(4)
        .height(4)
    )


def line_panel(
    title: str,
    description: str,
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
    """Return a panel with series over time. ``queries``: expressions by legend.

    ``limit``: value of a dashed red line, above which there is a problem. ``top``: smallest upper end of the y axis, so
    that small values look small. ``counts``: the values are whole numbers. ``runbook``: URL that the panel links to.
    """
    panel = (
        timeseries.Panel()
        .title(title)
        .description(description)
        .unit(unit)
        .min(0)
        .fill_opacity(40 if stacked else 8)
        .line_width(0 if stacked else 1)
        .show_points(models.VisibilityMode.NEVER)
        .legend(common.VizLegendOptions().show_legend(True).placement(models.LegendPlacement.BOTTOM))  # noqa: FBT003
        .tooltip(common.VizTooltipOptions().mode(models.TooltipDisplayMode.MULTI).sort(models.SortOrder.DESCENDING))
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
        panel = panel.stacking(common.StackingConfig().mode(models.StackingMode.NORMAL).group("A"))
    if limit is not None:
        panel = panel.thresholds(_thresholds(((None, "transparent"), (limit, RED)))).thresholds_style(
            common.GraphThresholdsStyleConfig().mode(models.GraphThresholdsStyleMode.DASHED)
        )
    return _with_runbook(panel, runbook)


def heatmap_panel(
    title: str, description: str, unit: str, buckets: str, *, runbook: str | None = None, span: int = 8
) -> Panel:
    """Return a heatmap of a histogram over time. ``buckets``: query for the observations in each bucket.

    Unlike a percentile, it shows whether there are two groups of values.
    """
    panel = (
        heatmap.Panel()
        .title(title)
        .description(description)
        .with_target(_query(buckets, "{{le}}", table_or_heatmap=PromQueryFormat.HEATMAP))
        .y_axis(heatmap.YAxisConfig().unit(unit))
        .color(heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Spectral").steps(64))
        .span(span)
        .height(8)
    )
    return _with_runbook(panel, runbook)


def timeline_panel(
    title: str, description: str, expr: str, legend: str, *, runbook: str | None = None, span: int = 24
) -> Panel:
    """Return a panel with states over time. The values of ``expr`` are indexes in STATES."""
    panel = (
        statetimeline.Panel()
        .title(title)
        .description(description)
        .with_target(_query(expr, legend))
        .mappings(_state_mappings())
        .show_value(models.VisibilityMode.NEVER)
        .legend(common.VizLegendOptions().show_legend(True).placement(models.LegendPlacement.BOTTOM))  # noqa: FBT003
        .row_height(0.8)
        .span(span)
        .height(8)
    )
    return _with_runbook(panel, runbook)


def table_panel(
    title: str,
    description: str,
    by: Sequence[str],
    columns: Sequence[Column],
    *,
    linked_dashboard: str,
    height: int = 8,
) -> Panel:
    """Return a table with a row for each value of the labels ``by``. Each row links to ``linked_dashboard``."""
    panel = table.Panel().title(title).description(description).span(24).height(height).no_value("")
    titles = {label: label.removesuffix("_name").capitalize() for label in by}
    names = dict(titles)
    for ref, column in zip(_REFS, columns, strict=False):
        names[f"Value #{ref}"] = column.name
        query = _query(column.expr, "", ref, instant=True, table_or_heatmap=PromQueryFormat.TABLE)
        panel = panel.with_target(query)
        properties = [_property("unit", column.unit), _property("decimals", column.decimals)]
        if column.states:
            properties.append(_property("mappings", [mapping.to_json() for mapping in _state_mappings()]))
        if column.steps or column.states:
            steps = {"mode": "absolute", "steps": [{"value": value, "color": color} for value, color in column.steps]}
            cell_type = "color-text" if column.steps else "color-background"
            properties += [_property("thresholds", steps)] if column.steps else []
            properties.append(_property("custom.cellOptions", {"type": cell_type}))
        panel = panel.override_by_name(column.name, properties)
    variables = {"namespace": "namespace", metrics.MODEL_NAME: "model", "pod": "pod"}
    parameters = "&".join(
        f"var-{variables[label]}=${{__data.fields.{titles[label]}}}" for label in by if label in variables
    )
    link = {
        "title": "Show details",
        "url": f"/d/{linked_dashboard}?{parameters}&${{__url_time_range}}&var-datasource=${{datasource}}",
    }
    return (
        panel.override_by_name(titles[by[-1]], [_property("links", [link])])
        .with_transformation(dashboard_models.DataTransformerConfig(id_val="merge", options={}))
        .with_transformation(
            dashboard_models.DataTransformerConfig(
                id_val="organize", options={"excludeByName": {"Time": True}, "renameByName": names, "indexByName": {}}
            )
        )
    )


class Row(msgspec.Struct, frozen=True):
    """A row of a dashboard: a title and the panels below it. ``collapsed``: the row is closed at first."""

    title: str
    panels: Sequence[Panel]
    collapsed: bool = False


def dashboard_json(uid: str, title: str, description: str, rows: Sequence[Row], *, pods: bool) -> str:
    """Return the JSON of a dashboard. ``pods``: it has the variable $pod."""
    built = (
        dashboard.Dashboard(title)
        .uid(uid)
        .description(description)
        .tags([TAG])
        .readonly()
        .refresh("30s")
        .time("now-3h", "now")
        .tooltip(dashboard_models.DashboardCursorSync.CROSSHAIR)
        .link(
            dashboard.DashboardLink("vLLM")
            .type(dashboard_models.DashboardLinkType.DASHBOARDS)
            .tags([TAG])
            .keep_time(True)  # noqa: FBT003
            .include_vars(True)  # noqa: FBT003
        )
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
    )
    ready = metrics.PREFIX + "ready"
    variables = [
        ("namespace", "namespace", ready),
        (metrics.MODEL_NAME, "model", f'{ready}{{namespace=~"$namespace"}}'),
    ]
    if pods:
        variables.append(("pod", "pod", f"{ready}{{{OF_MODEL}}}"))
    for label, name, series in variables:
        built = built.with_variable(
            dashboard.QueryVariable(name)
            .label(name.capitalize())
            .query(f"label_values({series}, {label})")
            .datasource(_SOURCE)
            .refresh(dashboard_models.VariableRefresh.ON_TIME_RANGE_CHANGED)
            .sort(dashboard_models.VariableSort.ALPHABETICAL_ASC)
            .include_all(True)  # noqa: FBT003
            .all_value(".*")
            .multi(True)  # noqa: FBT003
            .current(dashboard_models.VariableOption(text="All", value="$__all"))
        )
    ids = itertools.count(1)
    for row in rows:
        built_row = dashboard.Row(row.title)
        panels = [panel.id(next(ids)).datasource(_SOURCE) for panel in row.panels]
        if row.collapsed:
            for panel in panels:
                built_row = built_row.with_panel(panel)
            built = built.with_row(built_row.collapsed(True))  # noqa: FBT003
        else:
            built = built.with_row(built_row)
            for panel in panels:
                built = built.with_panel(panel)
    return JSONEncoder(sort_keys=True, indent=1).encode(built.build()) + "\n"


_SOURCE: Final = models.DataSourceRef(type_val="prometheus", uid="${datasource}")


_REFS: Final = string.ascii_uppercase
"""Names of a panel's queries. Table transformations refer to them."""


def _query(
    expr: str, legend: str, ref: str = "A", *, instant: bool = False, table_or_heatmap: PromQueryFormat | None = None
) -> prometheus.Dataquery:
    """Return the query ``expr`` of a panel. ``ref``: its name."""
    query = prometheus.Dataquery().ref_id(ref).expr(expr).legend_format(legend).datasource(_SOURCE)
    query = query.instant() if instant else query.range()
    return query.format(table_or_heatmap) if table_or_heatmap else query


def _thresholds(steps: Steps) -> dashboard.ThresholdsConfig:
    """Return the colours ``steps`` as Grafana's thresholds."""
    return (
        dashboard.ThresholdsConfig()
        .mode(dashboard_models.ThresholdsMode.ABSOLUTE)
        .steps([dashboard_models.Threshold(value=value, color=color) for value, color in steps])
    )


def _state_mappings() -> list[dashboard_models.ValueMapping]:
    """Return the mappings from a state's index to its name and colour."""
    options = {
        str(index): dashboard_models.ValueMappingResult(text=name.replace("_", " "), color=color, index=index)
        for index, (name, color) in enumerate(STATES.items())
    }
    return [dashboard_models.ValueMap(options=options)]


def _property(name: str, value: object) -> dashboard_models.DynamicConfigValue:
    """Return a property of a table column."""
    return dashboard_models.DynamicConfigValue(id_val=name, value=value)


def _with_runbook(panel: Panel, runbook: str | None) -> Panel:
    """Return the panel with a link to its runbook, or unchanged if ``runbook`` is None or empty."""
    if not runbook:
        return panel
    return panel.links([dashboard.DashboardLink(runbook.rsplit("/", 1)[-1].removesuffix(".md")).url(runbook)])
