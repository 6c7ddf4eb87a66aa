"""The loop that watches one vLLM: sample, judge, send canaries. Speaks HTTP and reads the monotonic clock."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Final

import aiohttp
import msgspec

from vllm_health import gpu_faults, judgement, metrics, scrape, state
from vllm_health.limits import Limits
from vllm_health.state import CanaryResult, Movement

START_INTERVAL_S: Final = 0.5
"""Seconds between two samples during start-up. It is short because readiness must not be noticed late. It costs little
because a closed port answers at once."""
DRAIN_INTERVAL_S: Final = 1.0
"""Seconds between two samples during a drain."""


class Surroundings(msgspec.Struct, frozen=True, kw_only=True):
    """Facts about vLLM that do not come over HTTP. The launcher, vLLM's parent, knows all of them, a sidecar only some.

    ``weights_bytes``, ``loaded_bytes`` and ``remaining_s`` belong to start-up. The others are those of
    ``state.Sample``. ``gpus``: the last report, or None if the owner reads no GPUs.
    """

    movement: Movement | None = None
    phase: str = "starting"
    progress: str = ""
    weights_bytes: int | None = None
    loaded_bytes: int | None = None
    remaining_s: float | None = None
    draining: str | None = None
    ended: str | None = None
    gpus: gpu_faults.Report | None = None


class Prober:
    """Watches one vLLM until ``run`` is cancelled. ``state`` and ``engine_metrics`` hold what it knows.

    ``transitions`` holds every ``judgement.Transition``, in order. The owner takes them out and acts on them in its own
    task. The prober never waits for the owner.

    ``surroundings`` returns the facts that do not come over HTTP. It must not block. ``on_note`` is called once for
    each warning to the operator. No verdict depends on these warnings.
    """

    def __init__(
        self,
        target: scrape.Target,
        limits: Limits,
        surroundings: Callable[[], Surroundings],
        *,
        on_note: Callable[[str], None],
        planned_kv_tokens: int | None = None,
        planned_gpus: int | None = None,
    ) -> None:
        self.target, self.limits = target, limits
        self.state = state.initial(time.monotonic())
        self.transitions: asyncio.Queue[judgement.Transition] = asyncio.Queue()
        self.engine_metrics = scrape.EngineMetrics()
        self._surroundings = Surroundings()
        self._read_surroundings, self._on_note = surroundings, on_note
        self._planned = {"kv_cache_planned_tokens": planned_kv_tokens, "planned_gpus": planned_gpus}
        bounds = {"stall": limits.stall_s, "start_stall": limits.start_stall_s, "drain": limits.drain_s}
        self._bounds = {name: seconds for name, seconds in bounds.items() if seconds}
        self._health: state.Health = "unanswered"
        self._health_detail = ""
        self._noted: set[str] = set()
        self._scrape: asyncio.Task[scrape.Answer] | None = None
        self._canaries: dict[str, tuple[int, asyncio.Task[CanaryResult | None]]] = {}
        self._counts = {name: Counter(dict.fromkeys(results, 0)) for name, results in metrics.RESULTS.items()}

    async def run(self) -> None:
        """Watch until cancelled."""
        async with scrape.session() as session:
            try:
                while True:
                    began = time.monotonic()
                    await self._step(session)
                    await asyncio.sleep(max(self._interval_s() - (time.monotonic() - began), 0.05))
            finally:
                canaries = [task for _, task in self._canaries.values()]
                pending = [task for task in (self._scrape, *canaries) if task]
                for task in pending:
                    task.cancel()
                await asyncio.gather(*pending, return_exceptions=True)

    def _interval_s(self) -> float:
        if self.state.name == "draining":
            return min(DRAIN_INTERVAL_S, self.limits.interval_s)
        return self.limits.interval_s if self.state.started else min(START_INTERVAL_S, self.limits.interval_s)

    async def _step(self, session: aiohttp.ClientSession) -> None:
        url, key = f"{self.target.url}/health", self.target.api_key
        answer = await scrape.get(session, url, self.limits.interval_s, api_key=key)
        self._health, self._health_detail = scrape.health(answer), scrape.health_detail(answer)
        if self._health == "ok" and not self.state.started:
            await self._start_scrape(session, wait=True)  # the first verdict needs the engines
        self.judge(self._scraped(), self._answers())
        if self.state.started:
            await self._start_scrape(session, wait=False)
        self._send(session)

    def judge(
        self, engines: Mapping[str, state.Engine] | None = None, answers: Mapping[str, CanaryResult] | None = None
    ) -> None:
        """Update ``state``. A transition that results is in ``transitions`` on return.

        The owner calls this too, when it knows of a change, such as a drain, before the next sample.
        """
        self._surroundings = around = self._read_surroundings()
        sample = state.Sample(
            health=self._health,
            health_detail=self._health_detail,
            engines=engines,
            canaries=answers or {},
            movement=around.movement,
            phase=around.phase,
            progress=around.progress,
            draining=around.draining,
            ended=around.ended,
            gpu_faults=around.gpus.fatal if around.gpus else (),
        )
        before, self.state = self.state, judgement.advance(self.state, sample, time.monotonic(), self.limits)
        self._note()
        if (change := judgement.transition(before, self.state)) is not None:
            self.transitions.put_nowait(change)

    def _note(self) -> None:
        gpus = self._surroundings.gpus
        notes = [fault.sentence for fault in gpus.faults] if gpus else []
        if gpus and gpus.down:
            notes.append(f"GPU faults cannot be detected: {gpus.down}")
        notes += [
            f"the prober can suspect a hang but not confirm it, because a one-token request got no token: {problem}. "
            "It asks again later. Check its API key, its model name and its network"
            for problem in sorted({watch.problem for watch in self.state.engines.values() if watch.problem})
        ]
        for note in notes:
            if note not in self._noted:
                self._noted.add(note)
                self._on_note(note)

    async def _start_scrape(self, session: aiohttp.ClientSession, *, wait: bool) -> None:
        """Start a request for /metrics, unless one is pending. Its timeout is long: a slow answer shows steps too.

        ``wait``: wait for the answer, for one sample interval at most.
        """
        if self._scrape is None:
            timeout_s = max(self.limits.canary_s, self.limits.interval_s)
            url, key = f"{self.target.url}/metrics", self.target.api_key
            self._scrape = asyncio.create_task(scrape.get_metrics(session, url, timeout_s, api_key=key))
        if wait:
            await asyncio.wait([self._scrape], timeout=self.limits.interval_s)

    def _scraped(self) -> dict[str, state.Engine] | None:
        """Return the engines of a /metrics that has arrived since the previous sample, or None."""
        if self._scrape is None or not self._scrape.done():
            return None
        answer, self._scrape = self._scrape.result(), None
        self._counts["scrapes"]["ok" if answer.ok else "failed"] += 1
        if not answer.ok:
            return None
        engine_metrics = scrape.read(answer.body)
        if engine_metrics.engines or engine_metrics.kv_cache_tokens:
            self.engine_metrics = engine_metrics
        return engine_metrics.engines

    def _answers(self) -> dict[str, CanaryResult]:
        """Return the answers to pending canaries, by engine."""
        answers = {}
        for engine, (_, task) in self._canaries.items():
            if task.done() and not task.cancelled() and (answer := task.result()) is not None:
                answers[engine] = answer
        return answers

    def _send(self, session: aiohttp.ClientSession) -> None:
        """Send the canaries that the state requires. Cancel and count those that it no longer requires."""
        required = state.canaries(self.state)
        for engine, (attempt, task) in list(self._canaries.items()):
            if required.get(engine) != attempt:
                answer = task.result() if task.done() and not task.cancelled() else None
                no_answer = "unanswered" if engine in required else "not needed"
                self._counts["canaries"][answer.kind if answer else no_answer] += 1
                task.cancel()
                del self._canaries[engine]
        # The label is the rank among all engines, but the request header counts this API server's engines
        # (v1/engine/input_processor.py, core_client.py:get_core_engine_for_request).
        in_order = sorted(self.state.engines, key=lambda name: (len(name), name))
        for engine, attempt in required.items():
            if engine not in self._canaries:
                request = scrape.canary(
                    session,
                    self.target,
                    self.engine_metrics.model,
                    in_order.index(engine) if len(in_order) > 1 else None,
                    self.limits.stall_s,
                    connect_s=0.8 * self.limits.canary_s,  # before the canary counts as unanswered
                )
                self._canaries[engine] = attempt, asyncio.create_task(request)

    @property
    def model(self) -> str:
        """Return the served model's name. Empty until it is known."""
        return self.target.model or self.engine_metrics.model or ""

    def values(self) -> metrics.Values:
        """Return the present values of our own metrics."""
        now, known, around = time.monotonic(), self.state, self._surroundings
        verdicts = judgement.verdicts(known, self.limits)
        draining = known.name == "draining"
        unlabelled = {
            "state_seconds": now - known.since,
            "live": verdicts.live,
            "ready": verdicts.ready,
            "start_seconds": known.start_s,
            "start_remaining_seconds": None if known.started else around.remaining_s,
            "start_weights_bytes": around.weights_bytes,
            "start_weights_loaded_bytes": around.loaded_bytes,
            **self._planned,
            "draining": draining,
            "drain_streams": self.streams() if draining else None,
        }
        labelled: dict[str, dict[str, float]] = {
            "state": {name: name == known.name for name in metrics.STATES},
            "last_progress_seconds": {name: watch.quiet_s for name, watch in known.engines.items()}
            or {state.API_SERVER: known.start_quiet_s},
            "unwatched": {name: bool(watch.problem) for name, watch in known.engines.items()},
            "kv_cache_tokens": {**self.engine_metrics.kv_cache_tokens},
            "start_phase_seconds": dict(known.phases),
            "limit_seconds": self._bounds,
            **{name: dict(counts) for name, counts in self._counts.items()},
        }
        values: dict[str, Mapping[metrics.Labels, float]] = {
            name: {(): float(value)} for name, value in unlabelled.items() if value is not None
        }
        values |= {
            name: {(label,): float(value) for label, value in samples.items()} for name, samples in labelled.items()
        }
        return values | dict(around.gpus.values() if around.gpus else {})

    def streams(self) -> float:
        """Return the number of requests that run or wait, from vLLM's gauges."""
        return sum(watch.engine.running + watch.engine.waiting for watch in self.state.engines.values())
