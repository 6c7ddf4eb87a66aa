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
_MET: Final = {
    "availability": "get no 5xx",
    "time_to_first_token": "have a TTFT of at most {seconds:g} s",
    "time_per_output_token": "have a TPOT of at most {seconds:g} s",
}
"""The requirement of each objective, as the end of a sentence about requests."""


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
    return Alert(
        BURN_ALERTS[slo],
        burn.severity,
        burn.duration,
        "\nand ".join((*over, f"{requests} >= {least_requests:g}")),
        f"{MODEL_TEXT}: {{{{ $value | humanizePercentage }}}} {_MISSED[slo]} in the last {burn.long}",
        f"The objective is that {100 * objective.objective:.4g} % of requests "
        f"{_MET[slo].format(seconds=objective.seconds)}. The burn rate is above {burn.rate:g} over the last "
        f"{burn.long} and over the last {burn.short}. A burn rate of 1 uses up the error budget in 30 days.",
        {"slo": slo, "window": burn.long},
    )
