"""Alerts on starts, restarts and drains."""

from __future__ import annotations

from vllm_health import metrics
from vllm_monitoring.alerts import OURS, POD_NAMED, Alert, Limits, in_state, limited
from vllm_monitoring.records import POD


def group(limits: Limits) -> list[Alert]:
    """Return the group's alerts, in the order of the rules file."""
    return [_restart_loop(limits), _startup_slow(limits), _startup_stuck(limits), _drain_late(limits)]


def _restart_loop(limits: Limits) -> Alert:
    """Return the alert on a replica that restarts too often."""
    loop = limits["VLLMRestartLoop"]
    began = f"changes({OURS}process_start_time_seconds[{loop.within}])"
    named = f"group by ({POD}) (last_over_time({OURS}live[{loop.within}]))"
    # No scrape sees a container that ends within seconds, but the kubelet counts it.
    kubelets = f'max by (namespace, pod) (increase({metrics.KUBE_RESTARTS}{{container="vllm"}}[{loop.within}]))'
    return limited(
        limits,
        "VLLMRestartLoop",
        f"{named} * on (namespace, pod) group_left () max by (namespace, pod) ({began}) >= {loop.restarts:g}\n"
        f"or on (namespace, pod) {kubelets} >= {loop.restarts:g}",
        f"{{{{ $labels.pod }}}} in {{{{ $labels.namespace }}}} has started anew {{{{ $value | humanize }}}} times in "
        f"{loop.within}",
        "Each time it has ended by itself or was ended. Its last words are in the termination message.",
    )


def _startup_slow(limits: Limits) -> Alert:
    """Return the alert on a start that takes longer than its limit."""
    return limited(
        limits,
        "VLLMStartupSlow",
        f"max by ({POD}) ({OURS}start_seconds) > {limits['VLLMStartupSlow'].seconds:g}\n"
        f"and on ({POD}) {in_state('starting')} == 1",
        f"{POD_NAMED} has been starting for {{{{ $value | humanizeDuration }}}}",
        "It moves, else it would be ended, but no start should take so long.",
    )


def _startup_stuck(limits: Limits) -> Alert:
    """Return the alert on a start that has made no progress for a share of the time that it may stall."""
    share = limits["VLLMStartupStuck"].share
    return limited(
        limits,
        "VLLMStartupStuck",
        f"max by ({POD}) ({OURS}last_progress_seconds) > on ({POD}) "
        f'{share:g} * max by ({POD}) ({OURS}limit_seconds{{limit="start_stall"}})\n'
        f"and on ({POD}) {in_state('starting')} == 1",
        f"{POD_NAMED} has not moved in its start for {{{{ $value | humanizeDuration }}}}",
        f"After {100 * share:g} % of the time that a start may stand still. It is ended at 100 %.",
    )


def _drain_late(limits: Limits) -> Alert:
    """Return the alert on a drain that has used a share of its time while streams are still open."""
    share = limits["VLLMDrainLate"].share
    return limited(
        limits,
        "VLLMDrainLate",
        f"max by ({POD}) ({OURS}state_seconds) > on ({POD}) "
        f'{share:g} * max by ({POD}) ({OURS}limit_seconds{{limit="drain"}})\nand on ({POD}) {OURS}drain_streams > 0',
        f"{POD_NAMED} will cut streams: it drains since {{{{ $value | humanizeDuration }}}}",
        f"{100 * share:g} % of the drain's time is over and streams still run; what is left at its end is cut.",
    )
