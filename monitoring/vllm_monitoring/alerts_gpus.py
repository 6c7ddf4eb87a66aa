"""Alerts on GPUs, from NVML as the prober reads it: DCGM's gauge of the last Xid error does not say when it was."""

from __future__ import annotations

from typing import Final

from vllm_monitoring.alerts import GPU_NAMED, OURS, POD_NAMED, Alert, Limits, limited
from vllm_monitoring.records import POD

_GPU: Final = f"{POD}, gpu"
_FAULTS: Final = f"{OURS}gpu_faults"


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
    return limited(
        limits,
        "GPUXidFatal",
        f'max by ({_GPU}, kind) ({_FAULTS}{{kind=~"xid .+", fatal="true"}}) == 1',
        f"{GPU_NAMED} has met {{{{ $labels.kind }}}}",
        "It serves nobody until it is reset; its replica is out of rotation.",
    )


def _gpu_lost(limits: Limits) -> Alert:
    """Return the alert on a GPU that NVML cannot reach."""
    return limited(
        limits,
        "GPULost",
        f'max by ({_GPU}) ({_FAULTS}{{kind="lost"}}) == 1',
        f"{GPU_NAMED} cannot be reached",
        "It has fallen off the bus or wants a reset; its replica is out of rotation.",
    )


def _gpu_row_remap_failure(limits: Limits) -> Alert:
    """Return the alert on a GPU that could not remap a broken row of its memory."""
    return limited(
        limits,
        "GPURowRemapFailure",
        f'max by ({_GPU}) ({_FAULTS}{{kind="row remap failure"}}) == 1',
        f"{GPU_NAMED} has a broken row of memory and no spare one",
        "It still computes, but the next error there is a fatal one: have it replaced.",
    )


def _gpu_ecc_errors(limits: Limits) -> Alert:
    """Return the alert on a GPU with new uncorrectable ECC errors."""
    within, errors = limits["GPUECCErrors"].within, f"{OURS}gpu_ecc_uncorrected_errors"
    return limited(
        limits,
        "GPUECCErrors",
        f"max by ({_GPU}) ({errors} - min_over_time({errors}[{within}])) > 0",  # delta would extrapolate
        f"{GPU_NAMED} has met {{{{ $value }}}} uncorrectable memory errors in {within}",
        "Each ends the process that met it; several mean that the GPU is going bad.",
    )


def _gpu_throttled(limits: Limits) -> Alert:
    """Return the alert on a GPU that heat or its power supply slows down for a share of the time."""
    slow = limits["GPUThrottled"]
    return limited(
        limits,
        "GPUThrottled",
        f"max by ({_GPU}, reason) (avg_over_time({OURS}gpu_throttled[{slow.within}])) > {slow.share:g}",
        f"{GPU_NAMED} is slowed down {{{{ $value | humanizePercentage }}}} of the time: {{{{ $labels.reason }}}}",
        "By heat or a weak power supply, not by its own power cap, which is normal; all GPUs of its replica wait for "
        "it.",
    )


def _gpu_unwatched(limits: Limits) -> Alert:
    """Return the alert on a replica whose GPUs the prober cannot read."""
    return limited(
        limits,
        "GPUUnwatched",
        f"max by ({POD}) ({OURS}nvml_up) == 0 and max by ({POD}) ({OURS}planned_gpus) > 0",
        f"{POD_NAMED} sees nothing of its GPUs",
        "NVML does not answer the prober. The engine may work on, but a fault of a GPU would not be seen.",
    )
