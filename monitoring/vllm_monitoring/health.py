"""The health dashboard: replica states, starts, restarts and drains, as the prober and the launcher report them."""

from __future__ import annotations

from vllm_health import metrics
from vllm_monitoring import panels
from vllm_monitoring.panels import GREEN, OF_POD, OF_TARGET, RATE, RED, STATES, Panel, Row, lines, select, stat_panel
from vllm_monitoring.thresholds import Thresholds

UID = "vllm-health"
_BY_POD = "namespace, pod"
_DRAIN = 'limit="drain"'
_ENGINES = f'{metrics.ENGINE}!=""'
"""Leaves out the series of a start that has no engine yet."""


def build(thresholds: Thresholds) -> str:
    """Return the dashboard's JSON."""
    return panels.board(
        UID,
        "vLLM / Rollout and health",
        "What the prober thinks of each replica, how starts go by, how drains end.",
        [
            Row("Verdicts", [_replica_states(thresholds), *_readiness_and_progress(thresholds)]),
            Row("Starts", _starts(thresholds)),
            Row("Ends", [_restarts(thresholds), *_drains(thresholds)]),
            Row("The prober itself", _prober(thresholds)),
        ],
        pods=True,
    )


def _replica_states(thresholds: Thresholds) -> Panel:
    """Return the timeline of each replica's state."""
    return panels.timeline(
        "State of each replica",
        f"{STATES['ready'].capitalize()}. {STATES['stalled'].capitalize()} hangs, {STATES['dead']} is dead, "
        f"{STATES['draining']} drains; starting is {STATES['starting']} and no longer than the last time.",
        panels.state_code(OF_POD, _BY_POD),
        "{{pod}}",
        runbook=thresholds.runbook("VLLMEngineStalled"),
    )


def _readiness_and_progress(thresholds: Thresholds) -> list[Panel]:
    """Return the panels of ready replicas, of each engine's last step and of the prober's one-token requests."""
    last_step = _prober_series("last_progress_seconds", _ENGINES)
    return [
        lines(
            "Ready",
            "As many as there are replicas.",
            "short",
            {"ready": f"sum({_prober_series('ready')})", "live": f"sum({_prober_series('live')})"},
            counts=True,
        ),
        lines(
            "Since its last step",
            "Below a minute: an idle engine is asked for a token about once a minute, so that it moves.",
            "s",
            {"{{pod}} engine {{engine}}": f"max by ({_BY_POD}, {metrics.ENGINE}) ({last_step})"},
            runbook=thresholds.runbook("VLLMEngineStalled"),
        ),
        lines(
            "Requests of one token",
            "Answered, or not needed since the engine moved meanwhile. Refused ones are a mistake in the prober's key "
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
        lines(
            "Where a start spends its time",
            "The slowest of the replicas, each phase. Kernels built ahead and a cache that stays shorten compiling.",
            "s",
            {"{{phase}}": f"max by (phase) ({_prober_series('start_phase_seconds')})"},
            stacked=True,
        ),
        lines(
            "Start so far, and still to come",
            "So far grows to what it took before; still to come falls.",
            "s",
            {"{{pod}}, so far": _by_pod("start_seconds"), "{{pod}}, to come": _by_pod("start_remaining_seconds")},
            limit=thresholds.alerts["VLLMStartupSlow"].seconds,
            runbook=thresholds.runbook("VLLMStartupSlow"),
        ),
        lines(
            "Weights loaded",
            "It reaches 100 % and moves all the time; a flat line is a disk or a network that stalls.",
            "percentunit",
            {"{{pod}}": f"{_by_pod('start_weights_loaded_bytes')} / {_by_pod('start_weights_bytes')}"},
            runbook=thresholds.runbook("VLLMStartupStuck"),
        ),
    ]


def _restarts(thresholds: Thresholds) -> Panel:
    """Return the number of recent restarts."""
    loop = thresholds.alerts["VLLMRestartLoop"]
    return stat_panel(
        "Starts anew",
        f"None but by rollouts; {loop.restarts:g} of one replica within {loop.within} page somebody.",
        f"sum(changes({_process_series('start_time_seconds')}[{loop.within}]))",
        steps=((None, GREEN), (loop.restarts, RED)),
    )


def _drains(thresholds: Thresholds) -> list[Panel]:
    """Return the panels of draining replicas, of their open streams and of the drain time used."""
    return [
        lines(
            "Draining",
            "Only while a rollout or a scale-down is on.",
            "short",
            {"replicas that drain": f"sum({_prober_series('draining')})"},
            top=1.0,
            counts=True,
        ),
        lines(
            "Streams that a drain waits for",
            "It falls to nothing before the drain's time is over; what is left then is cut.",
            "short",
            {"{{pod}}": f"{_by_pod('drain_streams')} or 0 * {_by_pod('draining')}"},
            top=1.0,
            counts=True,
            runbook=thresholds.runbook("VLLMDrainLate"),
            span=6,
        ),
        lines(
            "Share of the drain's time used",
            "Far below 100 %, else streams are cut: raise launch.drain_seconds.",
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
        lines(
            "Looks at vLLM's /metrics",
            "ok. Failed ones make the prober blind.",
            "reqps",
            {"{{result}}": f"sum by (result) (rate({_prober_series('scrapes_total')}[{RATE}]))"},
            stacked=True,
            runbook=thresholds.runbook("VLLMProberBlind"),
        ),
        lines(
            "Memory of the prober and launcher",
            "Flat, some 60 MB.",
            "bytes",
            {"{{pod}}": f"max by ({_BY_POD}) ({_process_series('resident_memory_bytes')})"},
        ),
        lines(
            "Metrics that are shown",
            f"{len(metrics.ALWAYS_SHOWN)} of vLLM's names for each replica that is ready; fewer and some panels are "
            "empty.",
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
