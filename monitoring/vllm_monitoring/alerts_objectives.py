"""Alerts on error budgets that burn too fast."""

from __future__ import annotations

from typing import Final

from vllm_monitoring.alerts import MODEL_TEXT, Alert
from vllm_monitoring.records import SLO_ERRORS, SLO_REQUESTS
from vllm_monitoring.thresholds import BURN_ALERTS, Burn, Objective, Thresholds, seconds

_MISSED: Final = {
    "availability": "of requests got 5xx",
    "time_to_first_token": "of requests had a TTFT over target",
    "time_per_output_token": "of requests had a TPOT over target",
}
"""The end of each summary, by objective."""


def group(thresholds: Thresholds) -> list[Alert]:
    """Return an alert for each objective and each pair of windows."""
    return [
        _budget_burn(slo, objective, burn, thresholds.slo.least_requests)
        for slo, objective in thresholds.slo.objectives().items()
        for burn in thresholds.slo.burn
    ]


def _budget_burn(slo: str, objective: Objective, burn: Burn, least_requests: float) -> Alert:
    """Return the alert on a burn rate above its limit in both windows.

    The short window resolves the alert soon after the errors stop.
    """
    share = burn.rate * objective.budget
    over = (f'{SLO_ERRORS}:ratio_rate{window}{{slo="{slo}"}} > {share:.6g}' for window in (burn.long, burn.short))
    requests = f'{SLO_REQUESTS}:rate{burn.long}{{slo="{slo}"}} * {seconds(burn.long)}'
    within = f" within {objective.seconds:g} s" if objective.seconds else ""
    return Alert(
        BURN_ALERTS[slo],
        burn.severity,
        burn.duration,
        "\nand ".join((*over, f"{requests} >= {least_requests:g}")),
        f"{MODEL_TEXT}: {{{{ $value | humanizePercentage }}}} {_MISSED[slo]} in the last {burn.long}",
        f"The objective is {100 * objective.objective:.4g} %{within}. The error budget burned at "
        f"more than {burn.rate:g} times the allowed rate, over {burn.long} and over {burn.short}.",
        {"slo": slo, "window": burn.long},
    )
