"""Alerts on objectives whose error budget burns too fast."""

from __future__ import annotations

from typing import Final

from vllm_monitoring.alerts import MODEL_NAMED, Alert
from vllm_monitoring.records import SLO_ERRORS, SLO_REQUESTS
from vllm_monitoring.thresholds import BURN_ALERTS, Burn, Objective, Thresholds, seconds

_MISSED: Final = {
    "availability": "requests answered with 5xx",
    "time_to_first_token": "requests whose first token came too late",
    "time_per_output_token": "requests whose tokens came too slowly",
}


def group(thresholds: Thresholds) -> list[Alert]:
    """Return an alert for each objective and each pair of windows."""
    return [
        _budget_burn(slo, objective, burn, thresholds.slo.least_requests)
        for slo, objective in thresholds.slo.objectives().items()
        for burn in thresholds.slo.burn
    ]


def _budget_burn(slo: str, objective: Objective, burn: Burn, least_requests: float) -> Alert:
    """Return the alert on a burn rate above its limit in both windows; the short one ends the alert soon after."""
    share = burn.rate * objective.budget
    over = (f'{SLO_ERRORS}:ratio_rate{window}{{slo="{slo}"}} > {share:.6g}' for window in (burn.long, burn.short))
    requests = f'{SLO_REQUESTS}:rate{burn.long}{{slo="{slo}"}} * {seconds(burn.long)}'
    within = f" within {objective.seconds:g} s" if objective.seconds else ""
    return Alert(
        BURN_ALERTS[slo],
        burn.severity,
        burn.held,
        "\nand ".join((*over, f"{requests} >= {least_requests:g}")),
        f"{MODEL_NAMED}: {{{{ $value | humanizePercentage }}}} {_MISSED[slo]} in {burn.long}",
        f"The objective is {objective.objective:.4g}{within}. For {burn.long} and for {burn.short} its budget "
        f"of errors has been used up {burn.rate:g} times too fast.",
        {"slo": slo, "window": burn.long},
    )
