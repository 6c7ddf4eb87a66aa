"""Alerts. A summary says what is wrong and where, a description what that means, a runbook what to do.

An expression keeps the labels that name the model and, where one replica is meant, the pod. Every comparison in it, and
every number of thresholds.yaml, is changed by tests/monitoring/test_mutants.py, and a test must notice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

import msgspec

from vllm_health import metrics
from vllm_monitoring.records import MODEL, POD, SLO_ERRORS, SLO_REQUESTS, Rule
from vllm_monitoring.thresholds import BURN_ALERTS, Limit, Thresholds, seconds

_OURS: Final = metrics.PREFIX
_ENGINE: Final = f"{POD}, {metrics.ENGINE}"
_MODEL_NAMED: Final = "{{ $labels.model_name }} in {{ $labels.namespace }}"
_POD_NAMED: Final = "{{ $labels.pod }} in {{ $labels.namespace }}, which serves {{ $labels.model_name }},"
_GPU_NAMED: Final = "GPU {{ $labels.gpu }} of {{ $labels.pod }} in {{ $labels.namespace }}"


class Alert(msgspec.Struct, frozen=True):
    """``labels`` beside ``severity`` tell the variants of one name apart."""

    name: str
    severity: str
    held: str
    expr: str
    summary: str
    description: str
    labels: dict[str, str] = {}

    def rule(self, runbook: str) -> Rule:
        """As Prometheus reads it."""
        return {
            "alert": self.name,
            "expr": self.expr,
            **({"for": self.held} if self.held != "0s" else {}),
            "labels": {"severity": self.severity, **self.labels},
            "annotations": {
                "summary": self.summary,
                "description": self.description,
                "runbook_url": runbook,
            },
        }


def burns(thresholds: Thresholds) -> Iterator[Alert]:
    """An objective whose errors use up its budget too fast, over two windows: the short one ends it soon after."""
    missed = {
        "availability": "requests answered with 5xx",
        "time_to_first_token": "requests whose first token came too late",
        "time_per_output_token": "requests whose tokens came too slowly",
    }
    for slo, objective in thresholds.slo.objectives().items():
        for burn in thresholds.slo.burn:
            share = burn.rate * objective.budget
            over = (
                f'{SLO_ERRORS}:ratio_rate{window}{{slo="{slo}"}} > {share:.6g}' for window in (burn.long, burn.short)
            )
            requests = f'{SLO_REQUESTS}:rate{burn.long}{{slo="{slo}"}} * {seconds(burn.long)}'
            within = f" within {objective.seconds:g} s" if objective.seconds else ""
            yield Alert(
                BURN_ALERTS[slo],
                burn.severity,
                burn.held,
                "\nand ".join((*over, f"{requests} >= {thresholds.slo.least_requests:g}")),
                f"{_MODEL_NAMED}: {{{{ $value | humanizePercentage }}}} {missed[slo]} in {burn.long}",
                f"The objective is {objective.objective:.4g}{within}. For {burn.long} and for {burn.short} its budget "
                f"of errors has been used up {burn.rate:g} times too fast.",
                {"slo": slo, "window": burn.long},
            )


def serving(limits: Mapping[str, Limit]) -> Iterator[Alert]:
    """What users notice, or soon will."""
    stalled = limits["VLLMEngineStalled"]
    # Not "dead": every run ends so, a rollout's too. A hang is "stalled" for a fifth of stall_seconds before that.
    state = f'{_OURS}state{{state="stalled"}}'
    yield _alert(
        limits,
        "VLLMEngineStalled",
        f"max by ({POD}) (max_over_time({state}[{stalled.within}])) == 1",
        f"{_POD_NAMED} hangs",
        "Its engine has made no step and has left requests of one token unanswered. It is out of rotation; the "
        "launcher ends it and its carrier starts it again.",
    )
    gone, ready = limits["VLLMNoReplicaReady"], f"{_OURS}ready"
    served = f"max by ({MODEL}) (max_over_time({ready}[{gone.within}])) == 1"
    drained = f"min by ({MODEL}) (last_over_time({_OURS}draining[{gone.within}])) == 1"
    yield _alert(
        limits,
        "VLLMNoReplicaReady",
        # Scaled to zero or removed: nobody is there, and each ended in a drain. Put to sleep: somebody wants it so.
        f"{served}\nunless max by ({MODEL}) ({ready}) == 1\n"
        f"unless ({drained} unless max by ({MODEL}) ({ready}) == 0)\n"
        f'unless max by ({MODEL}) ({_OURS}state{{state="asleep"}}) == 1',
        f"{_MODEL_NAMED} is served by nobody",
        f"A replica was ready within {gone.within} and now none is: every request fails.",
    )
    within = limits["VLLMReplicaNotReady"].within
    yield _alert(
        limits,
        "VLLMReplicaNotReady",
        f"max by ({POD}) ({ready} == 0 and max_over_time({ready}[{within}]) == 1)\n"
        f'unless on ({POD}) {_OURS}state{{state=~"draining|asleep"}} == 1',
        f"{_POD_NAMED} is out of rotation",
        "It was ready and no longer is, and nobody has told it to end; the others carry its load.",
    )
    waiting, running = (
        f"max by ({_ENGINE}) ({metrics.REQUESTS_WAITING})",
        f"max by ({_ENGINE}) ({metrics.REQUESTS_RUNNING})",
    )
    steps = f"max by ({_ENGINE}) (rate({metrics.ITERATION_TOKENS}_count[2m]))"
    yield _alert(
        limits,
        "VLLMAdmissionStalled",
        f'{waiting} > 0\nand {running} == 0\nand {steps} == 0\nunless on ({POD}) {_OURS}state{{state="asleep"}} == 1',
        f"{_POD_NAMED} lets no request in",
        "{{ $value }} requests wait in engine {{ $labels.engine }}, none runs and no step is made "
        "(such as vllm-project/vllm#45388).",
    )
    time, limit = metrics.QUEUE_TIME, limits["VLLMQueueTimeHigh"].seconds
    mean = (f"sum by ({MODEL}) (rate({time}_{part}[5m]))" for part in ("sum", "count"))
    yield _alert(
        limits,
        "VLLMQueueTimeHigh",
        f"{' / '.join(mean)} > {limit:g}",
        f"{_MODEL_NAMED}: requests wait {{{{ $value | humanizeDuration }}}} before anything is done for them",
        f"The mean over five minutes is above {limit:g} s: there is more work than these replicas can do.",
    )
    usage = limits["VLLMKVPressure"].usage
    full = f"max by ({_ENGINE}) ({metrics.KV_CACHE_USAGE}) > {usage:g}"
    yield _alert(
        limits,
        "VLLMKVPressure",
        f"{full}\nand max by ({_ENGINE}) (rate({metrics.PREEMPTIONS}[5m])) > 0",
        f"{_POD_NAMED} has too little KV cache",
        "{{ $value | humanizePercentage }} of it is in use and requests are preempted: what they had computed is "
        "computed again.",
    )
    per_minute = limits["VLLMAdmissionRejections"].per_minute
    yield _alert(
        limits,
        "VLLMAdmissionRejections",
        f"sum by ({MODEL}, reason) (rate({metrics.ADMISSION_REJECTIONS}[5m])) * 60 > {per_minute:g}",
        f"{_MODEL_NAMED} turns {{{{ $value | humanize }}}} requests a minute away",
        "As many requests or tokens are in it as --max-num-queued-reqs or --max-num-queued-tokens allow; clients are "
        "answered 503.",
    )
    most, target = "max by (namespace, horizontalpodautoscaler)", "namespace, scaletargetref_name"
    # The Deployment, whose name a pod's begins with.
    waiting = f'label_replace({metrics.REQUESTS_WAITING}, "scaletargetref_name", "$1", "pod", "(.+)-[^-]+-[^-]+")'
    yield _alert(
        limits,
        "VLLMAtMaxReplicas",
        f"({most} ({metrics.KUBE_HPA_DESIRED}) >= {most} ({metrics.KUBE_HPA_MAX}))\n"
        f"* on (namespace, horizontalpodautoscaler) group_left (scaletargetref_name) {metrics.KUBE_HPA_INFO}\n"
        f"and on ({target}) sum by ({target}) ({waiting}) > 0",
        "{{ $labels.scaletargetref_name }} in {{ $labels.namespace }} may have no more replicas, and requests wait",
        "{{ $value }} replicas are wanted, as many as the autoscaler may have.",
    )


def rollout(limits: Mapping[str, Limit]) -> Iterator[Alert]:
    """Starts and ends."""
    loop = limits["VLLMRestartLoop"]
    began = f"changes({_OURS}process_start_time_seconds[{loop.within}])"
    named = f"group by ({POD}) (last_over_time({_OURS}live[{loop.within}]))"
    # Of a container that ends within seconds no scrape tells, but kubelet counts.
    kubelets = f'max by (namespace, pod) (increase({metrics.KUBE_RESTARTS}{{container="vllm"}}[{loop.within}]))'
    yield _alert(
        limits,
        "VLLMRestartLoop",
        f"{named} * on (namespace, pod) group_left () max by (namespace, pod) ({began}) >= {loop.restarts:g}\n"
        f"or on (namespace, pod) {kubelets} >= {loop.restarts:g}",
        f"{{{{ $labels.pod }}}} in {{{{ $labels.namespace }}}} has started anew {{{{ $value | humanize }}}} times in "
        f"{loop.within}",
        "Each time it has ended by itself or was ended. Its last words are in the termination message.",
    )
    starting = f'{_OURS}state{{state="starting"}} == 1'
    slow = limits["VLLMStartupSlow"].seconds
    yield _alert(
        limits,
        "VLLMStartupSlow",
        f"max by ({POD}) ({_OURS}start_seconds) > {slow:g}\nand on ({POD}) {starting}",
        f"{_POD_NAMED} has been starting for {{{{ $value | humanizeDuration }}}}",
        "It moves, else it would be ended, but no start should take so long.",
    )
    stuck = limits["VLLMStartupStuck"].share
    yield _alert(
        limits,
        "VLLMStartupStuck",
        f"max by ({POD}) ({_OURS}last_progress_seconds) > on ({POD}) "
        f'{stuck:g} * max by ({POD}) ({_OURS}limit_seconds{{limit="start_stall"}})\nand on ({POD}) {starting}',
        f"{_POD_NAMED} has not moved in its start for {{{{ $value | humanizeDuration }}}}",
        f"After {100 * stuck:g} % of the time that a start may stand still. It is ended at 100 %.",
    )
    late = limits["VLLMDrainLate"].share
    yield _alert(
        limits,
        "VLLMDrainLate",
        f"max by ({POD}) ({_OURS}state_seconds) > on ({POD}) "
        f'{late:g} * max by ({POD}) ({_OURS}limit_seconds{{limit="drain"}})\nand on ({POD}) {_OURS}drain_streams > 0',
        f"{_POD_NAMED} will cut streams: it drains since {{{{ $value | humanizeDuration }}}}",
        f"{100 * late:g} % of the drain's time is over and streams still run; what is left at its end is cut.",
    )


def seen(limits: Mapping[str, Limit]) -> Iterator[Alert]:
    """Whether what is shown can be believed."""
    names = "|".join(metrics.ALWAYS_SHOWN)
    shown = f'count by (namespace, pod) (group by (namespace, pod, __name__) ({{__name__=~"{names}"}}))'
    ready = f"max by ({POD}) ({_OURS}ready)"
    yield _alert(
        limits,
        "VLLMMetricsAbsent",
        f"{ready} == 1 unless on (namespace, pod) {shown} >= {len(metrics.ALWAYS_SHOWN)}",
        f"{_POD_NAMED} does not show all of vLLM's metrics",
        "The prober's are there and some of vLLM's are not: its /metrics is not scraped, or the engine has renamed "
        "them. Dashboards and alerts are blind to it.",
    )
    share = limits["VLLMProberBlind"].share
    looks = f"sum by ({POD}) (rate({_OURS}scrapes_total[5m]))"
    failed = f'sum by ({POD}) (rate({_OURS}scrapes_total{{result="failed"}}[5m]))'
    yield _alert(
        limits,
        "VLLMProberBlind",
        f'{failed} / {looks} > {share:g}\nor max by ({POD}) ({_OURS}canaries_total{{result="refused"}}) > 0',
        f"{_POD_NAMED} is watched by a prober that sees too little",
        "vLLM's /metrics does not answer it, or its requests of one token are refused for their key or their model's "
        "name. An engine that hangs may stay unnoticed.",
    )
    below = limits["VLLMKVCacheBelowPlan"].share
    planned = f"on ({POD}) group_left () max by ({POD}) ({_OURS}kv_cache_planned_tokens)"
    yield _alert(
        limits,
        "VLLMKVCacheBelowPlan",
        f"max by ({_ENGINE}) ({_OURS}kv_cache_tokens) / {planned} < {below:g}",
        f"{_POD_NAMED} has {{{{ $value | humanizePercentage }}}} of the KV cache that was planned",
        "Something else takes the memory, or the plan is wrong: fewer requests fit than were counted on.",
    )


def gpus(limits: Mapping[str, Limit]) -> Iterator[Alert]:
    """From our own reading of NVML: DCGM's gauge of the last Xid says of no error when it was."""
    faults = f"{_OURS}gpu_faults"
    by_gpu = f"{POD}, gpu"
    yield _alert(
        limits,
        "GPUXidFatal",
        f'max by ({by_gpu}, kind) ({faults}{{kind=~"xid .+", fatal="true"}}) == 1',
        f"{_GPU_NAMED} has met {{{{ $labels.kind }}}}",
        "It serves nobody until it is reset; its replica is out of rotation.",
    )
    yield _alert(
        limits,
        "GPULost",
        f'max by ({by_gpu}) ({faults}{{kind="lost"}}) == 1',
        f"{_GPU_NAMED} cannot be reached",
        "It has fallen off the bus or wants a reset; its replica is out of rotation.",
    )
    yield _alert(
        limits,
        "GPURowRemapFailure",
        f'max by ({by_gpu}) ({faults}{{kind="row remap failure"}}) == 1',
        f"{_GPU_NAMED} has a broken row of memory and no spare one",
        "It still computes, but the next error there is a fatal one: have it replaced.",
    )
    within, errors = limits["GPUECCErrors"].within, f"{_OURS}gpu_ecc_uncorrected_errors"
    yield _alert(
        limits,
        "GPUECCErrors",
        f"max by ({by_gpu}) ({errors} - min_over_time({errors}[{within}])) > 0",  # delta would extrapolate
        f"{_GPU_NAMED} has met {{{{ $value }}}} uncorrectable memory errors in {within}",
        "Each ends the process that met it; several mean that the GPU is going bad.",
    )
    slow = limits["GPUThrottled"]
    yield _alert(
        limits,
        "GPUThrottled",
        f"max by ({by_gpu}, reason) (avg_over_time({_OURS}gpu_throttled[{slow.within}])) > {slow.share:g}",
        f"{_GPU_NAMED} is slowed down {{{{ $value | humanizePercentage }}}} of the time: {{{{ $labels.reason }}}}",
        "By heat or a weak power supply, not by its own power cap, which is normal; all GPUs of its replica wait for "
        "it.",
    )
    yield _alert(
        limits,
        "GPUUnwatched",
        f"max by ({POD}) ({_OURS}nvml_up) == 0 and max by ({POD}) ({_OURS}planned_gpus) > 0",
        f"{_POD_NAMED} sees nothing of its GPUs",
        "NVML does not answer the prober. The engine may work on, but a fault of a GPU would not be seen.",
    )


def _alert(limits: Mapping[str, Limit], name: str, expr: str, summary: str, description: str) -> Alert:
    limit = limits[name]
    return Alert(name, limit.severity, limit.held, expr, summary, description)
