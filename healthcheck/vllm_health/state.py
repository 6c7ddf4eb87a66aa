"""The state machine of vLLM's health. Pure: ``advance`` returns the next state, ``verdicts`` the probes' answers.

``now`` is the time of a monotonic clock, in seconds. Only watched time counts: a pause between two samples counts for
``Limits.longest_gap_s`` at most. So time in which the prober was stopped, alone or with its machine, is never taken
for a hang of vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from vllm_health.limits import DEAD_STRIKES, STALLED_STRIKES, Limits

Name = Literal["starting", "ready", "saturated", "suspect", "stalled", "asleep", "gpu_fault", "draining", "dead"]
Health = Literal["ok", "engine dead", "refused", "unanswered"]
"""The result of asking vLLM's /health.

"ok": 200. "engine dead": 503, which vLLM sends only when its engine is dead. "refused": the connection was refused.
"unanswered": anything else. While an engine hangs, the result stays "ok" (vllm-project/vllm#39863).
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

    ``steps``: the values of the metrics in ``metrics.STEP_SIGNS``, by metric name.
    ``kv_usage``: KV cache usage, 0 to 1.
    """

    steps: Mapping[str, float]
    running: float = 0.0
    waiting: float = 0.0
    kv_usage: float = 0.0
    asleep: bool = False


CanaryKind = Literal["answered", "refused", "inconclusive", "paused"]


class CanaryResult(msgspec.Struct, frozen=True):
    """The result of a canary, which is a one-token request of the prober. A canary without an answer has no result.

    "answered": 200. "refused": the API key or the model's name is wrong. "inconclusive": another error, or the API
    server is full. "paused": an operator has paused the engine.
    """

    kind: CanaryKind
    detail: str = ""


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """Observations of vLLM since the previous sample. ``engines`` is None if /metrics has not answered."""

    health: Health
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
    metrics_seen: bool = False  # /metrics has shown all of the engine's step signs since the canary was sent
    health_seen: bool = False  # /health has been "ok" since the canary was sent
    # Canaries that the engine has not answered since its last step or answer. A canary does not count if /health
    # answered but /metrics did not.
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
    canary_off: str | None = None  # why the prober sends no more canaries. None: it sends them


class Transition(msgspec.Struct, frozen=True):
    """A change of state. The owner of the prober logs it, or ends vLLM."""

    before: State
    after: State


class Verdicts(msgspec.Struct, frozen=True):
    """The answers of /livez, /readyz and /startupz: True is 200, False is 503."""

    live: bool
    ready: bool
    started: bool


def initial(now: float) -> State:
    """Return the state of a vLLM that has just been started."""
    return State(sampled_at=now, since=now, began=now)


def verdicts(state: State, limits: Limits) -> Verdicts:
    """Return the probes' answers.

    Overload fails no probe. A drain never fails liveness. A start fails liveness only if it makes no progress for
    ``start_stall_s``.
    """
    not_live: set[Name] = {"dead", "gpu_fault"} if limits.gpu_fault_kills else {"dead"}
    return Verdicts(
        live=state.name not in not_live,
        ready=state.name in {"ready", "saturated", "suspect"},
        started=state.started,
    )


def canaries(state: State) -> dict[str, int]:
    """Return, by engine, the attempt number of the canary that must be pending now."""
    return {name: watch.attempt for name, watch in state.engines.items() if watch.canary_age_s is not None}


def advance(state: State, sample: Sample, now: float, limits: Limits) -> State:
    """Return the state at ``now``, after ``sample``."""
    watched_s = min(max(now - state.sampled_at, 0.0), limits.longest_gap_s)
    if state.started and sample.health == "refused" and not (sample.draining or sample.ended):
        after = initial(now)  # vLLM has been restarted
    elif state.started or sample.health == "ok":
        after = _served(state, sample, watched_s, now, limits)
    else:
        after = _starting(state, sample, watched_s, now)
    name, reason = _judged(after, sample, limits)
    return msgspec.structs.replace(
        after, sampled_at=now, name=name, reason=reason, since=state.since if name == state.name else now
    )


def transition(before: State, after: State) -> Transition | None:
    """Return the change of ``name``, or None if there is none.

    A change between ready and saturated is a change of load only. It returns None too.
    """
    if before.name == after.name or {before.name, after.name} == {"ready", "saturated"}:
        return None
    return Transition(before, after)


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
    refusal = next((canary.detail for canary in sample.canaries.values() if canary.kind == "refused"), None)
    canary_off = state.canary_off or refusal
    names = sample.engines or state.engines or {API_SERVER: None}
    may_ask = limits.stall_s > 0 and canary_off is None and sample.draining is None
    engines = {}
    for name in names:
        watch = state.engines.get(name)
        shown = (sample.engines or {}).get(name)
        if name == API_SERVER and (sample.health == "ok" or watch is None):
            engines[name] = EngineWatch(engine=Engine(steps={}))
        elif watch is None:
            assert shown is not None  # noqa: S101 - a name without a watch comes from ``sample.engines``
            engines[name] = EngineWatch(engine=shown)
        else:
            answer, health_ok = sample.canaries.get(name), sample.health == "ok"
            engines[name] = _watched(watch, shown, answer, watched_s, limits, may_ask=may_ask, health_ok=health_ok)
    return msgspec.structs.replace(state, engines=engines, canary_off=canary_off)


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
    before = old.engine.steps
    stepped = shown is not None and any(before.get(name, value) != value for name, value in shown.steps.items())
    engine = old.engine if shown is None else msgspec.structs.replace(shown, steps={**before, **shown.steps})
    kind = answer.kind if answer else None
    if stepped or kind in {"answered", "paused"} or engine.asleep:
        paused = not stepped and (kind == "paused" or (old.paused and kind is None))
        return EngineWatch(engine=engine, attempt=old.attempt, paused=paused)
    quiet_s = old.quiet_s + watched_s
    if not may_ask:
        return EngineWatch(engine=engine, quiet_s=quiet_s, paused=old.paused)
    if old.canary_age_s is None:
        due = quiet_s >= (limits.busy_quiet_s if engine.running else limits.idle_quiet_s)
        return msgspec.structs.replace(
            old, engine=engine, quiet_s=quiet_s, canary_age_s=0.0 if due else None, attempt=old.attempt + due
        )
    canary_age_s = old.canary_age_s + watched_s
    watch = msgspec.structs.replace(
        old,
        engine=engine,
        quiet_s=quiet_s,
        canary_age_s=canary_age_s,
        inconclusive=old.inconclusive or kind is not None,
        metrics_seen=old.metrics_seen or (shown is not None and before.keys() <= shown.steps.keys()),
        health_seen=old.health_seen or health_ok,
    )
    if canary_age_s < limits.canary_s:
        return watch
    if watch.inconclusive and not (engine.running or engine.waiting):
        # The API server sent this answer, not the engine, and the engine has no work. The next canary is sent later.
        return EngineWatch(engine=engine, attempt=old.attempt, strikes=old.strikes)
    # If /health answers but /metrics does not, the canary may still be in the queue. That is no strike.
    strike = watch.metrics_seen or not watch.health_seen
    return EngineWatch(
        engine=engine, quiet_s=quiet_s, canary_age_s=0.0, attempt=old.attempt + 1, strikes=old.strikes + strike
    )


# ---- the state's name and reason


def _judged(state: State, sample: Sample, limits: Limits) -> tuple[Name, str]:
    """Return the state's name and the reason for it, for the user. The most severe state wins."""
    if sample.ended is not None:
        return "dead", sample.ended
    if sample.draining is not None:
        return "draining", sample.draining
    if not state.started:
        return _judged_start(state, sample, limits)
    if sample.health == "engine dead":
        return "dead", "vLLM reports that its engine is dead (503 from /health)."
    return _judged_stall(state, sample) or _judged_doubt(state, limits) or _judged_load(state)


def _worst(state: State) -> tuple[str, EngineWatch]:
    """Return the engine with the most strikes, then the longest time without a step, and its name."""
    return max(state.engines.items(), key=lambda item: (item[1].strikes, item[1].quiet_s))


def _judged_stall(state: State, sample: Sample) -> tuple[Name, str] | None:
    name, worst = _worst(state)
    hangs = f"{_quiet(name, worst)}, and {worst.strikes} one-token requests of the prober got no answer: it hangs."
    if worst.strikes >= DEAD_STRIKES:
        return "dead", hangs
    if sample.gpu_faults:
        faults = "; ".join(sample.gpu_faults)
        remedy = "A restart of vLLM does not repair a GPU: reset the GPU, or reboot the host."
        return "gpu_fault", f"{faults}: /readyz fails. {remedy}"
    return ("stalled", hangs) if worst.strikes >= STALLED_STRIKES else None


def _judged_doubt(state: State, limits: Limits) -> tuple[Name, str] | None:
    watches = state.engines.values()
    if all(watch.paused or watch.engine.asleep for watch in watches):
        how = "paused" if any(watch.paused for watch in watches) else "asleep"
        resume = "/resume" if how == "paused" else "/wake_up"
        return "asleep", f"vLLM is {how} at its operator's request. It serves nothing until POST {resume}."
    name, worst = _worst(state)
    age_s = worst.canary_age_s
    if worst.strikes or (age_s is not None and worst.engine.running):
        unread = [] if worst.metrics_seen or not worst.health_seen else ["/metrics cannot be read"]
        pending = [] if age_s is None else [f"a one-token request of the prober has waited for {age_s:.0f} s"]
        earlier = "the request before it" if pending else "a one-token request of the prober"
        unanswered = [f"{earlier} got no answer"] if worst.strikes else []
        return "suspect", f"{_quiet(name, worst)}; {', '.join(pending + unanswered + unread)}."
    if state.canary_off and worst.engine.running and worst.quiet_s >= limits.busy_quiet_s:
        refused = f"The server refuses one-token requests of the prober ({state.canary_off})."
        return "suspect", f"{_quiet(name, worst)}. {refused}"
    return None


def _judged_load(state: State) -> tuple[Name, str]:
    engines = [watch.engine for watch in state.engines.values()]
    if API_SERVER in state.engines:
        blind = "/metrics has no engine metrics, so the prober cannot detect an engine that hangs"
        return "ready", f"vLLM serves. {blind}: remove --disable-log-stats."
    running, waiting = (sum(getattr(engine, field) for engine in engines) for field in ("running", "waiting"))
    usage = max(engine.kv_usage for engine in engines)
    load = f"{running:.0f} running and {waiting:.0f} waiting requests, KV cache usage {usage:.0%}"
    if all(engine.waiting for engine in engines):
        return "saturated", f"vLLM serves as much as it can: {load}."
    return "ready", f"vLLM serves: {load}."


def _judged_start(state: State, sample: Sample, limits: Limits) -> tuple[Name, str]:
    if 0 < limits.start_stall_s <= state.start_quiet_s:
        return "dead", _stuck_start(sample, state.start_quiet_s)
    progress = f": {sample.progress}" if sample.progress else ""
    hidden = " (the prober cannot see whether start-up makes progress)" if sample.movement is None else ""
    return "starting", f"vLLM is not ready yet{progress}{hidden}."


def _stuck_start(sample: Sample, quiet_s: float) -> str:
    """Return the reason of a stuck start: the phase, and the signs of progress that were watched.

    The launcher sees vLLM's log and processes. A sidecar sees only GPU memory, and it does not know the phase.
    """
    if sample.movement is not None and sample.movement.processes:
        phase, absent = f" in phase '{sample.phase}'", "no log line, no bytes read or written, no change of memory"
    else:
        phase, absent = "", "no change of the used GPU memory"
    return f"Start-up is stuck{phase}: it has made no progress for {quiet_s:.0f} s ({absent})."


def _quiet(name: str, watch: EngineWatch) -> str:
    """Return how long an engine, or the API server, has been quiet: the first half of a sentence."""
    if not name:
        return f"The API server has answered nothing for {watch.quiet_s:.0f} s"
    load = f"{watch.engine.running:.0f} running and {watch.engine.waiting:.0f} waiting requests"
    return f"Engine {name} has made no step for {watch.quiet_s:.0f} s with {load}"
