"""The state machine of vLLM's health. Pure: ``advance`` returns the next state, ``verdicts`` the probes' answers.

``now`` is the time of a monotonic clock, in seconds. Only watched time counts: a pause between two samples counts for
``Limits.longest_gap_s`` at most. So time in which the prober was stopped, alone or with its machine, is never taken
for a hang of vLLM.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import msgspec

from vllm_health.limits import Limits

Name = Literal[
    "starting", "ready", "saturated", "suspect", "stalled", "unavailable", "asleep", "gpu_fault", "draining", "dead"
]
Health = Literal["ok", "engine dead", "unavailable", "refused", "unanswered"]
"""The result of asking vLLM's /health.

"ok": 200. "engine dead": 503 without a body, as vLLM sends it when its engine is dead
(entrypoints/serve/instrumentator/health.py). "unavailable": 503 with a body, from a proxy, or from vLLM while it
changes its number of engines. "refused": the connection was refused. "unanswered": anything else. While an engine
hangs, the result stays "ok" (vllm-project/vllm#39863).
"""

MIN_MOVEMENT_BYTES = 1 << 20
"""Smallest change, in bytes, that counts as progress of start-up."""

API_SERVER = ""
"""Stands for an engine's name where /metrics shows no engine. Then the prober can watch only the API server."""


class Movement(msgspec.Struct, frozen=True, kw_only=True):
    """Signs of progress during start-up, as they are at one moment.

    ``lines``: log lines so far. ``processes``: number of processes. The others are bytes: ``read``, ``written``,
    ``resident`` memory, and ``gpu`` memory in use.
    """

    lines: int = 0
    processes: int = 0
    read: int = 0
    written: int = 0
    resident: int = 0
    gpu: int = 0


class Engine(msgspec.Struct, frozen=True, kw_only=True):
    """An engine as /metrics shows it.

    ``steps``: the values of the metrics in ``metrics.STEP_SIGNS``, by metric name. ``gauges``: the same of
    ``metrics.GAUGE_SIGNS``. ``kv_usage``: KV cache usage, 0 to 1.
    """

    steps: Mapping[str, float]
    gauges: Mapping[str, float] = {}
    preemptions: float = 0.0
    running: float = 0.0
    waiting: float = 0.0
    kv_usage: float = 0.0
    asleep: bool = False


CanaryKind = Literal["answered", "refused", "inconclusive", "paused", "failed"]


class CanaryResult(msgspec.Struct, frozen=True):
    """The result of a canary, which is a one-token request of the prober. A canary without an answer has no result.

    "answered": 200. "refused": a status of 400 to 499 except 429, for example for a wrong API key or model name.
    "inconclusive": another error, or the API server is full. "paused": an operator has paused the engine. "failed": the
    request ended before an answer, for a reason that says nothing about vLLM: the connection was refused or reset, the
    name is unknown, or the prober has no free file descriptor.
    """

    kind: CanaryKind
    detail: str = ""


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """Observations of vLLM since the previous sample. ``engines`` is None if /metrics has not answered."""

    health: Health
    health_detail: str = ""  # what /health answered instead of 200
    engines: Mapping[str, Engine] | None = None
    canaries: Mapping[str, CanaryResult] = {}
    movement: Movement | None = None  # None: the prober cannot see the progress of start-up
    phase: str = "starting"
    progress: str = ""  # progress of the phase, in words
    draining: str | None = None  # why vLLM drains, one sentence. None: it does not drain
    ended: str | None = None  # why vLLM has ended, one sentence. None: it has not
    gpu_faults: tuple[str, ...] = ()  # one sentence for each fatal fault


class EngineWatch(msgspec.Struct, frozen=True, kw_only=True):
    """What the prober knows of one engine. Durations are in watched seconds."""

    engine: Engine
    quiet_s: float = 0.0  # since its last step
    canary_age_s: float | None = None  # since its canary was sent. None: no canary is pending
    attempt: int = 0  # number of the last canary. It tells a late answer to an earlier canary apart
    inconclusive: bool = False  # the pending canary got an inconclusive answer
    failed: bool = False  # the pending canary failed
    problem: str = ""  # why the last canary was refused or failed. "": it was neither
    ask_again_s: float = 0.0  # watched seconds until a refused canary is tried again
    preempted_s: float = math.inf  # since the engine last preempted a request
    metrics_seen: bool = False  # /metrics has shown all of the engine's step signs since the canary was sent
    health_seen: bool = False  # /health has been "ok" since the canary was sent
    # Canaries that the engine has not answered since its last step or answer. A canary does not count if it failed, or
    # if /health answered but /metrics did not.
    strikes: int = 0
    paused: bool = False


class State(msgspec.Struct, frozen=True, kw_only=True):
    """What the prober knows of vLLM. Times are the monotonic clock's, in seconds."""

    sampled_at: float  # time of the last sample
    since: float  # time of the last change of ``name``
    began: float  # time when vLLM was started
    name: Name = "starting"
    reason: str = "vLLM is not ready yet."
    started: bool = False
    start_s: float = 0.0  # seconds that start-up took, or has taken so far
    phases: Mapping[str, float] = {}  # the same for each phase of start-up
    movement: Movement | None = None  # the last one that showed progress
    start_quiet_s: float = 0.0  # watched seconds since start-up last made progress
    engines: Mapping[str, EngineWatch] = {}
    dead_reports: int = 0  # how often in a row /health has been "engine dead"


def initial(now: float) -> State:
    """Return the state of a vLLM that has just been started."""
    return State(sampled_at=now, since=now, began=now)


def canaries(state: State) -> dict[str, int]:
    """Return, by engine, the attempt number of the canary that must be pending now."""
    return {name: watch.attempt for name, watch in state.engines.items() if watch.canary_age_s is not None}


def watch(state: State, sample: Sample, now: float, limits: Limits) -> State:
    """Return the state at ``now``, after ``sample``, with the old ``name`` and ``reason``."""
    watched_s = min(max(now - state.sampled_at, 0.0), limits.longest_gap_s)
    if state.started and sample.health == "refused" and not (sample.draining or sample.ended):
        after = initial(now)  # vLLM has been restarted
    elif state.started or sample.health == "ok":
        after = _served(state, sample, watched_s, now, limits)
    else:
        after = _starting(state, sample, watched_s, now)
    dead_reports = state.dead_reports + 1 if sample.health == "engine dead" else 0
    return msgspec.structs.replace(after, sampled_at=now, dead_reports=dead_reports)


def _starting(state: State, sample: Sample, watched_s: float, now: float) -> State:
    """Return the state after a sample during start-up, with the old ``name`` and ``reason``."""
    moved = sample.movement is None or has_moved(state.movement, sample.movement)
    return msgspec.structs.replace(
        state,
        start_s=now - state.began,
        phases={**state.phases, sample.phase: state.phases.get(sample.phase, 0.0) + now - state.sampled_at},
        movement=sample.movement if moved else state.movement,
        start_quiet_s=0.0 if moved else state.start_quiet_s + watched_s,
    )


def has_moved(before: Movement | None, after: Movement) -> bool:
    """Return whether start-up has made progress between ``before`` and ``after``.

    CPU time does not count, because a deadlocked NCCL or message queue spins. A running compiler changes the number of
    processes, their memory or their files. Changes in bytes count from ``MIN_MOVEMENT_BYTES`` on.
    """
    if before is None or (before.lines, before.processes) != (after.lines, after.processes):
        return True
    return any(
        abs(getattr(after, name) - getattr(before, name)) >= MIN_MOVEMENT_BYTES
        for name in ("read", "written", "resident", "gpu")
    )


def _served(state: State, sample: Sample, watched_s: float, now: float, limits: Limits) -> State:
    """Return the state after a sample of a vLLM that serves, with the old ``name`` and ``reason``.

    vLLM serves from its first 200 of /health on.
    """
    if not state.started:
        state = msgspec.structs.replace(state, started=True, start_s=now - state.began)
    names = sample.engines or state.engines or {API_SERVER: None}
    # Behind a 503 a canary asks a proxy, or a server that answers 503 to everything.
    may_ask = limits.stall_s > 0 and sample.draining is None and sample.health not in {"unavailable", "engine dead"}
    engines = {}
    for name in names:
        known = state.engines.get(name)
        shown = (sample.engines or {}).get(name)
        if name == API_SERVER and (sample.health == "ok" or known is None):
            engines[name] = EngineWatch(engine=Engine(steps={}))
        elif known is None:
            assert shown is not None  # noqa: S101 - a name without a watch comes from ``sample.engines``
            engines[name] = EngineWatch(engine=shown)
        else:
            answer, health_ok = sample.canaries.get(name), sample.health == "ok"
            engines[name] = _watched(known, shown, answer, watched_s, limits, may_ask=may_ask, health_ok=health_ok)
    return msgspec.structs.replace(state, engines=engines)


def _watched(
    old: EngineWatch,
    shown: Engine | None,
    answer: CanaryResult | None,
    watched_s: float,
    limits: Limits,
    *,
    may_ask: bool,
    health_ok: bool,
) -> EngineWatch:
    """Return the watch of an engine after a sample.

    ``shown``: the engine in this sample's /metrics. ``answer``: its canary's. ``watched_s``: seconds since the
    previous sample. ``may_ask``: a canary may be sent. ``health_ok``: /health is "ok".
    """
    kind = answer.kind if answer else None
    stepped, preempted_s = _steps(old, shown, watched_s, limits)
    engine = old.engine if shown is None else _merged(old.engine, shown)
    problem, ask_again_s = old.problem, max(0.0, old.ask_again_s - watched_s)
    if answer and kind in {"refused", "failed"}:
        problem, ask_again_s = answer.detail, limits.refused_retry_s if kind == "refused" else 0.0
    elif kind in {"answered", "paused"}:
        problem, ask_again_s = "", 0.0
    new = EngineWatch(
        engine=engine, attempt=old.attempt, problem=problem, ask_again_s=ask_again_s, preempted_s=preempted_s
    )
    if stepped or kind in {"answered", "paused"} or engine.asleep:
        paused = not stepped and (kind == "paused" or (old.paused and kind is None))
        return msgspec.structs.replace(new, paused=paused)
    quiet_s = old.quiet_s + watched_s
    new = msgspec.structs.replace(new, quiet_s=quiet_s, paused=old.paused, strikes=old.strikes)
    if not may_ask or ask_again_s:
        return new
    if old.canary_age_s is None:
        due = quiet_s >= (limits.busy_quiet_s if engine.running else limits.idle_quiet_s)
        return msgspec.structs.replace(new, canary_age_s=0.0, attempt=old.attempt + 1) if due else new
    canary_age_s = old.canary_age_s + watched_s
    new = msgspec.structs.replace(
        new,
        canary_age_s=canary_age_s,
        inconclusive=old.inconclusive or kind == "inconclusive",
        failed=old.failed or kind == "failed",
        metrics_seen=old.metrics_seen or (shown is not None and _shows_all(shown, old.engine)),
        health_seen=old.health_seen or health_ok,
    )
    return new if canary_age_s < limits.canary_s else _after_canary(new)


def _steps(old: EngineWatch, shown: Engine | None, watched_s: float, limits: Limits) -> tuple[bool, float]:
    """Return whether the engine has made a step for a request, and the seconds since it preempted one.

    An engine that preempts requests again and again changes its gauges and produces no token. So the gauges do not
    count soon after a preemption.
    """
    if shown is None:
        return False, old.preempted_s + watched_s
    preempted_s = 0.0 if shown.preemptions != old.engine.preemptions else old.preempted_s + watched_s
    moved = _changed(old.engine.steps, shown.steps)
    return moved or (preempted_s >= limits.busy_quiet_s and _changed(old.engine.gauges, shown.gauges)), preempted_s


def _merged(before: Engine, shown: Engine) -> Engine:
    """Return ``shown`` with the signs that only ``before`` has: a sign that is missing once has not changed."""
    steps, gauges = {**before.steps, **shown.steps}, {**before.gauges, **shown.gauges}
    return msgspec.structs.replace(shown, steps=steps, gauges=gauges)


def _shows_all(shown: Engine, before: Engine) -> bool:
    return before.steps.keys() <= shown.steps.keys() and before.gauges.keys() <= shown.gauges.keys()


def _changed(before: Mapping[str, float], after: Mapping[str, float]) -> bool:
    return any(before.get(name, value) != value for name, value in after.items())


def _after_canary(ended: EngineWatch) -> EngineWatch:
    """Return the watch after the time of the pending canary is up, with the next canary where one is due."""
    engine = ended.engine
    rest = msgspec.structs.replace(
        ended, canary_age_s=None, inconclusive=False, failed=False, metrics_seen=False, health_seen=False
    )
    if ended.inconclusive and not (engine.running or engine.waiting):
        # The API server sent this answer, not the engine, and the engine has no work. The next canary is sent later.
        return msgspec.structs.replace(rest, quiet_s=0.0)
    # If /health answers but /metrics does not, the canary may still be in the queue. That is no strike. A canary that
    # failed says nothing about vLLM.
    strike = (ended.metrics_seen or not ended.health_seen) and not ended.failed
    return msgspec.structs.replace(rest, canary_age_s=0.0, attempt=ended.attempt + 1, strikes=ended.strikes + strike)
