"""The SLO dashboard: error budgets, how fast they burn, and the requests that count."""

from __future__ import annotations

from vllm_health import metrics
from vllm_monitoring import panels
from vllm_monitoring.panels import GREEN, OF_MODEL, RED, YELLOW, Column, Panel, Row, lines, rows
from vllm_monitoring.records import OBJECTIVE, RATE_WINDOW, SLO_ERRORS, SLO_REQUESTS, windows
from vllm_monitoring.thresholds import BURN_ALERTS, Objective, Thresholds

UID = "vllm-slo"
_BUDGET = f"on (slo) group_left () (1 - {OBJECTIVE})"


def build(thresholds: Thresholds) -> str:
    """Return the dashboard's JSON."""
    return panels.board(
        UID,
        "vLLM / Objectives",
        "Error budgets and how fast they burn. Objectives stand in monitoring/thresholds.yaml.",
        [
            Row("What is left", [_error_budgets(thresholds)]),
            Row("Objectives", _missed_objectives(thresholds)),
            Row("Traffic", [_requests(thresholds)]),
        ],
        pods=False,
    )


def _error_budgets(thresholds: Thresholds) -> Panel:
    """Return the table of error budgets: the share that is left, and the burn rate over each window."""
    return rows(
        "Budgets",
        "Of 30 days, or as many as Prometheus keeps: more than half is left, and no window burns faster than 1.",
        ("namespace", metrics.MODEL_NAME, "slo"),
        [_budget_left(), *(_burn_rate(thresholds, window) for window in windows(thresholds))],
        about="vllm-overview",
    )


def _budget_left() -> Column:
    """Return the column of the share of the error budget that is left."""
    errors, requests = (
        f"avg_over_time({series}:rate{RATE_WINDOW}{{{OF_MODEL}}}[30d])" for series in (SLO_ERRORS, SLO_REQUESTS)
    )
    return Column(
        "Left",
        f"1 - ({errors} / {requests}) / {_BUDGET}",
        "percentunit",
        ((None, RED), (0.0, YELLOW), (0.5, GREEN)),
        decimals=1,
    )


def _burn_rate(thresholds: Thresholds, window: str) -> Column:
    """Return the column of the burn rate over ``window``, red from the lowest rate that pages."""
    pages = [burn.rate for burn in thresholds.slo.burn if burn.severity == "page"]
    return Column(
        f"Burns, {window}",
        f"{_error_ratio(window)} / {_BUDGET}",
        "short",
        ((None, GREEN), (1.0, YELLOW), (min(pages, default=6.0), RED)),
        decimals=1,
    )


def _missed_objectives(thresholds: Thresholds) -> list[Panel]:
    """Return a panel for each objective: the share of requests that missed it, over each alert's long window."""
    return [
        lines(
            f"{name.replace('_', ' ').capitalize()}: share that missed it",
            f"{_miss(objective)} Below the red line, which is what the objective of {objective.objective:g} allows.",
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


def _miss(objective: Objective) -> str:
    """Return the sentence that says which requests miss ``objective``."""
    if objective.seconds:
        return f"Requests above {objective.seconds:g} s."
    return (
        "Requests that the API server answered with 5xx. Streams that were cut in the middle are not among them: the "
        "answer had begun with 200."
    )


def _requests(thresholds: Thresholds) -> Panel:
    """Return the panel of the requests that objectives count."""
    return lines(
        "Requests that count",
        f"With fewer than {thresholds.slo.least_requests:g} in a window nobody is told, however many of them fail.",
        "reqps",
        {"{{model_name}}, {{slo}}": f"{SLO_REQUESTS}:rate{RATE_WINDOW}{{{OF_MODEL}}}"},
        span=24,
    )


def _error_ratio(window: str, *more: str) -> str:
    """Return the selector of the share of requests that missed an objective over ``window``."""
    return panels.select(f"{SLO_ERRORS}:ratio_rate{window}", OF_MODEL, *more)
