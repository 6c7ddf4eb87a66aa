"""The prober against a stand-in for vLLM's API. tests/engine has the real engine."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from aiohttp import web

from vllm_health import gpu_faults
from vllm_health.limits import Limits
from vllm_health.prober import Prober, Surroundings
from vllm_health.scrape import Target
from vllm_health.state import Movement

LOAD = {"ready", "saturated"}
QUICK = Limits(stall_s=2.0, start_stall_s=1.0, drain_s=75.0)


class Vllm:
    """A stand-in for vLLM's API server. The tests set its answers. ``engines``: generated tokens by engine."""

    def __init__(self) -> None:
        self.engines, self.running, self.waiting, self.health, self.answer = {"0": 0}, 0, 2, 200, "200"
        self.metrics_wait = 0.0
        self.ranks: list[str | None] = []  # the engine that each canary asked for
        self.keys: set[tuple[str, str | None]] = set()  # routes with the keys that they got

    async def on_health(self, request):
        self.keys.add((request.path, request.headers.get("Authorization")))
        return web.Response(status=self.health)

    async def on_metrics(self, request):
        self.keys.add((request.path, request.headers.get("Authorization")))
        await asyncio.sleep(self.metrics_wait)
        lines = [
            f'vllm:num_requests_running{{engine="{name}",model_name="m"}} {self.running}\n'
            f'vllm:num_requests_waiting{{engine="{name}",model_name="m"}} {self.waiting}\n'
            f'vllm:generation_tokens_total{{engine="{name}",model_name="m"}} {tokens}\n'
            f'vllm:cache_config_info{{engine="{name}",kv_cache_size_tokens="900"}} 1.0\n'
            for name, tokens in self.engines.items()
        ]
        return web.Response(text="".join(lines))

    async def on_completion(self, request):
        self.ranks.append(request.headers.get("X-data-parallel-rank"))
        if self.answer == "never":
            await asyncio.sleep(60)
        if self.answer == "reset":
            request.transport.abort()
            return web.Response()
        return web.Response(status=int(self.answer), text='{"error": {"message": "model"}}')


class Watched:
    """A prober of a ``Vllm``, with its notes and its surroundings. ``api``: whether the API server listens."""

    def __init__(self, limits=QUICK, *, api=True, api_key=None, **surroundings) -> None:
        self.api_key, self.limits, self.api, self.surroundings = api_key, limits, api, surroundings
        self.vllm, self.notes = Vllm(), []
        self._names = ["starting"]

    @property
    def names(self):
        """Return the names of the states so far, from the prober's transitions."""
        while not self.prober.transitions.empty():
            change = self.prober.transitions.get_nowait()
            assert change.before.name == self._names[-1] or {change.before.name, self._names[-1]} == LOAD
            self._names.append(change.after.name)
        return self._names

    @contextlib.asynccontextmanager
    async def run(self):
        app = web.Application()
        app.add_routes(
            [
                web.get("/health", self.vllm.on_health),
                web.get("/metrics", self.vllm.on_metrics),
                web.post("/v1/completions", self.vllm.on_completion),
            ]
        )
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        if not self.api:
            await site.stop()
        self.prober = Prober(
            Target(url=f"http://127.0.0.1:{port}", api_key=self.api_key),
            self.limits,
            lambda: Surroundings(**self.surroundings),
            on_note=self.notes.append,
            planned_kv_tokens=1000,
            planned_gpus=2,
        )
        try:
            async with asyncio.TaskGroup() as group:
                watching = group.create_task(self.prober.run())
                yield
                watching.cancel()
        finally:
            await runner.cleanup()

    async def until(self, goal):
        """Wait until the state has the name ``goal``, or ``goal()`` is true."""
        async with asyncio.timeout(30):
            while not (goal() if callable(goal) else self.prober.state.name == goal):  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    def value(self, name, *labels):
        return self.prober.values()[name][labels]


def test_the_first_verdict_of_a_ready_vllm_knows_its_engines():
    async def course():
        watched = Watched()
        async with watched.run():
            await watched.until("ready")
        assert watched.names == ["starting", "ready"]
        assert watched.value("kv_cache_tokens", "0") == 900
        assert watched.value("kv_cache_planned_tokens") == 1000
        assert watched.value("state", "ready") == 1
        assert watched.value("state", "dead") == 0
        assert watched.value("ready") == 1
        assert (
            watched.value("canaries", "refused") == 0
        )  # shown from the start, because rate() ignores a counter's first value
        assert watched.value("scrapes", "failed") == 0
        assert watched.value("planned_gpus") == 2
        assert watched.value("limit_seconds", "drain") == 75
        assert ("start_stall",) in watched.prober.values()["limit_seconds"]
        assert watched.prober.model == "m"

    asyncio.run(course())


def test_a_change_between_ready_and_saturated_is_not_a_transition():
    async def course():
        watched = Watched()
        async with watched.run():
            for running, name in ((1, "saturated"), (0, "ready"), (1, "saturated")):
                watched.vllm.running = running
                watched.vllm.engines["0"] += 1
                await watched.until(name)
            assert watched.names == ["starting", "saturated"]

    asyncio.run(course())


def test_an_idle_engine_gets_canaries_again_and_again_and_stays_ready():
    async def course():
        watched = Watched()
        async with watched.run():
            await watched.until(lambda: len(watched.vllm.ranks) >= 3)
            assert watched.names == ["starting", "ready"]
        assert set(watched.vllm.ranks) == {None}
        assert watched.value("canaries", "answered") >= 2

    asyncio.run(course())


