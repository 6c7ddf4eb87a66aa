"""The SLO dashboard: error budgets, burn rates and counted requests."""

from __future__ import annotations

from vllm_health import metrics
from vllm_monitoring import panels
from vllm_monitoring.panels import GREEN, OF_MODEL, RED, YELLOW, Column, Panel, Row, line_panel, table_panel
from vllm_monitoring.records import OBJECTIVE, RATE_WINDOW, SLO_ERRORS, SLO_REQUESTS, windows
from vllm_monitoring.thresholds import BURN_ALERTS, Thresholds

UID = "vllm-slo"
_TITLES = {
    "availability": "5xx responses",
    "time_to_first_token": "TTFT over target",
    "time_per_output_token": "TPOT over target",
}
"""The panel title of each objective."""
_MISSED = {
    "availability": "Share of requests that the API server answered with 5xx. A stream that was cut does not count, "
    "because its response began with 200.",
    "time_to_first_token": "Share of requests with a TTFT above {seconds:g} s.",
    "time_per_output_token": "Share of requests with a TPOT above {seconds:g} s.",
}
"""The content of each objective's panel."""
_BUDGET = f"on (slo) group_left () (1 - {OBJECTIVE})"


def build(thresholds: Thresholds) -> str:
    """Return the dashboard's JSON."""
    return panels.dashboard_json(
        UID,
        "vLLM / Objectives",
        "Error budgets and burn rates. The objectives are in monitoring/thresholds.yaml.",
        [
            Row("Error budgets", [_error_budgets(thresholds)]),
            Row("Objectives", _missed_objectives(thresholds)),
            Row("Traffic", [_requests(thresholds)]),
        ],
        pods=False,
    )


def _error_budgets(thresholds: Thresholds) -> Panel:
    """Return the table of error budgets: the share that is left, and the burn rate over each window."""
    return table_panel(
        "Error budgets by objective",
        "Share of each error budget that is left, and burn rates. A burn rate of 1 uses up the budget in 30 days. "
        "Normal: more than half of the budget is left, and no burn rate is above 1. The budget covers the last 30 "
        "days, or fewer if Prometheus keeps fewer.",
        ("namespace", metrics.MODEL_NAME, "slo"),
        [_budget_left(), *(_burn_rate(thresholds, window) for window in windows(thresholds))],
        linked_dashboard="vllm-overview",
    )


def _budget_left() -> Column:
    """Return the column of the share of the error budget that is left."""
    errors, requests = (
        f"avg_over_time({series}:rate{RATE_WINDOW}{{{OF_MODEL}}}[30d])" for series in (SLO_ERRORS, SLO_REQUESTS)
    )
    return Column(
        "Budget left",
        f"1 - ({errors} / {requests}) / {_BUDGET}",
        "percentunit",
        ((None, RED), (0.0, YELLOW), (0.5, GREEN)),
        decimals=1,
    )


def _burn_rate(thresholds: Thresholds, window: str) -> Column:
    """Return the column of the burn rate over ``window``, red from the lowest rate that pages."""
    pages = [burn.rate for burn in thresholds.slo.burn if burn.severity == "page"]
    return Column(
        f"Burn rate, {window}",
        f"{_error_ratio(window)} / {_BUDGET}",
        "short",
        ((None, GREEN), (1.0, YELLOW), (min(pages, default=6.0), RED)),
        decimals=1,
    )


def _missed_objectives(thresholds: Thresholds) -> list[Panel]:
    """Return a panel for each objective: the share of requests that missed it, over each alert's long window."""
    return [
        line_panel(
            _TITLES[name],
            f"{_MISSED[name].format(seconds=objective.seconds)} Normal: below the red line, which is the error budget "
            f"({100 * objective.budget:.3g} %). Runbook: {BURN_ALERTS[name]}.",
            "percentunit",
            {
                f"{{{{model_name}}}}, {burn.long}": _error_ratio(burn.long, f'slo="{name}"')
                for burn in thresholds.slo.burn
            },
            limit=objective.budget,
            top=1.1 * objective.budget,
            runbook=thresholds.runbook(BURN_ALERTS[name]),
        )
        for name, objective in thresholds.slo.objectives().items()
    ]


def _requests(thresholds: Thresholds) -> Panel:
    """Return the panel of the requests that objectives count."""
    return line_panel(
        "Counted requests",
        "Requests per second that each objective counts, mean over 5 minutes. Answered requests of the prober do "
        "not count. Normal: it follows the load. A burn alert fires only with at least "
        f"{thresholds.slo.least_requests:g} requests in its long window.",
        "reqps",
        {"{{model_name}}, {{slo}}": f"{SLO_REQUESTS}:rate{RATE_WINDOW}{{{OF_MODEL}}}"},
        span=24,
    )


def _error_ratio(window: str, *more: str) -> str:
    """Return the selector of the share of requests that missed an objective over ``window``."""
    return panels.select(f"{SLO_ERRORS}:ratio_rate{window}", OF_MODEL, *more)
