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
    STATES,
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
    return panels.timeline_panel(
        "Replica states",
        f"All ready ({STATES['ready']}). A stalled replica is {STATES['stalled']}, a dead one {STATES['dead']}, a "
        f"draining one {STATES['draining']}. A starting one is {STATES['starting']}, for about as long as last time.",
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
            "Both equal the number of replicas.",
            "short",
            {"ready": f"sum({_prober_series('ready')})", "live": f"sum({_prober_series('live')})"},
            counts=True,
        ),
        line_panel(
            "Time since last step",
            "Below a minute. The prober sends an idle engine a one-token request about once a minute.",
            "s",
            {"{{pod}} engine {{engine}}": f"max by ({_BY_POD}, {metrics.ENGINE}) ({last_step})"},
            runbook=thresholds.runbook("VLLMEngineStalled"),
        ),
        line_panel(
            "One-token requests",
            "answered, or not needed because the engine made a step meanwhile. refused: the prober has a wrong API key "
            "or model name.",
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
            "The slowest replica of each phase. Prebuilt kernels and a persistent cache shorten compiling.",
            "s",
            {"{{phase}}": f"max by (phase) ({_prober_series('start_phase_seconds')})"},
            stacked=True,
        ),
        line_panel(
            "Start-up time elapsed and remaining",
            "Elapsed time grows to that of the last start-up. Remaining time falls to 0.",
            "s",
            {"{{pod}}, elapsed": _by_pod("start_seconds"), "{{pod}}, remaining": _by_pod("start_remaining_seconds")},
            limit=thresholds.alerts["VLLMStartupSlow"].seconds,
            runbook=thresholds.runbook("VLLMStartupSlow"),
        ),
        line_panel(
            "Weights loaded",
            "It rises steadily to 100 %. A flat line is a disk or a network that stalls.",
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
        f"Zero except in a rollout. {loop.restarts:g} restarts of one replica within {loop.within} page the operator.",
        f"sum(changes({_process_series('start_time_seconds')}[{loop.within}]))",
        steps=((None, GREEN), (loop.restarts, RED)),
    )


def _drains(thresholds: Thresholds) -> list[Panel]:
    """Return the panels of draining replicas, of their open streams and of the drain time used."""
    return [
        line_panel(
            "Draining replicas",
            "Zero except during a rollout or a scale-down.",
            "short",
            {"draining replicas": f"sum({_prober_series('draining')})"},
            top=1.0,
            counts=True,
        ),
        line_panel(
            "Open streams while draining",
            "It falls to 0 before the drain time ends. Streams still open at its end are cut.",
            "short",
            {"{{pod}}": f"{_by_pod('drain_streams')} or 0 * {_by_pod('draining')}"},
            top=1.0,
            counts=True,
            runbook=thresholds.runbook("VLLMDrainLate"),
            span=6,
        ),
        line_panel(
            "Drain time used",
            "Far below 100 %. At 100 % streams are cut: raise launch.drain_seconds.",
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
            "ok only. If scrapes fail, the prober cannot detect a hang.",
            "reqps",
            {"{{result}}": f"sum by (result) (rate({_prober_series('scrapes_total')}[{RATE}]))"},
            stacked=True,
            runbook=thresholds.runbook("VLLMProberBlind"),
        ),
        line_panel(
            "Prober and launcher memory",
            "Flat, about 60 MB.",
            "bytes",
            {"{{pod}}": f"max by ({_BY_POD}) ({_process_series('resident_memory_bytes')})"},
        ),
        line_panel(
            "vLLM metrics in Prometheus",
            f"{len(metrics.ALWAYS_SHOWN)} metric names for each ready replica. With fewer some panels are empty.",
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
