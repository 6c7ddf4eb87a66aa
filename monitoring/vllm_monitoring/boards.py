"""Reading dashboards back: whoever draws or tests them asks here what they ask Prometheus."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

VARIABLES = {"$namespace": ".*", "$model": ".*", "$pod": ".*"}
"""As Grafana fills them in when everything is chosen."""


class Query(msgspec.Struct, frozen=True):
    """One question of a panel; ``expr`` has no variables left. ``instant``: of the last moment alone."""

    board: str
    panel: str
    ref: str
    expr: str
    instant: bool


def panels(board: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every panel, also those of rows that are folded."""
    for panel in board["panels"]:
        yield panel
        yield from panel.get("panels", [])


def queries(board: dict[str, Any], *, interval_s: float, step_s: float) -> Iterator[Query]:
    """Every query of a dashboard's JSON, for series scraped each ``interval_s`` and shown each ``step_s``."""
    for panel in panels(board):
        for target in panel.get("targets", []):
            yield Query(
                board["uid"],
                panel["title"],
                target["refId"],
                filled(target["expr"], interval_s=interval_s, step_s=step_s),
                target["instant"],
            )


def filled(expr: str, *, interval_s: float, step_s: float) -> str:
    """``expr`` with its variables as Grafana fills them in.

    $__rate_interval is max(step + scrape interval, 4 scrape intervals)
    (grafana.com/docs/grafana/latest/datasources/prometheus/template-variables).
    """
    rate = max(step_s + interval_s, 4 * interval_s)
    filled_in = {"$__rate_interval": f"{rate:g}s", **VARIABLES}
    for variable, value in filled_in.items():
        expr = expr.replace(variable, value)
    return expr
