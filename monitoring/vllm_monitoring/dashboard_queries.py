"""Read the queries of a dashboard's JSON, for drawing and for tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

VARIABLES = {"$namespace": ".*", "$model": ".*", "$pod": ".*"}
"""Values that Grafana substitutes when the user selects All."""


class Query(msgspec.Struct, frozen=True):
    """One query of a panel. ``expr`` has no variables left. ``instant``: evaluate it only at the end of the window."""

    dashboard: str
    panel: str
    ref: str
    expr: str
    instant: bool


def panels(dashboard: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield every panel, also the panels of collapsed rows."""
    for panel in dashboard["panels"]:
        yield panel
        yield from panel.get("panels", [])


def queries(dashboard: dict[str, Any], *, interval_s: float, step_s: float) -> Iterator[Query]:
    """Yield every query of a dashboard's JSON, for a scrape interval and a query step in seconds."""
    for panel in panels(dashboard):
        for target in panel.get("targets", []):
            yield Query(
                dashboard["uid"],
                panel["title"],
                target["refId"],
                substitute_variables(target["expr"], interval_s=interval_s, step_s=step_s),
                target["instant"],
            )


def substitute_variables(expr: str, *, interval_s: float, step_s: float) -> str:
    """Return ``expr`` with its variables replaced as Grafana replaces them.

    $__rate_interval is max(step + scrape interval, 4 scrape intervals)
    (grafana.com/docs/grafana/latest/datasources/prometheus/template-variables).
    """
    rate = max(step_s + interval_s, 4 * interval_s)
    values = {"$__rate_interval": f"{rate:g}s", **VARIABLES}
    for variable, value in values.items():
        expr = expr.replace(variable, value)
    return expr
