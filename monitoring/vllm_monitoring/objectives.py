"""The objectives: how much of what may go wrong has gone wrong, and how fast."""

from __future__ import annotations

from vllm_health import metrics
from vllm_monitoring import panels
from vllm_monitoring.panels import GREEN, OF_MODEL, RED, YELLOW, Column, Row, lines, rows
from vllm_monitoring.records import OBJECTIVE, RATE_WINDOW, SLO_ERRORS, SLO_REQUESTS, windows
from vllm_monitoring.thresholds import BURN_ALERTS, Thresholds

UID = "vllm-slo"
_ALLOWED = f"on (slo) group_left () (1 - {OBJECTIVE})"


def build(thresholds: Thresholds) -> str:
    """The dashboard's JSON."""
    longer = [burn.long for burn in thresholds.slo.burn]
    pages = [burn.rate for burn in thresholds.slo.burn if burn.severity == "page"]
    errors, requests = (
        f"avg_over_time({series}:rate{RATE_WINDOW}{{{OF_MODEL}}}[30d])" for series in (SLO_ERRORS, SLO_REQUESTS)
    )

    def ratio(window: str, *more: str) -> str:
        return panels.select(f"{SLO_ERRORS}:ratio_rate{window}", OF_MODEL, *more)

    budgets = rows(
        "Budgets",
        "Of 30 days, or as many as Prometheus keeps: more than half is left, and no window burns faster than 1.",
        ("namespace", metrics.MODEL_NAME, "slo"),
        [
            Column(
                "Left",
                f"1 - ({errors} / {requests}) / {_ALLOWED}",
                "percentunit",
                ((None, RED), (0.0, YELLOW), (0.5, GREEN)),
                decimals=1,
            ),
            *(
                Column(
                    f"Burns, {window}",
                    f"{ratio(window)} / {_ALLOWED}",
                    "short",
                    ((None, GREEN), (1.0, YELLOW), (min(pages, default=6.0), RED)),
                    decimals=1,
                )
                for window in windows(thresholds)
            ),
        ],
        about="vllm-overview",
    )
    words = {
        "availability": "Requests that the API server answered with 5xx. Streams that were cut in the middle are not "
        "among them: the answer had begun with 200.",
        **{
            name: f"Requests above {objective.seconds:g} s."
            for name, objective in thresholds.slo.objectives().items()
            if objective.seconds
        },
    }
    panels_of = [
        lines(
            f"{name.replace('_', ' ').capitalize()}: share that missed it",
            f"{words[name]} Below the red line, which is what the objective of {objective.objective:g} allows.",
            "percentunit",
            {f"{{{{model_name}}}}, {window}": ratio(window, f'slo="{name}"') for window in longer},
            limit=objective.budget,
            top=1.1 * objective.budget,
            runbook=thresholds.runbook(BURN_ALERTS[name]),
        )
        for name, objective in thresholds.slo.objectives().items()
    ]
    counted = lines(
        "Requests that count",
        f"With fewer than {thresholds.slo.least_requests:g} in a window nobody is told, however many of them fail.",
        "reqps",
        {"{{model_name}}, {{slo}}": f"{SLO_REQUESTS}:rate{RATE_WINDOW}{{{OF_MODEL}}}"},
        span=24,
    )
    return panels.board(
        UID,
        "vLLM / Objectives",
        "Error budgets and how fast they burn. Objectives stand in monitoring/thresholds.yaml.",
        [Row("What is left", [budgets]), Row("Objectives", panels_of), Row("Traffic", [counted])],
        pods=False,
    )
