"""Alerts on failures that users notice, or will notice soon."""

from __future__ import annotations

from vllm_health import metrics
from vllm_monitoring.alerts import (
    ENGINE,
    MODEL_TEXT,
    POD_TEXT,
    PREFIX,
    READY,
    Alert,
    Limits,
    alert_with_limit,
    state_selector,
)
from vllm_monitoring.records import MODEL, POD


def group(limits: Limits) -> list[Alert]:
    """Return the group's alerts, in the order of the rules file."""
    return [
        _engine_stalled(limits),
        _no_replica_ready(limits),
        _replica_not_ready(limits),
        _admission_stalled(limits),
        _queue_time_high(limits),
        _kv_pressure(limits),
        _admission_rejections(limits),
        _at_max_replicas(limits),
    ]


def _engine_stalled(limits: Limits) -> Alert:
    """Return the alert on a replica whose engine hangs."""
    # The rule does not use the state "dead", because every run ends in it, also in a rollout. An engine that hangs is
    # "stalled" for stall_seconds / 5 before it is "dead".
    stalled = f"max_over_time({state_selector('stalled')}[{limits['VLLMEngineStalled'].within}])"
    return alert_with_limit(
        limits,
        "VLLMEngineStalled",
        f"max by ({POD}) ({stalled}) == 1",
        f"{POD_TEXT}: the engine hangs",
        "The engine made no step and did not answer the prober's one-token requests. The replica gets no new requests. "
        "The launcher stops vLLM and exits, and Kubernetes or Docker restarts the container. A sidecar does not stop "
        "vLLM.",
    )


def _no_replica_ready(limits: Limits) -> Alert:
    """Return the alert on a model that had a ready replica and has none now."""
    within = limits["VLLMNoReplicaReady"].within
    served = f"max by ({MODEL}) (max_over_time({READY}[{within}])) == 1"
    drained = f"min by ({MODEL}) (last_over_time({PREFIX}draining[{within}])) == 1"
    return alert_with_limit(
        limits,
        "VLLMNoReplicaReady",
        # The alert excludes two cases. The model was scaled to zero or removed: every replica drained, and no series is
        # left. A replica is asleep: the operator did this on purpose.
        f"{served}\nunless max by ({MODEL}) ({READY}) == 1\n"
        f"unless ({drained} unless max by ({MODEL}) ({READY}) == 0)\n"
        f"unless max by ({MODEL}) ({state_selector('asleep')}) == 1",
        f"{MODEL_TEXT} has no ready replica",
        f"A replica was ready within the last {within}, and none is ready now. Every request fails.",
    )


def _replica_not_ready(limits: Limits) -> Alert:
    """Return the alert on a replica that is no longer ready, although it neither drains nor sleeps."""
    was_ready = f"max_over_time({READY}[{limits['VLLMReplicaNotReady'].within}]) == 1"
    return alert_with_limit(
        limits,
        "VLLMReplicaNotReady",
        f"max by ({POD}) ({READY} == 0 and {was_ready})\n"
        f'unless on ({POD}) {PREFIX}state{{state=~"draining|asleep"}} == 1',
        f"{POD_TEXT} is not ready",
        "The replica was ready, is not ready now, and is neither draining nor asleep. The other replicas get its load.",
    )


def _admission_stalled(limits: Limits) -> Alert:
    """Return the alert on an engine whose requests wait while it runs none and makes no step."""
    waiting = f"max by ({ENGINE}) ({metrics.REQUESTS_WAITING})"
    running = f"max by ({ENGINE}) ({metrics.REQUESTS_RUNNING})"
    steps = f"max by ({ENGINE}) (rate({metrics.ITERATION_TOKENS}_count[2m]))"
    return alert_with_limit(
        limits,
        "VLLMAdmissionStalled",
        f"{waiting} > 0\nand {running} == 0\nand {steps} == 0\nunless on ({POD}) {state_selector('asleep')} == 1",
        f"{POD_TEXT}: requests wait and none runs",
        "{{ $value }} requests wait in engine {{ $labels.engine }}. The engine runs none and makes no step "
        "(for example vllm-project/vllm#45388).",
    )


def _queue_time_high(limits: Limits) -> Alert:
    """Return the alert on a model whose mean queue time is above its limit."""
    limit = limits["VLLMQueueTimeHigh"].seconds
    total, count = (f"sum by ({MODEL}) (rate({metrics.QUEUE_TIME}_{part}[5m]))" for part in ("sum", "count"))
    return alert_with_limit(
        limits,
        "VLLMQueueTimeHigh",
        f"{total} / {count} > {limit:g}",
        f"{MODEL_TEXT}: mean queue time is {{{{ $value | humanizeDuration }}}}",
        f"The mean queue time over 5 minutes is above {limit:g} s. The replicas get more requests than they can serve.",
    )


def _kv_pressure(limits: Limits) -> Alert:
    """Return the alert on an engine whose KV cache usage is above its limit while it preempts requests."""
    usage = f"max by ({ENGINE}) ({metrics.KV_CACHE_USAGE}) > {limits['VLLMKVPressure'].usage:g}"
    return alert_with_limit(
        limits,
        "VLLMKVPressure",
        f"{usage}\nand max by ({ENGINE}) (rate({metrics.PREEMPTIONS}[5m])) > 0",
        f"{POD_TEXT}: the KV cache is nearly full and requests are preempted",
        "KV cache usage is {{ $value | humanizePercentage }}. Each preempted request is computed again from its "
        "beginning.",
    )


def _admission_rejections(limits: Limits) -> Alert:
    """Return the alert on a model that rejects more requests a minute than its limit."""
    per_minute = f"sum by ({MODEL}, reason) (rate({metrics.ADMISSION_REJECTIONS}[5m])) * 60"
    return alert_with_limit(
        limits,
        "VLLMAdmissionRejections",
        f"{per_minute} > {limits['VLLMAdmissionRejections'].per_minute:g}",
        f"{MODEL_TEXT} rejects {{{{ $value | humanize }}}} requests per minute",
        "The limit --max-num-queued-reqs or --max-num-queued-tokens is reached. Clients get 503.",
    )


def _at_max_replicas(limits: Limits) -> Alert:
    """Return the alert on a Deployment that cannot scale out further while its requests wait."""
    max_by_hpa, target = "max by (namespace, horizontalpodautoscaler)", "namespace, scaletargetref_name"
    # A pod's name begins with the name of its Deployment.
    waiting = f'label_replace({metrics.REQUESTS_WAITING}, "scaletargetref_name", "$1", "pod", "(.+)-[^-]+-[^-]+")'
    return alert_with_limit(
        limits,
        "VLLMAtMaxReplicas",
        f"({max_by_hpa} ({metrics.KUBE_HPA_DESIRED}) >= {max_by_hpa} ({metrics.KUBE_HPA_MAX}))\n"
        f"* on (namespace, horizontalpodautoscaler) group_left (scaletargetref_name) {metrics.KUBE_HPA_INFO}\n"
        f"and on ({target}) sum by ({target}) ({waiting}) > 0",
        "{{ $labels.scaletargetref_name }} in {{ $labels.namespace }} is at maxReplicas, and requests wait",
        "The autoscaler wants {{ $value }} replicas, and its maximum is reached.",
    )
