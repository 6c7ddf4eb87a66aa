"""The health dashboard: states, start-up, restarts and drains of replicas, from the prober and the launcher."""

from __future__ import annotations

from vllm_health import metrics
from vllm_monitoring import panels
from vllm_monitoring.panels import (
    GREEN,
    OF_POD,
    OF_TARGET,
    RATE,
    RED,
    Panel,
    Row,
    line_panel,
    select,
    stat_panel,
)
from vllm_monitoring.thresholds import Thresholds

UID = "vllm-health"
_BY_POD = "namespace, pod"
_DRAIN = 'limit="drain"'
_ENGINES = f'{metrics.ENGINE}!=""'
"""Excludes the series of a replica that is starting and has no engine yet."""


def build(thresholds: Thresholds) -> str:
    """Return the dashboard's JSON."""
    return panels.dashboard_json(
        UID,
        "vLLM / Rollout and health",
        "State, start-up, restarts and drains of each replica.",
        [
            Row("States", [_replica_states(thresholds), *_readiness_and_progress(thresholds)]),
            Row("Start-up", _starts(thresholds)),
            Row("Restarts and drains", [_restarts(thresholds), *_drains(thresholds)]),
            Row("Prober", _prober(thresholds)),
        ],
        pods=True,
    )


def _replica_states(thresholds: Thresholds) -> Panel:
    """Return the timeline of each replica's state."""
    colors = metrics.COLORS
    return panels.timeline_panel(
        "Replica states",
        f"State of each replica. Normal: all are ready ({colors['ready']}) or saturated ({colors['saturated']}). "
        f"During a rollout: draining ({colors['draining']}), dead ({colors['dead']}) for a moment, then starting "
        f"({colors['starting']}) for about as long as the last start-up. Look when: a replica is stalled "
        f"({colors['stalled']}), has a GPU fault ({colors['gpu_fault']}) or stays dead. Runbook: VLLMEngineStalled.",
        panels.state_code(OF_POD, _BY_POD),
        "{{pod}}",
        runbook=thresholds.runbook("VLLMEngineStalled"),
    )


def _readiness_and_progress(thresholds: Thresholds) -> list[Panel]:
    """Return the panels of ready replicas, of each engine's last step and of the prober's one-token requests."""
    last_step = _prober_series("last_progress_seconds", _ENGINES)
    return [
        line_panel(
            "Ready and live replicas",
            "Replicas whose /readyz and /livez answer 200. Normal: both are equal to the number of replicas. Runbook: "
            "VLLMReplicaNotReady.",
            "short",
            {"ready": f"sum({_prober_series('ready')})", "live": f"sum({_prober_series('live')})"},
            counts=True,
        ),
        line_panel(
            "Time since last step",
            "Time since each engine's last step. The prober sends an idle engine a one-token request after a fifth of "
            "launch.stall_seconds, 60 s by default. Normal: at most about one minute, and seconds under load. Look "
            "when: it grows while requests run or wait. Then the engine may hang. Runbook: VLLMEngineStalled.",
            "s",
            {"{{pod}} engine {{engine}}": f"max by ({_BY_POD}, {metrics.ENGINE}) ({last_step})"},
            runbook=thresholds.runbook("VLLMEngineStalled"),
        ),
        line_panel(
            "One-token requests",
            "Number of the prober's one-token requests, by result. Normal: 'answered', or 'not needed' (the engine "
            "made a step in the meantime). 'unanswered': the engine may hang. 'refused': the prober has a wrong API "
            "key or model name. 'inconclusive': the API server answered with another error. 'paused': an operator has "
            "paused vLLM. Runbook: VLLMProberBlind.",
            "short",
            {"{{result}}": f"sum by (result) (increase({_prober_series('canaries_total')}[{RATE}]))"},
            stacked=True,
            runbook=thresholds.runbook("VLLMProberBlind"),
        ),
    ]


def _starts(thresholds: Thresholds) -> list[Panel]:
    """Return the panels of start-up phases, start-up time and loaded weights."""
    return [
        line_panel(
            "Start-up time by phase",
            "For each phase of start-up, the time of the slowest replica. Normal: as in the last start-up of the same "
            "model. Prebuilt kernels and a persistent cache shorten start-up.",
            "s",
            {"{{phase}}": f"max by (phase) ({_prober_series('start_phase_seconds')})"},
            stacked=True,
        ),
        line_panel(
            "Start-up time elapsed and remaining",
            "Time since a start-up began, and an estimate of the rest from earlier start-ups. Normal: elapsed time "
            "stops at about the time of the last start-up, and remaining time falls to 0. The red line is the limit "
            "of VLLMStartupSlow. Runbook: VLLMStartupSlow.",
            "s",
            {"{{pod}}, elapsed": _by_pod("start_seconds"), "{{pod}}, remaining": _by_pod("start_remaining_seconds")},
            limit=thresholds.alerts["VLLMStartupSlow"].seconds,
            runbook=thresholds.runbook("VLLMStartupSlow"),
        ),
        line_panel(
            "Weights loaded",
            "Share of the weights that a start-up has loaded. Normal: it rises steadily to 100 %. Look when: it stays "
            "flat below 100 %. Then the disk or the network stalls. Runbook: VLLMStartupStuck.",
            "percentunit",
            {"{{pod}}": f"{_by_pod('start_weights_loaded_bytes')} / {_by_pod('start_weights_bytes')}"},
            runbook=thresholds.runbook("VLLMStartupStuck"),
        ),
    ]


