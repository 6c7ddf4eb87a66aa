"""Derives the name of vLLM's state, the reason in words and the probes' answers from what the prober knows. Pure."""

from __future__ import annotations

import msgspec

from vllm_health import state
from vllm_health.limits import DEAD_STRIKES, STALLED_STRIKES, Limits
from vllm_health.state import API_SERVER, EngineWatch, Name, Sample, State

DEAD_REPORTS = 2
"""Number of times in a row that /health must report a dead engine. A proxy can send one empty 503."""


class Transition(msgspec.Struct, frozen=True):
    """A change of state. The owner of the prober logs it, or ends vLLM."""

    before: State
    after: State


class Verdicts(msgspec.Struct, frozen=True):
    """The answers of /livez, /readyz and /startupz: True is 200, False is 503."""

    live: bool
    ready: bool
    started: bool


def verdicts(known: State, limits: Limits) -> Verdicts:
    """Return the probes' answers. Overload fails no probe.

    A drain never fails liveness. A start fails liveness only if the launcher sees no progress for ``start_stall_s``.
    """
    not_live: set[Name] = {"dead", "gpu_fault"} if limits.gpu_fault_kills else {"dead"}
    return Verdicts(
        live=known.name not in not_live,
        ready=known.name in {"ready", "saturated", "suspect"},
        started=known.started,
    )


def advance(known: State, sample: Sample, now: float, limits: Limits) -> State:
    """Return the state at ``now``, after ``sample``."""
    after = state.watch(known, sample, now, limits)
    name, reason = _judged(after, sample, limits)
    return msgspec.structs.replace(after, name=name, reason=reason, since=known.since if name == known.name else now)


def transition(before: State, after: State) -> Transition | None:
    """Return the change of ``name``, or None if there is none.

    A change between ready and saturated is a change of load only. It returns None too.
    """
    if before.name == after.name or {before.name, after.name} == {"ready", "saturated"}:
        return None
    return Transition(before, after)


def _judged(known: State, sample: Sample, limits: Limits) -> tuple[Name, str]:
    """Return the state's name and the reason for it, for the user.

    The first check that applies wins. So a drain hides a hang.
    """
    if sample.ended is not None:
        return "dead", sample.ended
    if sample.draining is not None:
        return "draining", sample.draining
    if not known.started:
        return _judged_start(known, sample, limits)
    if known.dead_reports >= DEAD_REPORTS:
        return "dead", "vLLM reports that its engine is dead (503 from /health)."
    return _judged_stall(known, sample) or _judged_doubt(known, sample, limits) or _judged_load(known)


def _judged_stall(known: State, sample: Sample) -> tuple[Name, str] | None:
    name, worst = max(known.engines.items(), key=lambda item: (item[1].strikes, item[1].quiet_s))
    hangs = f"{_quiet(name, worst)}, and {worst.strikes} one-token requests of the prober got no answer: it hangs."
    if worst.strikes >= DEAD_STRIKES:
        return "dead", hangs
    if sample.gpu_faults:
        faults = "; ".join(sample.gpu_faults)
        remedy = "A restart of vLLM does not repair a GPU: reset the GPU, or reboot the host."
        return "gpu_fault", f"{faults}: /readyz fails. {remedy}"
    return ("stalled", hangs) if worst.strikes >= STALLED_STRIKES else None


def _judged_doubt(known: State, sample: Sample, limits: Limits) -> tuple[Name, str] | None:
    if sample.health in {"unavailable", "engine dead"}:
        said = f" ({sample.health_detail})" if sample.health_detail else ""
        return "unavailable", f"/health answers 503{said}. No hang can be detected until it answers 200."
    watches = known.engines.values()
    if all(watch.paused or watch.engine.asleep for watch in watches):
        how = "paused" if any(watch.paused for watch in watches) else "asleep"
        resume = "/resume" if how == "paused" else "/wake_up"
        return "asleep", f"vLLM is {how} at its operator's request. It serves nothing until POST {resume}."
    doubted = {name: watch for name, watch in known.engines.items() if _is_doubted(watch, limits)}
    if not doubted:
        return None
    name, worst = max(doubted.items(), key=lambda item: (item[1].strikes, item[1].quiet_s))
    return "suspect", f"{_quiet(name, worst)}{_evidence(worst)}."


def _is_doubted(watch: EngineWatch, limits: Limits) -> bool:
    """Whether the engine may hang: a canary got no answer, or requests run and the engine makes no step."""
    awaits_answer = watch.canary_age_s is not None and watch.engine.running > 0
    too_quiet = limits.stall_s > 0 and watch.engine.running > 0 and watch.quiet_s >= limits.busy_quiet_s
    return bool(watch.strikes) or awaits_answer or too_quiet


def _evidence(watch: EngineWatch) -> str:
    """Return what is known of the canaries of an engine that may hang: the second half of a sentence."""
    if watch.problem:
        return f". The prober cannot confirm a hang: {watch.problem}"
    age_s = watch.canary_age_s
    pending = [] if age_s is None else [f"a one-token request of the prober has waited for {age_s:.0f} s"]
    earlier = "the request before it" if pending else "a one-token request of the prober"
    unanswered = [f"{earlier} got no answer"] if watch.strikes else []
    unread = ["/metrics cannot be read"] if pending and watch.health_seen and not watch.metrics_seen else []
    facts = pending + unanswered + unread
    return f"; {', '.join(facts)}" if facts else ""


def _judged_load(known: State) -> tuple[Name, str]:
    problem = next((watch.problem for watch in known.engines.values() if watch.problem), "")
    unwatched = f" The prober cannot confirm a hang: {problem}." if problem else ""
    if API_SERVER in known.engines:
        absent = "/metrics has no engine metrics, so the prober cannot detect an engine that hangs"
        return "ready", f"vLLM serves. {absent}: remove --disable-log-stats.{unwatched}"
    engines = [watch.engine for watch in known.engines.values()]
    running, waiting = (sum(getattr(engine, field) for engine in engines) for field in ("running", "waiting"))
    usage = max(engine.kv_usage for engine in engines)
    load = f"{running:.0f} running and {waiting:.0f} waiting requests, KV cache usage {usage:.0%}"
    if all(engine.waiting and engine.running for engine in engines):
        return "saturated", f"vLLM serves as much as it can: {load}.{unwatched}"
    return "ready", f"vLLM serves: {load}.{unwatched}"


def _judged_start(known: State, sample: Sample, limits: Limits) -> tuple[Name, str]:
    if 0 < limits.start_stall_s <= known.start_quiet_s:
        stuck = f"Start-up is stuck in phase '{sample.phase}': it has made no progress for {known.start_quiet_s:.0f} s"
        return "dead", f"{stuck} (no log line, no bytes read or written, no change of memory)."
    progress = f": {sample.progress}" if sample.progress else ""
    hidden = "" if sample.movement else " (the prober cannot see whether start-up makes progress)"
    answer = f" /health answers {sample.health_detail}." if sample.health_detail else ""
    return "starting", f"vLLM is not ready yet{progress}{hidden}.{answer}"


def _quiet(name: str, watch: EngineWatch) -> str:
    """Return how long an engine, or the API server, has been quiet: the first half of a sentence."""
    if not name:
        return f"The API server has answered nothing for {watch.quiet_s:.0f} s"
    load = f"{watch.engine.running:.0f} running and {watch.engine.waiting:.0f} waiting requests"
    return f"Engine {name} has made no step for {watch.quiet_s:.0f} s with {load}"
