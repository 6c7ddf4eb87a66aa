"""The watch over one vLLM: sample, advance, act, again and again. Speaks HTTP and reads the monotonic clock."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Final

import aiohttp
import msgspec

from vllm_health import gpu_faults, metrics, scrape, state
from vllm_health.limits import Limits
from vllm_health.state import Canary, Movement

START_INTERVAL_S: Final = 0.5
"""Between samples until vLLM is ready: readiness should not be seen late, and a port that is closed answers at once."""
DRAIN_INTERVAL_S: Final = 1.0


class Surroundings(msgspec.Struct, frozen=True, kw_only=True):
    """What is known besides HTTP: much by the launcher, which is vLLM's parent, little by a sidecar.

    ``weights_bytes``, ``loaded_bytes`` and ``remaining_s`` are of a start. ``gpus`` None: nobody looks at them.
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
    """Watches one vLLM until ``run`` is cancelled; ``state`` and ``engine_metrics`` are what it knows.

    ``transitions`` has every ``state.Transition``, in order. The owner takes them out and acts on them in a task of
    its own. The prober never waits for the owner.

    ``look`` returns what is known besides HTTP and must not block. ``on_note`` is called once for each sentence that
    somebody should read although no verdict depends on it.
    """

    def __init__(
        self,
        target: scrape.Target,
        limits: Limits,
        look: Callable[[], Surroundings],
        *,
        on_note: Callable[[str], None],
        planned_kv_tokens: int | None = None,
        planned_gpus: int | None = None,
    ) -> None:
        self.target, self.limits = target, limits
        self.state = state.beginning(time.monotonic())
        self.transitions: asyncio.Queue[state.Transition] = asyncio.Queue()
        self.engine_metrics = scrape.EngineMetrics()
        self._around = Surroundings()
        self._look, self._on_note = look, on_note
        self._planned = {"kv_cache_planned_tokens": planned_kv_tokens, "planned_gpus": planned_gpus}
        bounds = {"stall": limits.stall_s, "start_stall": limits.start_stall_s, "drain": limits.drain_s}
        self._bounds = {name: seconds for name, seconds in bounds.items() if seconds}
        self._health: state.Health = "unanswered"
        self._noted: set[str] = set()
        self._scrape: asyncio.Task[scrape.Answer] | None = None
        self._canaries: dict[str, tuple[int, asyncio.Task[Canary | None]]] = {}
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
                out = [task for task in (self._scrape, *(task for _, task in self._canaries.values())) if task]
                for task in out:
                    task.cancel()
                await asyncio.gather(*out, return_exceptions=True)

    def _interval_s(self) -> float:
        if self.state.name == "draining":
            return min(DRAIN_INTERVAL_S, self.limits.interval_s)
        return self.limits.interval_s if self.state.started else min(START_INTERVAL_S, self.limits.interval_s)

    async def _step(self, session: aiohttp.ClientSession) -> None:
        answer = await scrape.get(session, f"{self.target.url}/health", self.limits.interval_s)
        self._health = scrape.health(answer)
        if self._health == "ok" and not self.state.started:
            await self._start_scrape(session, wait=True)  # so that the first verdict knows the engines
        self.judge(self._scraped(), self._answers())
        if self.state.started:
            await self._start_scrape(session, wait=False)
        self._send(session)

    def judge(
        self, engines: Mapping[str, state.Engine] | None = None, answers: Mapping[str, Canary] | None = None
    ) -> None:
        """Judge vLLM as of now. The owner calls it where it knows of a change, such as a drain, before a sample does.

        A transition that follows from it is in ``transitions`` on return.
        """
        self._around = around = self._look()
        sample = state.Sample(
            health=self._health,
            engines=engines,
            canaries=answers or {},
            movement=around.movement,
            phase=around.phase,
            progress=around.progress,
            draining=around.draining,
            ended=around.ended,
            gpu_faults=around.gpus.fatal if around.gpus else (),
        )
        before, self.state = self.state, state.advance(self.state, sample, time.monotonic(), self.limits)
        self._note()
        if (change := state.transition(before, self.state)) is not None:
            self.transitions.put_nowait(change)

    def _note(self) -> None:
        gpus = self._around.gpus
        notes = [fault.sentence for fault in gpus.faults] if gpus else []
        if gpus and gpus.down:
            notes.append(f"GPU faults cannot be seen: {gpus.down}")
        if off := self.state.canary_off:
            notes.append(f"no one-token requests are sent any more, so a hang is only suspected, never proved ({off})")
        for note in notes:
            if note not in self._noted:
                self._noted.add(note)
                self._on_note(note)

    async def _start_scrape(self, session: aiohttp.ClientSession, *, wait: bool) -> None:
        """One at a time, and with much patience: a slow answer is a sign of life too, when it comes."""
        if self._scrape is None:
            patience = max(self.limits.canary_s, self.limits.interval_s)
            self._scrape = asyncio.create_task(scrape.get_metrics(session, f"{self.target.url}/metrics", patience))
        if wait:
            await asyncio.wait([self._scrape], timeout=self.limits.interval_s)

    def _scraped(self) -> dict[str, state.Engine] | None:
        """The engines of a /metrics that has come since the sample before; None where none has."""
        if self._scrape is None or not self._scrape.done():
            return None
        answer, self._scrape = self._scrape.result(), None
        self._counts["scrapes"]["ok" if answer.ok else "failed"] += 1
        if not answer.ok:
            return None
        found = scrape.read(answer.body)
        if found.engines or found.kv_cache_tokens:
            self.engine_metrics = found
        return found.engines

    def _answers(self) -> dict[str, Canary]:
        """What has become of the canaries that are out."""
        found = {}
        for engine, (_, task) in self._canaries.items():
            if task.done() and not task.cancelled() and (answer := task.result()) is not None:
                found[engine] = answer
        return found

    def _send(self, session: aiohttp.ClientSession) -> None:
        """Let those canaries be out that the state wants out, and count what became of the others."""
        wanted = state.canaries(self.state)
        for engine, (attempt, task) in list(self._canaries.items()):
            if wanted.get(engine) != attempt:
                answer = task.result() if task.done() and not task.cancelled() else None
                late = "unanswered" if engine in wanted else "not needed"
                self._counts["canaries"][answer.kind if answer else late] += 1
                task.cancel()
                del self._canaries[engine]
        several = len(self.state.engines) > 1
        for engine, attempt in wanted.items():
            if engine not in self._canaries:
                one = scrape.canary(
                    session, self.target, self.engine_metrics.model, engine if several else None, self.limits.stall_s
                )
                self._canaries[engine] = attempt, asyncio.create_task(one)

    @property
    def model(self) -> str:
        """The served model's name; empty until somebody has said it."""
        return self.target.model or self.engine_metrics.model or ""

    def values(self) -> metrics.Values:
        """Our own metrics, as they are now."""
        now, known, around = time.monotonic(), self.state, self._around
        told = state.verdicts(known, self.limits)
        draining = known.name == "draining"
        single = {
            "state_seconds": now - known.since,
            "live": told.live,
            "ready": told.ready,
            "start_seconds": known.start_s,
            "start_remaining_seconds": None if known.started else around.remaining_s,
            "start_weights_bytes": around.weights_bytes,
            "start_weights_loaded_bytes": around.loaded_bytes,
            **self._planned,
            "draining": draining,
            "drain_streams": self.streams() if draining else None,
        }
        several: dict[str, dict[str, float]] = {
            "state": {name: name == known.name for name in metrics.STATES},
            "last_progress_seconds": {name: watch.quiet_s for name, watch in known.engines.items()}
            or {state.API_SERVER: known.still_s},
            "kv_cache_tokens": {**self.engine_metrics.kv_cache_tokens},
            "start_phase_seconds": dict(known.phases),
            "limit_seconds": self._bounds,
            **{name: dict(counts) for name, counts in self._counts.items()},
        }
        values: dict[str, Mapping[metrics.Labels, float]] = {
            name: {(): float(value)} for name, value in single.items() if value is not None
        }
        values |= {
            name: {(label,): float(value) for label, value in samples.items()} for name, samples in several.items()
        }
        return values | dict(around.gpus.values() if around.gpus else {})

    def streams(self) -> float:
        """Requests that run or wait, as vLLM's gauges have it."""
        return sum(watch.engine.running + watch.engine.waiting for watch in self.state.engines.values())
