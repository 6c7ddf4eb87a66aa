"""Alerts on GPUs, from the prober's NVML metrics.

DCGM's gauge of the last Xid error is not used, because it does not say when the error was.
"""

from __future__ import annotations

from typing import Final

from vllm_monitoring.alerts import GPU_TEXT, POD_TEXT, PREFIX, Alert, Limits, alert_with_limit
from vllm_monitoring.records import POD

_GPU: Final = f"{POD}, gpu"
_FAULTS: Final = f"{PREFIX}gpu_faults"


def group(limits: Limits) -> list[Alert]:
    """Return the group's alerts, in the order of the rules file."""
    return [
        _gpu_xid_fatal(limits),
        _gpu_lost(limits),
        _gpu_row_remap_failure(limits),
        _gpu_ecc_errors(limits),
        _gpu_throttled(limits),
        _gpu_unwatched(limits),
    ]


def _gpu_xid_fatal(limits: Limits) -> Alert:
    """Return the alert on a GPU with a fatal Xid error."""
    return alert_with_limit(
        limits,
        "GPUXidFatal",
        f'max by ({_GPU}, kind) ({_FAULTS}{{kind=~"xid .+", fatal="true"}}) == 1',
        f"{GPU_TEXT} has the fatal error {{{{ $labels.kind }}}}",
        "The GPU cannot be used until it is reset. The replica is not ready.",
    )


def _gpu_lost(limits: Limits) -> Alert:
    """Return the alert on a GPU that NVML cannot reach."""
    return alert_with_limit(
        limits,
        "GPULost",
        f'max by ({_GPU}) ({_FAULTS}{{kind="lost"}}) == 1',
        f"{GPU_TEXT} is lost",
        "NVML cannot reach the GPU: it has fallen off the bus or needs a reset. The replica is not ready.",
    )


def _gpu_row_remap_failure(limits: Limits) -> Alert:
    """Return the alert on a GPU that could not remap a broken memory row."""
    return alert_with_limit(
        limits,
        "GPURowRemapFailure",
        f'max by ({_GPU}) ({_FAULTS}{{kind="row remap failure"}}) == 1',
        f"{GPU_TEXT} has a broken memory row and no spare row",
        "The GPU still works, but the next error in this row is fatal. Have the GPU replaced.",
    )


def _gpu_ecc_errors(limits: Limits) -> Alert:
    """Return the alert on a GPU with new uncorrectable ECC errors."""
    within, errors = limits["GPUECCErrors"].within, f"{PREFIX}gpu_ecc_uncorrected_errors"
    return alert_with_limit(
        limits,
        "GPUECCErrors",
        f"max by ({_GPU}) ({errors} - min_over_time({errors}[{within}])) > 0",  # delta() would extrapolate.
        f"{GPU_TEXT} had {{{{ $value }}}} uncorrectable ECC errors in {within}",
        "Each error kills the process that used the memory. Several errors mean that the GPU is failing.",
    )


def _gpu_throttled(limits: Limits) -> Alert:
    """Return the alert on a GPU that heat or its power supply throttles for a share of the time."""
    limit = limits["GPUThrottled"]
    return alert_with_limit(
        limits,
        "GPUThrottled",
        f"max by ({_GPU}, reason) (avg_over_time({PREFIX}gpu_throttled[{limit.within}])) > {limit.share:g}",
        f"{GPU_TEXT} is throttled {{{{ $value | humanizePercentage }}}} of the time: {{{{ $labels.reason }}}}",
        "The cause is heat or the power supply. The GPU's own power cap is normal and does not count. All GPUs of the "
        "replica wait for this one.",
    )


def _gpu_unwatched(limits: Limits) -> Alert:
    """Return the alert on a replica whose GPUs the prober cannot monitor."""
    return alert_with_limit(
        limits,
        "GPUUnwatched",
        f"max by ({POD}) ({PREFIX}nvml_up) == 0 and max by ({POD}) ({PREFIX}planned_gpus) > 0",
        f"{POD_TEXT}: the prober cannot monitor the GPUs",
        "NVML does not answer the prober. The engine may still work, but the prober would miss a GPU fault.",
    )
