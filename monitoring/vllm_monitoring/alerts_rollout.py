"""Alerts on start-up, restarts and drains."""

from __future__ import annotations

from vllm_health import metrics
from vllm_monitoring.alerts import POD_TEXT, PREFIX, Alert, Limits, alert_with_limit, state_selector
from vllm_monitoring.records import POD


def group(limits: Limits) -> list[Alert]:
    """Return the group's alerts, in the order of the rules file."""
    return [_restart_loop(limits), _startup_slow(limits), _startup_stuck(limits), _drain_late(limits)]


def _restart_loop(limits: Limits) -> Alert:
    """Return the alert on a replica that restarts too often."""
    loop = limits["VLLMRestartLoop"]
    restarts = f"changes({PREFIX}process_start_time_seconds[{loop.within}])"
    models = f"group by ({POD}) (last_over_time({PREFIX}live[{loop.within}]))"
    # Prometheus cannot scrape a container that exits within seconds. The kubelet counts its restarts.
    kubelet_restarts = f'max by (namespace, pod) (increase({metrics.KUBE_RESTARTS}{{container="vllm"}}[{loop.within}]))'
    return alert_with_limit(
        limits,
        "VLLMRestartLoop",
        f"{models} * on (namespace, pod) group_left () max by (namespace, pod) ({restarts}) >= {loop.restarts:g}\n"
        f"or on (namespace, pod) {kubelet_restarts} >= {loop.restarts:g}",
        f"{{{{ $labels.pod }}}} in {{{{ $labels.namespace }}}} has restarted {{{{ $value | humanize }}}} times in "
        f"{loop.within}",
        "The launcher exited or was killed each time. The reason is in the container's termination message.",
    )


def _startup_slow(limits: Limits) -> Alert:
    """Return the alert on a start-up that takes longer than its limit."""
    return alert_with_limit(
        limits,
        "VLLMStartupSlow",
        f"max by ({POD}) ({PREFIX}start_seconds) > {limits['VLLMStartupSlow'].seconds:g}\n"
        f"and on ({POD}) {state_selector('starting')} == 1",
        f"{POD_TEXT} has been starting for {{{{ $value | humanizeDuration }}}}",
        f"Start-up makes progress, but it has taken more than {limits['VLLMStartupSlow'].seconds:g} s. With the chart, "
        "Kubernetes kills the container after rollout.startMinutes.",
    )


def _startup_stuck(limits: Limits) -> Alert:
    """Return the alert on a start-up that has made no progress for a share of the limit start_stall."""
    share = limits["VLLMStartupStuck"].share
    return alert_with_limit(
        limits,
        "VLLMStartupStuck",
        f"max by ({POD}) ({PREFIX}last_progress_seconds) > on ({POD}) "
        f'{share:g} * max by ({POD}) ({PREFIX}limit_seconds{{limit="start_stall"}})\n'
        f"and on ({POD}) {state_selector('starting')} == 1",
        f"{POD_TEXT}: start-up has made no progress for {{{{ $value | humanizeDuration }}}}",
        f"That is more than {100 * share:g} % of start_stall_seconds. The launcher stops the start-up at 100 %.",
    )


def _drain_late(limits: Limits) -> Alert:
    """Return the alert on a drain that has used a share of its time and still has open streams."""
    share = limits["VLLMDrainLate"].share
    return alert_with_limit(
        limits,
        "VLLMDrainLate",
        f"max by ({POD}) ({PREFIX}state_seconds) > on ({POD}) "
        f'{share:g} * max by ({POD}) ({PREFIX}limit_seconds{{limit="drain"}})\n'
        f"and on ({POD}) {PREFIX}drain_streams > 0",
        f"{POD_TEXT} has been draining for {{{{ $value | humanizeDuration }}}} and may cut streams",
        f"More than {100 * share:g} % of the drain time is used, and streams are still open. Streams that are still "
        "open when the drain time ends are cut.",
    )
