import asyncio
import contextlib
from pathlib import Path

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from vllm_health import metrics, scrape
from vllm_health.scrape import Target
from vllm_health.state import Canary

(REAL,) = (Path(__file__).parents[2] / "data/metrics").glob("vllm-*-cpu.txt")


def info(engine, size):
    return f'vllm:cache_config_info{{block_size="128",engine="{engine}",kv_cache_size_tokens="{size}"}} 1.0\n'


def running(engine, value):
    return f'vllm:num_requests_running{{engine="{engine}",model_name="m"}} {value}\n'


# ---- what an exposition says


def test_a_real_exposition_has_all_that_is_wanted():
    found = scrape.read(REAL.read_text())
    (engine,) = found.engines.values()
    assert set(engine.steps) == set(metrics.STEP_SIGNS)
    assert found.model == "llama3"
    assert found.kv_cache_tokens.keys() == {"0"}
    assert not engine.asleep


def test_a_step_shows_in_what_is_wanted():
    text = REAL.read_text()
    more = text.replace(
        'vllm:generation_tokens_total{engine="0",model_name="llama3"} 8.0',
        'vllm:generation_tokens_total{engine="0",model_name="llama3"} 9.0',
    )
    assert more != text
    assert scrape.read(more).engines != scrape.read(text).engines


def test_arrivals_at_an_engine_that_serves_none_are_no_step():
    text = REAL.read_text()
    more = text.replace(
        'requests_waiting{engine="0",model_name="llama3"} 0.0', 'requests_waiting{engine="0",model_name="llama3"} 7.0'
    )
    more = more.replace(
        'prefix_cache_queries_total{engine="0",model_name="llama3"} 17.0',
        'prefix_cache_queries_total{engine="0",model_name="llama3"} 99.0',
    )
    assert scrape.read(more).engines["0"].steps == scrape.read(text).engines["0"].steps
    assert scrape.read(more).engines["0"].waiting == 7


def test_several_series_of_an_engine_are_summed_and_engines_kept_apart():
    text = "".join(
        f'vllm:request_success_total{{engine="{engine}",finished_reason="{reason}"}} {value}\n'
        for engine, reason, value in (("0", "stop", 2), ("0", "length", 3), ("1", "stop", 7))
    )
    found = scrape.read(text).engines
    assert {name: one.steps for name, one in found.items()} == {
        "0": {"vllm:request_success_total": 5}, "1": {"vllm:request_success_total": 7},
    }  # fmt: skip


def test_gauges_of_several_api_servers_are_one_engines_together():
    """As with --api-server-count, where prometheus_client merges what each process wrote."""
    text = "".join(
        f'vllm:num_requests_running{{engine="0",model_name="m",pid="{pid}"}} {count}\n'
        for pid, count in ((7, 2), (8, 3))
    )
    assert scrape.read(text).engines["0"].running == 5


def test_an_engine_that_is_not_awake_is_asleep():
    line = 'vllm:engine_sleep_state{{engine="0",sleep_state="{}"}} {}\n'
    text = running(0, 0) + line.format("awake", 0.0) + line.format("weights_offloaded", 1.0)
    assert scrape.read(text).engines["0"].asleep


def test_the_kv_cache_of_each_engine_is_read_from_the_exposition():
    head = "# TYPE vllm:cache_config_info gauge\n"
    assert scrape.read(head + info(0, 524288) + info(1, 100)).kv_cache_tokens == {"0": 524288, "1": 100}


@pytest.mark.parametrize("text", ["", "x 1\n", "vllm:cache_config_info{", info(0, "None"), info(0, "-3"), "a{b=} 1\n"])
def test_an_exposition_that_does_not_say_gives_nothing(text):
    assert scrape.read(text) == scrape.EngineMetrics()


@pytest.mark.parametrize("value", ["NaN", "+Inf", "-Inf", "12x", "", "0x"])
def test_what_is_no_number_is_passed_over(value):
    assert scrape.read(running(0, value) + running(1, 3)).engines.keys() == {"1"}


def test_a_line_that_was_cut_off_is_passed_over():
    assert scrape.read(running(0, 12).rstrip("\n")[:-1]).engines == {}


@given(st.text())
def test_no_text_breaks_the_reader(text):
    scrape.read(text)
    assert scrape.read(f"{text}\n{info(0, 7)}").kv_cache_tokens == {"0": 7}


@given(st.integers(0, len(REAL.read_text())))
def test_half_an_exposition_shows_nothing_that_is_not_in_the_whole(cut):
    whole, half = scrape.read(REAL.read_text()), scrape.read(REAL.read_text()[:cut])
    for name, engine in half.engines.items():
        for sign, value in engine.steps.items():
            assert value <= whole.engines[name].steps[sign]


# ---- what it is asked over HTTP


@contextlib.asynccontextmanager
async def served(*routes):
    app = web.Application()
    app.add_routes(routes)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        async with scrape.session() as session:
            yield session, f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def asked(handler, timeout_s=5.0):
    async def ask():
        async with served(web.get("/x", handler)) as (session, url):
            return await scrape.get(session, f"{url}/x", timeout_s, api_key="k")

    return asyncio.run(ask())


def answering(status, text=""):
    async def handler(_):
        return web.Response(status=status, text=text)

    return handler


def test_an_answer_has_its_status_and_body_and_the_key_went_along():
    async def handler(request):
        return web.Response(status=418, text=request.headers["Authorization"])

    assert asked(handler) == scrape.Answer(418, "Bearer k")