def _restarts(thresholds: Thresholds) -> Panel:
    """Return the number of recent restarts."""
    loop = thresholds.alerts["VLLMRestartLoop"]
    return stat_panel(
        "Restarts",
        f"Restarts of all selected replicas in the last {loop.within}. Normal: 0. A rollout of the chart does not "
        f"count, because it creates new pods. Look when: one replica restarts {loop.restarts:g} times in "
        f"{loop.within}. Runbook: VLLMRestartLoop.",
        f"sum(changes({_process_series('start_time_seconds')}[{loop.within}]))",
        steps=((None, GREEN), (loop.restarts, RED)),
    )


def _drains(thresholds: Thresholds) -> list[Panel]:
    """Return the panels of draining replicas, of their open streams and of the drain time used."""
    return [
        line_panel(
            "Draining replicas",
            "Number of replicas that drain. Normal: 0, except during a rollout or a scale-down.",
            "short",
            {"draining replicas": f"sum({_prober_series('draining')})"},
            top=1.0,
            counts=True,
        ),
        line_panel(
            "Open streams while draining",
            "Running and waiting requests of each draining replica. Normal: it falls to 0 before the drain time ends. "
            "Streams that are still open then are cut. Runbook: VLLMDrainLate.",
            "short",
            {"{{pod}}": f"{_by_pod('drain_streams')} or 0 * {_by_pod('draining')}"},
            top=1.0,
            counts=True,
            runbook=thresholds.runbook("VLLMDrainLate"),
            span=6,
        ),
        line_panel(
            "Drain time used",
            "Share of its drain time that each draining replica has used. Normal: far below 100 %. Look when: it "
            "reaches the red line. At 100 % open streams are cut. If that happens, raise launch.drain_seconds. "
            "Runbook: VLLMDrainLate.",
            "percentunit",
            {"{{pod}}": f"{_by_pod('draining')} * {_by_pod('state_seconds')} / {_by_pod('limit_seconds', _DRAIN)}"},
            limit=thresholds.alerts["VLLMDrainLate"].share,
            top=1.0,
            runbook=thresholds.runbook("VLLMDrainLate"),
            span=6,
        ),
    ]


def _prober(thresholds: Thresholds) -> list[Panel]:
    """Return the panels of the prober's scrapes, of its memory and of the vLLM metrics that Prometheus has."""
    always_shown = f'__name__=~"{"|".join(metrics.ALWAYS_SHOWN)}"'
    names = f"group by ({_BY_POD}, __name__) ({select('', OF_POD, always_shown)})"
    return [
        line_panel(
            "Prober scrapes of /metrics",
            "Requests of the prober to vLLM's /metrics per second, by result. Normal: only 'ok'. Look when: there are "
            "'failed' ones. Then the prober cannot detect a hang. Runbook: VLLMProberBlind.",
            "reqps",
            {"{{result}}": f"sum by (result) (rate({_prober_series('scrapes_total')}[{RATE}]))"},
            stacked=True,
            runbook=thresholds.runbook("VLLMProberBlind"),
        ),
        line_panel(
            "Prober and launcher memory",
            "Main memory of the launcher and its prober, or of a sidecar. Normal: flat, about 60 MB.",
            "bytes",
            {"{{pod}}": f"max by ({_BY_POD}) ({_process_series('resident_memory_bytes')})"},
        ),
        line_panel(
            "vLLM metrics in Prometheus",
            "Number of vLLM's metric names in Prometheus, of those that dashboards and alerts need. Normal: "
            f"{len(metrics.ALWAYS_SHOWN)} for each ready replica. Look when: there are fewer. Then some panels are "
            "empty. Runbook: VLLMMetricsAbsent.",
            "short",
            {"{{pod}}": f"count by ({_BY_POD}) ({names})"},
            top=float(len(metrics.ALWAYS_SHOWN)),
            counts=True,
            runbook=thresholds.runbook("VLLMMetricsAbsent"),
        ),
    ]


def _prober_series(name: str, *more: str) -> str:
    """Return the selector of one of the prober's metrics."""
    return select(metrics.PREFIX + name, OF_POD, *more)


def _process_series(name: str) -> str:
    """Return the selector of a metric of the prober's and launcher's process, which has no label model_name."""
    return select(f"{metrics.PREFIX}process_{name}", OF_TARGET)


def _by_pod(name: str, *more: str) -> str:
    """Return the query for one of the prober's metrics by replica."""
    return f"max by ({_BY_POD}) ({_prober_series(name, *more)})"
