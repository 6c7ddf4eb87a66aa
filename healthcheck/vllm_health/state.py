"""Is vLLM well? A pure machine: old state, sample and now give the new state, and a state gives the probes' verdicts.

``now`` is a monotonic clock's. What counts is the time that was watched: a pause between two samples counts for
``Limits.longest_gap_s`` at most, so a prober that was stopped, with its machine or alone, blames nobody for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from vllm_health.limits import DEAD_STRIKES, STALLED_STRIKES, Limits

Name = Literal["starting", "ready", "saturated", "suspect", "stalled", "asleep", "gpu_fault", "draining", "dead"]
Health = Literal["ok", "engine dead", "refused", "unanswered"]
"""vLLM's /health: 200; 503, which it says of a dead engine alone; no connection; anything else.

While an engine hangs it stays "ok" (vllm-project/vllm#39863).
"""

LEAST_MOVEMENT = 1 << 20
"""Bytes from which on a change is a movement."""

API_SERVER = ""
"""In the place of an engine's name where /metrics shows none: then only the API server can be watched."""


class Movement(msgspec.Struct, frozen=True, kw_only=True):
    """What has moved by now in a start: numbers of lines and processes; bytes read, written, in memory, on GPUs."""

    lines: int = 0
    processes: int = 0
    read: int = 0
    written: int = 0
    resident: int = 0
    gpu: int = 0


class Engine(msgspec.Struct, frozen=True, kw_only=True):
    """An engine as /metrics shows it; ``steps`` by name, of ``metrics.STEP_SIGNS``. ``kv_usage`` is a share."""

    steps: Mapping[str, float]
    running: float = 0.0
    waiting: float = 0.0
    kv_usage: float = 0.0
    asleep: bool = False


CanaryKind = Literal["answered", "refused", "inconclusive", "paused"]


class Canary(msgspec.Struct, frozen=True):
    """What became of a one-token request.

    "answered": 200. "refused": the request was wrong, by its key or its model. "inconclusive": an error, or a front
    end that is full. "paused": the engine was told to pause. No answer is no Canary.
    """

    kind: CanaryKind
    detail: str = ""


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """What was seen of vLLM since the sample before; ``engines`` None: /metrics has not answered."""

    health: Health
    engines: Mapping[str, Engine] | None = None
    canaries: Mapping[str, Canary] = {}
    movement: Movement | None = None  # None: nothing of a start can be seen from here
    phase: str = "starting"
    progress: str = ""  # how far the phase has come, in words
    draining: str | None = None  # the sentence that says so
    ended: str | None = None  # as above: vLLM is gone
    gpu_faults: tuple[str, ...] = ()  # fatal ones, a sentence each


class EngineWatch(msgspec.Struct, frozen=True, kw_only=True):
    """An engine under watch; seconds are those that were watched."""

    engine: Engine
    quiet_s: float = 0.0  # since its last step
    asked_s: float | None = None  # since its canary was sent; None: none is out
    attempt: int = 0  # the number of that canary, so that a late answer to another is told apart
    inconclusive: bool = False  # what that canary was answered
    shown: bool = False  # since it was sent /metrics has shown the whole engine
    alive: bool = False  # since it was sent /health has been "ok"
    strikes: int = 0
    paused: bool = False


class State(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of vLLM. ``at`` is the last sample's time, ``since`` that of the last change of ``name``."""

    at: float
    since: float
    began: float
    name: Name = "starting"
    reason: str = "vLLM is not ready yet."
    started: bool = False
    start_s: float = 0.0  # how long the start took, or has taken so far
    phases: Mapping[str, float] = {}  # as above, each phase
    movement: Movement | None = None
    still_s: float = 0.0  # watched, since something moved in the start
    engines: Mapping[str, EngineWatch] = {}
    canary_off: str | None = None  # why none is sent any more


class Transition(msgspec.Struct, frozen=True):
    """A change of state that the owner of the prober acts on: it logs it, or ends vLLM."""

    before: State
    after: State


class Verdicts(msgspec.Struct, frozen=True):
    """True is 200, False is 503."""

    live: bool
    ready: bool
    started: bool


def beginning(now: float) -> State:
    """The state of a vLLM that has just been started."""
    return State(at=now, since=now, began=now)


def verdicts(state: State, limits: Limits) -> Verdicts:
    """What the probes are told. Overload fails none of them; a start or a drain never fails liveness."""
    killing: set[Name] = {"dead", "gpu_fault"} if limits.gpu_fault_kills else {"dead"}
    return Verdicts(
        live=state.name not in killing,
        ready=state.name in {"ready", "saturated", "suspect"},
        started=state.started,
    )


def canaries(state: State) -> dict[str, int]:
    """The one-token requests that must be out now: the number of each, by engine."""
    return {name: watch.attempt for name, watch in state.engines.items() if watch.asked_s is not None}


def advance(state: State, sample: Sample, now: float, limits: Limits) -> State:
    """The state at ``now``, after ``sample``."""
    seen_s = min(max(now - state.at, 0.0), limits.longest_gap_s)
    if state.started and sample.health == "refused" and not (sample.draining or sample.ended):
        after = beginning(now)  # it has begun anew
    elif state.started or sample.health == "ok":
        after = _served(state, sample, seen_s, now, limits)
    else:
        after = _starting(state, sample, seen_s, now)
    name, reason = _judged(after, sample, limits)
    return msgspec.structs.replace(
        after, at=now, name=name, reason=reason, since=state.since if name == state.name else now
    )


def transition(before: State, after: State) -> Transition | None:
    """Return the change of ``name``, or None if there is none.

    Between ready and saturated only the load has changed, so that is None too.
    """
    if before.name == after.name or {before.name, after.name} == {"ready", "saturated"}:
        return None
    return Transition(before, after)


def _starting(state: State, sample: Sample, seen_s: float, now: float) -> State:
    moved = sample.movement is None or has_moved(state.movement, sample.movement)
    return msgspec.structs.replace(
        state,
        start_s=now - state.began,
        phases={**state.phases, sample.phase: state.phases.get(sample.phase, 0.0) + now - state.at},
        movement=sample.movement if moved else state.movement,
        still_s=0.0 if moved else state.still_s + seen_s,
    )


def has_moved(before: Movement | None, after: Movement) -> bool:
    """Return whether start-up has made progress since the last sample.

    CPU time does not count: a deadlocked NCCL or message queue spins. A compiler at work shows in the number of
    processes, their memory and their files, each of which counts from ``LEAST_MOVEMENT`` on.
    """
    if before is None or (before.lines, before.processes) != (after.lines, after.processes):
        return True
    return any(
        abs(getattr(after, name) - getattr(before, name)) >= LEAST_MOVEMENT
        for name in ("read", "written", "resident", "gpu")
    )


def _served(state: State, sample: Sample, seen_s: float, now: float, limits: Limits) -> State:
    """As vLLM serves, from the first 200 of /health on."""
    if not state.started:
        state = msgspec.structs.replace(state, started=True, start_s=now - state.began)
    refusal = next((one.detail for one in sample.canaries.values() if one.kind == "refused"), None)
    off = state.canary_off or refusal
    names = sample.engines or state.engines or {API_SERVER: None}
    canary = limits.stall_s > 0 and off is None and sample.draining is None
    engines = {}
    for name in names:
        watch = state.engines.get(name)
        seen = (sample.engines or {}).get(name)
        if name == API_SERVER and (sample.health == "ok" or watch is None):
            engines[name] = EngineWatch(engine=Engine(steps={}))
        elif watch is None:
            assert seen is not None  # noqa: S101 - `names` are the sample's where the state has none
            engines[name] = EngineWatch(engine=seen)
        else:
            alive = sample.health == "ok"
            engines[name] = _watched(watch, seen, sample.canaries.get(name), seen_s, limits, canary=canary, alive=alive)
    return msgspec.structs.replace(state, engines=engines, canary_off=off)


def _watched(
    old: EngineWatch,
    seen: Engine | None,
    answer: Canary | None,
    seen_s: float,
    limits: Limits,
    *,
    canary: bool,
    alive: bool,
) -> EngineWatch:
    before = old.engine.steps
    stepped = seen is not None and any(before.get(name, value) != value for name, value in seen.steps.items())
    engine = old.engine if seen is None else msgspec.structs.replace(seen, steps={**before, **seen.steps})
    kind = answer.kind if answer else None
    if stepped or kind in {"answered", "paused"} or engine.asleep:
        paused = not stepped and (kind == "paused" or (old.paused and kind is None))
        return EngineWatch(engine=engine, attempt=old.attempt, paused=paused)
    quiet_s = old.quiet_s + seen_s
    if not canary:
        return EngineWatch(engine=engine, quiet_s=quiet_s, paused=old.paused)
    if old.asked_s is None:
        doubt = quiet_s >= (limits.busy_quiet_s if engine.running else limits.idle_quiet_s)
        return msgspec.structs.replace(
            old, engine=engine, quiet_s=quiet_s, asked_s=0.0 if doubt else None, attempt=old.attempt + doubt
        )
    asked_s = old.asked_s + seen_s
    watch = msgspec.structs.replace(
        old,
        engine=engine,
        quiet_s=quiet_s,
        asked_s=asked_s,
        inconclusive=old.inconclusive or kind is not None,
        shown=old.shown or (seen is not None and before.keys() <= seen.steps.keys()),
        alive=old.alive or alive,
    )
    if asked_s < limits.canary_s:
        return watch
    if watch.inconclusive and not (engine.running or engine.waiting):
        # The front end answers for the engine, and nothing says that the engine has anything to do: ask again later.
        return EngineWatch(engine=engine, attempt=old.attempt, strikes=old.strikes)
    # Where /health answers and /metrics cannot be read, the canary may only be waiting behind other requests.
    strike = watch.shown or not watch.alive
    return EngineWatch(
        engine=engine, quiet_s=quiet_s, asked_s=0.0, attempt=old.attempt + 1, strikes=old.strikes + strike
    )


# ---- what it comes to


def _judged(state: State, sample: Sample, limits: Limits) -> tuple[Name, str]:
    """Its name and the sentence for it: the gravest thing that can be said of it."""
    if sample.ended is not None:
        return "dead", sample.ended
    if sample.draining is not None:
        return "draining", sample.draining
    if not state.started:
        return _judged_start(state, sample, limits)
    if sample.health == "engine dead":
        return "dead", "vLLM says that its engine is dead (503 of /health)."
    return _judged_stall(state, sample) or _judged_doubt(state, limits) or _judged_load(state)


def _worst(state: State) -> tuple[str, EngineWatch]:
    return max(state.engines.items(), key=lambda item: (item[1].strikes, item[1].quiet_s))


def _judged_stall(state: State, sample: Sample) -> tuple[Name, str] | None:
    name, worst = _worst(state)
    hangs = f"{_quiet(name, worst)}, and {worst.strikes} one-token requests had no answer: it hangs."
    if worst.strikes >= DEAD_STRIKES:
        return "dead", hangs
    if sample.gpu_faults:
        return "gpu_fault", f"{'; '.join(sample.gpu_faults)}: vLLM is out of rotation, and a restart mends no GPU."
    return ("stalled", hangs) if worst.strikes >= STALLED_STRIKES else None


def _judged_doubt(state: State, limits: Limits) -> tuple[Name, str] | None:
    watches = state.engines.values()
    if all(watch.paused or watch.engine.asleep for watch in watches):
        how = "paused" if any(watch.paused for watch in watches) else "asleep"
        return "asleep", f"vLLM is {how}, as it was told to be: it serves nothing until it is told to go on."
    name, worst = _worst(state)
    if worst.strikes or (worst.asked_s is not None and worst.engine.running):
        unread = [] if worst.shown or not worst.alive else ["/metrics cannot be read meanwhile"]
        asked = [] if worst.asked_s is None else [f"a one-token request has waited for {worst.asked_s:.0f} s"]
        lost = (
            ["one before it had no answer" if asked else "a one-token request had no answer"] if worst.strikes else []
        )
        return "suspect", f"{_quiet(name, worst)}; {', '.join(asked + lost + unread)}."
    if state.canary_off and worst.engine.running and worst.quiet_s >= limits.busy_quiet_s:
        return "suspect", f"{_quiet(name, worst)}, and no one-token request can tell why ({state.canary_off})."
    return None


def _judged_load(state: State) -> tuple[Name, str]:
    engines = [watch.engine for watch in state.engines.values()]
    if API_SERVER in state.engines:
        return "ready", "vLLM serves; its /metrics shows no engine, so an engine that hangs would not be seen."
    running, waiting = (sum(getattr(one, field) for one in engines) for field in ("running", "waiting"))
    load = f"{running:.0f} requests run, {waiting:.0f} wait, KV cache {max(one.kv_usage for one in engines):.0%} full"
    if all(one.waiting for one in engines):
        return "saturated", f"vLLM serves as much as it can: {load}."
    return "ready", f"vLLM serves: {load}."


def _judged_start(state: State, sample: Sample, limits: Limits) -> tuple[Name, str]:
    if 0 < limits.start_stall_s <= state.still_s:
        return "dead", (
            f"The start stands still: in phase '{sample.phase}' for {state.still_s:.0f} s no log line, "
            "no bytes read or written, no change of memory."
        )
    progress = f": {sample.progress}" if sample.progress else ""
    blind = " (from here nobody can see whether it moves)" if sample.movement is None else ""
    return "starting", f"vLLM is not ready yet{progress}{blind}."


def _quiet(name: str, watch: EngineWatch) -> str:
    who = f"Engine {name}" if name else "The API server"
    load = f" with {watch.engine.running:.0f} requests running and {watch.engine.waiting:.0f} waiting" if name else ""
    what = "made no step" if name else "answered nothing"
    return f"{who} has {what} for {watch.quiet_s:.0f} s{load}"