def test_a_body_beyond_the_bound_is_no_answer(monkeypatch):
    monkeypatch.setattr(scrape, "MAX_BYTES", 1000)
    assert asked(answering(200, "x" * 1000)).ok
    assert asked(answering(200, "x" * 300_000)).status == 0


def exposition(text, monkeypatch):
    monkeypatch.setattr(scrape, "MAX_BYTES", 100_000)

    async def ask():
        async with served(web.get("/metrics", answering(200, text))) as (session, url):
            return await scrape.get_metrics(session, f"{url}/metrics", 10.0)

    return asyncio.run(ask())


def test_of_an_exposition_only_wanted_lines_are_kept_however_long_it_is(monkeypatch):
    filler = "# filler\n" * 30_000
    text = filler + running(0, 3) + filler + info(0, 7) + filler + running(1, 4).rstrip("\n")
    assert exposition(text, monkeypatch).body == running(0, 3) + info(0, 7)
    assert scrape.read(exposition(REAL.read_text(), monkeypatch).body) == scrape.read(REAL.read_text())


@pytest.mark.parametrize("text", ["x" * 100_001, "# filler\n" * 800_000, running(0, 3) * 3000])
def test_an_exposition_beyond_all_bounds_is_no_answer(text, monkeypatch):
    assert exposition(text, monkeypatch) == scrape.Answer(0, "more than 0 MiB")


def test_a_body_that_breaks_off_is_no_answer():
    async def handler(request):
        answer = web.StreamResponse(headers={"Content-Length": "1000"})
        await answer.prepare(request)
        await answer.write(b"x" * 500)
        request.transport.close()
        return answer

    assert asked(handler).status == 0


def test_a_server_that_does_not_answer_in_time_is_status_0():
    async def handler(_):
        await asyncio.sleep(60)

    answer = asked(handler, 0.1)
    assert (answer.status, answer.refused) == (0, False)
    assert "Timeout" in answer.body


def test_nobody_there_is_refused():
    async def ask():
        async with scrape.session() as session:
            return await scrape.get(session, "http://127.0.0.1:1/x", 5)

    answer = asyncio.run(ask())
    assert (answer.status, answer.refused) == (0, True)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (scrape.Answer(200, ""), "ok"),
        (scrape.Answer(503, ""), "engine dead"),
        (scrape.Answer(0, "", refused=True), "refused"),
        (scrape.Answer(0, ""), "unanswered"),
        (scrape.Answer(404, ""), "unanswered"),
        (scrape.Answer(500, ""), "unanswered"),
    ],
)
def test_what_health_says(answer, said):
    assert scrape.health(answer) == said


# ---- canaries


def canary(*routes, engine=None, timeout_s=5.0, **target):
    async def ask():
        async with served(*routes) as (session, url):
            return await scrape.canary(session, Target(url=url, **target), "shown", engine, timeout_s)

    return asyncio.run(ask())


class Api:
    """Remembers what it was asked; answers what it was told."""

    def __init__(self, status=200, body="{}"):
        self.asked, self.status, self.body = [], status, body

    async def answer(self, request):
        self.asked.append((request.path, await request.json(), dict(request.headers)))
        return web.Response(status=self.status, text=self.body)


def test_a_canary_asks_for_one_token_of_the_served_model():
    api = Api()
    assert canary(web.post("/v1/completions", api.answer), api_key="k") == Canary("answered")
    ((_, body, headers),) = api.asked
    assert body == {"model": "shown", "prompt": [1], "max_tokens": 1, "temperature": 0}
    assert headers["Authorization"] == "Bearer k"
    assert "X-data-parallel-rank" not in headers


def test_a_canary_may_be_for_one_engine_and_by_another_name():
    api = Api()
    canary(web.post("/v1/completions", api.answer), engine="3", model="mine")
    ((_, body, headers),) = api.asked
    assert body["model"] == "mine"
    assert headers["X-data-parallel-rank"] == "3"


@pytest.mark.parametrize(
    "no_route",
    [
        (404, '{"detail":"Not Found"}'),
        (405, ""),
        (501, '{"error": {"message": "The model does not support Completions API"}}'),
    ],
)
def test_a_model_that_generates_nothing_is_asked_to_pool(no_route):
    pooling = Api()
    assert canary(web.post("/v1/completions", Api(*no_route).answer), web.post("/pooling", pooling.answer)) == Canary(
        "answered"
    )
    assert pooling.asked[0][1] == {"model": "shown", "input": [1]}


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (401, "refused"),
        (404, "refused"),
        (400, "refused"),
        (429, "inconclusive"),
        (500, "inconclusive"),
        (503, "inconclusive"),
    ],
)
def test_who_is_to_blame_for_a_canary_that_fails(status, kind):
    body = '{"error": {"message": "The model `x`\\nis not to be had."}}'
    pooling = Api()
    found = canary(web.post("/v1/completions", Api(status, body).answer), web.post("/pooling", pooling.answer))
    assert found == Canary(kind, f"{status} of /v1/completions: The model `x` is not to be had.")
    assert not pooling.asked


def test_no_answer_in_time_is_none():
    async def never(_):
        await asyncio.sleep(60)

    assert canary(web.post("/v1/completions", never), timeout_s=0.2) is None


def test_an_engine_that_was_paused_is_not_asked():
    api = Api()
    paused = web.get("/is_paused", answering(200, '{"is_paused": true}'))
    assert canary(paused, web.post("/v1/completions", api.answer)) == Canary("paused")
    assert not api.asked
    going = web.get("/is_paused", answering(200, '{"is_paused":false}'))
    assert canary(going, web.post("/v1/completions", api.answer)) == Canary("answered")