@pytest.mark.parametrize("labels", [("0", "1"), ("1", "2"), ("9", "10")])
def test_a_stuck_engine_among_several_gets_canaries_by_rank_and_is_dead(labels):
    """With hybrid load balancing the labels are ranks among all engines, and the header counts this server's engines."""

    async def course():
        watched, (busy, stuck) = Watched(), labels
        watched.vllm.engines, watched.vllm.running, watched.vllm.answer = {stuck: 0, busy: 0}, 3, "never"
        async with watched.run():
            while watched.prober.state.name != "dead":
                watched.vllm.engines[busy] += 1
                await asyncio.sleep(0.02)
            assert watched.prober.state.reason.startswith(f"Engine {stuck} has made no step")
            assert watched.value("live") == 0
            assert watched.value("last_progress_seconds", stuck) > watched.value("last_progress_seconds", busy)
            assert watched.value("canaries", "unanswered") >= 2
        assert set(watched.vllm.ranks) == {"1"}
        assert watched.names[-3:] == ["suspect", "stalled", "dead"]

    asyncio.run(course())


def test_a_refused_canary_is_one_warning():
    async def course():
        watched = Watched()
        watched.vllm.answer = "401"
        async with watched.run():
            await watched.until(lambda: watched.notes)
            await asyncio.sleep(1.0)
        assert len(watched.vllm.ranks) == 1
        (note,) = watched.notes
        assert "suspect a hang but not confirm it, because a one-token request got no token: 401 from /v1/comp" in note

    asyncio.run(course())


def test_a_server_whose_canaries_are_reset_stays_alive_and_unwatched():
    async def course():
        watched = Watched()
        watched.vllm.answer = "reset"
        async with watched.run():
            await watched.until(lambda: watched.notes)
            await asyncio.sleep(4 * QUICK.dead_after_s)
            assert watched.prober.state.name == "ready"
            assert watched.value("unwatched", "0") == 1
            assert watched.value("canaries", "unanswered") == 0
            watched.vllm.answer = "200"
            await watched.until(lambda: watched.value("unwatched", "0") == 0)
        assert set(watched.names) == {"starting", "ready"}

    asyncio.run(course())


def test_the_key_is_sent_to_health_and_metrics_too():
    async def course():
        watched = Watched(api_key="key")
        async with watched.run():
            await watched.until("ready")
        assert watched.vllm.keys >= {("/health", "Bearer key"), ("/metrics", "Bearer key")}

    asyncio.run(course())


def test_a_missing_key_of_health_is_named():
    async def course():
        watched = Watched()
        watched.vllm.health = 401
        async with watched.run():
            await watched.until(lambda: "401" in watched.prober.state.reason)
            assert watched.prober.state.reason.endswith(
                "/health answers 401, because it requires an API key: set VLLM_API_KEY or --api-key-file."
            )

    asyncio.run(course())


def test_metrics_that_answer_later_than_the_next_sample_are_read():
    async def course():
        watched = Watched(Limits(stall_s=5.0))
        watched.vllm.metrics_wait, watched.vllm.running = 0.7, 1
        async with watched.run():
            await watched.until("saturated")
            for _ in range(60):
                watched.vllm.engines["0"] += 1
                await asyncio.sleep(0.05)
        assert watched.names in (["starting", "saturated"], ["starting", "ready"])
        assert watched.value("scrapes", "ok") >= 2

    asyncio.run(course())


def test_a_start_without_progress_is_dead_and_a_start_with_progress_is_not():
    async def course():
        watched = Watched(api=False, movement=Movement(), phase="compiling", remaining_s=7.0, weights_bytes=10)
        async with watched.run():
            for lines in range(10):
                watched.surroundings["movement"] = Movement(lines=lines)
                await asyncio.sleep(0.2)
            assert watched.names == ["starting"]
            assert watched.value("start_remaining_seconds") == 7
            assert watched.value("start_weights_bytes") == 10
            assert watched.value("start_phase_seconds", "compiling") > 1
            await watched.until("dead")

    asyncio.run(course())


def test_judge_shows_a_drain_before_the_next_sample():
    async def course():
        watched = Watched()
        watched.vllm.running = 5
        async with watched.run():
            await watched.until("saturated")
            watched.surroundings["draining"] = "SIGTERM came."
            watched.prober.judge()
            assert watched.names[-1] == "draining"
            assert watched.value("draining") == 1
            assert watched.value("drain_streams") == 7

    asyncio.run(course())


@pytest.mark.parametrize("fatal", [True, False])
def test_each_gpu_fault_is_one_warning_and_a_metric_simulated(fatal):
    fault = gpu_faults.Fault("3", "xid 79", "GPU 3: Xid 79.", fatal=fatal)

    async def course():
        watched = Watched(gpus=gpu_faults.Report(faults=(fault,), down="NVML is gone"))
        async with watched.run():
            await watched.until("gpu_fault" if fatal else "ready")
            await asyncio.sleep(0.5)
        assert watched.notes == ["GPU 3: Xid 79.", "GPU faults cannot be detected: NVML is gone"]
        assert watched.value("gpu_faults", "3", "xid 79", str(fatal).lower()) == 1
        assert watched.value("nvml_up") == 0

    asyncio.run(course())


def test_the_prober_does_not_wait_for_its_transitions_to_be_read():
    async def course():
        watched = Watched()
        async with watched.run():
            await watched.until("ready")
            watched.vllm.health = 503
            await watched.until("dead")
            changes = [watched.prober.transitions.get_nowait() for _ in range(3)]
            assert watched.prober.transitions.empty()
        assert [(change.before.name, change.after.name) for change in changes] == [
            ("starting", "ready"),
            ("ready", "unavailable"),
            ("unavailable", "dead"),
        ]
        assert changes[2].after.reason == "vLLM reports that its engine is dead (503 from /health)."

    asyncio.run(course())
