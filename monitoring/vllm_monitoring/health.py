"""Starts, verdicts, drains and restarts, as the prober and the launcher tell of them."""

from __future__ import annotations

from vllm_health import metrics
from vllm_monitoring import panels
from vllm_monitoring.panels import OF_POD, OF_TARGET, RATE, Row, lines, select, stat_panel
from vllm_monitoring.thresholds import Thresholds

UID = "vllm-health"
_DRAIN = 'limit="drain"'
_ENGINES = f'{metrics.ENGINE}!=""'
"""Not what a start has without any engine to be seen yet."""


def build(thresholds: Thresholds) -> str:
    """The dashboard's JSON."""
    alerts = thresholds.alerts
    each = "namespace, pod"

    def ours(name: str, *more: str) -> str:
        return select(metrics.PREFIX + name, OF_POD, *more)

    def pod(name: str, *more: str) -> str:
        return f"max by ({each}) ({ours(name, *more)})"

    quiet = ours("last_progress_seconds", _ENGINES)
    loop = alerts["VLLMRestartLoop"]
    vllms = f'__name__=~"{"|".join(metrics.ALWAYS_SHOWN)}"'

    def process(name: str) -> str:
        """Of the prober's own process, which is the launcher: it has no model_name."""
        return select(f"{metrics.PREFIX}process_{name}", OF_TARGET)

    verdicts = [
        panels.timeline(
            "State of each replica",
            "Green. Orange hangs, red is dead, purple drains; starting is blue and no longer than the last time.",
            panels.state_code(OF_POD, each),
            "{{pod}}",
            runbook=thresholds.runbook("VLLMEngineStalled"),
        ),
        lines(
            "Ready",
            "As many as there are replicas.",
            "short",
            {"ready": f"sum({ours('ready')})", "live": f"sum({ours('live')})"},
            counts=True,
        ),
        lines(
            "Since its last step",
            "Below a minute: an idle engine is asked for a token about once a minute, so that it moves.",
            "s",
            {"{{pod}} engine {{engine}}": f"max by ({each}, {metrics.ENGINE}) ({quiet})"},
            runbook=thresholds.runbook("VLLMEngineStalled"),
        ),
        lines(
            "Requests of one token",
            "Answered, or not needed since the engine moved meanwhile. Refused ones are a mistake in the prober's key "
            "or model name.",
            "short",
            {"{{result}}": f"sum by (result) (increase({ours('canaries_total')}[{RATE}]))"},
            stacked=True,
            runbook=thresholds.runbook("VLLMProberBlind"),
        ),
    ]
    starts = [
        lines(
            "Where a start spends its time",
            "The slowest of the replicas, each phase. Kernels built ahead and a cache that stays shorten compiling.",
            "s",
            {"{{phase}}": f"max by (phase) ({ours('start_phase_seconds')})"},
            stacked=True,
        ),
        lines(
            "Start so far, and still to come",
            "So far grows to what it took before; still to come falls.",
            "s",
            {"{{pod}}, so far": pod("start_seconds"), "{{pod}}, to come": pod("start_remaining_seconds")},
            limit=alerts["VLLMStartupSlow"].seconds,
            runbook=thresholds.runbook("VLLMStartupSlow"),
        ),
        lines(
            "Weights loaded",
            "It reaches 100 % and moves all the time; a flat line is a disk or a network that stalls.",
            "percentunit",
            {"{{pod}}": f"{pod('start_weights_loaded_bytes')} / {pod('start_weights_bytes')}"},
            runbook=thresholds.runbook("VLLMStartupStuck"),
        ),
    ]
    ends = [
        stat_panel(
            "Starts anew",
            f"None but by rollouts; {loop.restarts:g} of one replica within {loop.within} page somebody.",
            f"sum(changes({process('start_time_seconds')}[{loop.within}]))",
            steps=((None, panels.GREEN), (loop.restarts, panels.RED)),
        ),
        lines(
            "Draining",
            "Only while a rollout or a scale-down is on.",
            "short",
            {"replicas that drain": f"sum({ours('draining')})"},
            top=1.0,
            counts=True,
        ),
        lines(
            "Streams that a drain waits for",
            "It falls to nothing before the drain's time is over; what is left then is cut.",
            "short",
            {"{{pod}}": f"{pod('drain_streams')} or 0 * {pod('draining')}"},
            top=1.0,
            counts=True,
            runbook=thresholds.runbook("VLLMDrainLate"),
            span=6,
        ),
        lines(
            "Share of the drain's time used",
            "Far below 100 %, else streams are cut: raise launch.drain_seconds.",
            "percentunit",
            {"{{pod}}": f"{pod('draining')} * {pod('state_seconds')} / {pod('limit_seconds', _DRAIN)}"},
            limit=alerts["VLLMDrainLate"].share,
            top=1.0,
            runbook=thresholds.runbook("VLLMDrainLate"),
            span=6,
        ),
    ]
    prober = [
        lines(
            "Looks at vLLM's /metrics",
            "ok. Failed ones make the prober blind.",
            "reqps",
            {"{{result}}": f"sum by (result) (rate({ours('scrapes_total')}[{RATE}]))"},
            stacked=True,
            runbook=thresholds.runbook("VLLMProberBlind"),
        ),
        lines(
            "Memory of the prober and launcher",
            "Flat, some 60 MB.",
            "bytes",
            {"{{pod}}": f"max by ({each}) ({process('resident_memory_bytes')})"},
        ),
        lines(
            "Metrics that are shown",
            f"{len(metrics.ALWAYS_SHOWN)} of vLLM's names for each replica that is ready; fewer and some panels are "
            "empty.",
            "short",
            {"{{pod}}": f"count by ({each}) (group by ({each}, __name__) ({select('', OF_POD, vllms)}))"},
            top=float(len(metrics.ALWAYS_SHOWN)),
            counts=True,
            runbook=thresholds.runbook("VLLMMetricsAbsent"),
        ),
    ]
    return panels.board(
        UID,
        "vLLM / Rollout and health",
        "What the prober thinks of each replica, how starts go by, how drains end.",
        [Row("Verdicts", verdicts), Row("Starts", starts), Row("Ends", ends), Row("The prober itself", prober)],
        pods=True,
    )
