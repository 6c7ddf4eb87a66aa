import asyncio
import contextlib
import resource
import socket
from pathlib import Path

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from vllm_health import metrics, scrape
from vllm_health.scrape import Target
from vllm_health.state import CanaryResult

(REAL,) = (Path(__file__).parents[2] / "data/metrics").glob("vllm-*-cpu.txt")


def info(engine, size):
    return f'vllm:cache_config_info{{block_size="128",engine="{engine}",kv_cache_size_tokens="{size}"}} 1.0\n'


def running(engine, value):
    return f'vllm:num_requests_running{{engine="{engine}",model_name="m"}} {value}\n'


# ---- reading /metrics


def test_a_recorded_exposition_has_all_wanted_metrics():
    engine_metrics = scrape.read(REAL.read_text())
    (engine,) = engine_metrics.engines.values()
    assert set(engine.steps) == set(metrics.STEP_SIGNS)
    assert engine_metrics.model == "llama3"
    assert engine_metrics.kv_cache_tokens.keys() == {"0"}
    assert not engine.asleep


def test_a_step_changes_the_wanted_metrics():
    text = REAL.read_text()
    later = text.replace(
        'vllm:generation_tokens_total{engine="0",model_name="llama3"} 8.0',
        'vllm:generation_tokens_total{engine="0",model_name="llama3"} 9.0',
    )
    assert later != text
    assert scrape.read(later).engines != scrape.read(text).engines


def test_requests_that_only_arrive_are_not_a_step():
    text = REAL.read_text()
    later = text.replace(
        'requests_waiting{engine="0",model_name="llama3"} 0.0', 'requests_waiting{engine="0",model_name="llama3"} 7.0'
    )
    later = later.replace(
        'prefix_cache_queries_total{engine="0",model_name="llama3"} 17.0',
        'prefix_cache_queries_total{engine="0",model_name="llama3"} 99.0',
    )
    assert scrape.read(later).engines["0"].steps == scrape.read(text).engines["0"].steps
    assert scrape.read(later).engines["0"].waiting == 7


def test_several_series_of_one_engine_are_summed_and_engines_stay_separate():
    text = "".join(
        f'vllm:request_success_total{{engine="{engine}",finished_reason="{reason}"}} {value}\n'
        for engine, reason, value in (("0", "stop", 2), ("0", "length", 3), ("1", "stop", 7))
    )
    engines = scrape.read(text).engines
    assert {name: engine.steps for name, engine in engines.items()} == {
        "0": {"vllm:request_success_total": 5}, "1": {"vllm:request_success_total": 7},
    }  # fmt: skip


def test_gauges_of_several_api_servers_are_summed_for_one_engine():
    """With --api-server-count, prometheus_client merges the values of all API server processes."""
    text = "".join(
        f'vllm:num_requests_running{{engine="0",model_name="m",pid="{pid}"}} {count}\n'
        for pid, count in ((7, 2), (8, 3))
    )
    assert scrape.read(text).engines["0"].running == 5


def test_an_engine_whose_sleep_state_is_not_awake_is_asleep():
    line = 'vllm:engine_sleep_state{{engine="0",sleep_state="{}"}} {}\n'
    text = running(0, 0) + line.format("awake", 0.0) + line.format("weights_offloaded", 1.0)
    assert scrape.read(text).engines["0"].asleep


def test_the_kv_cache_size_of_each_engine_is_read():
    head = "# TYPE vllm:cache_config_info gauge\n"
    assert scrape.read(head + info(0, 524288) + info(1, 100)).kv_cache_tokens == {"0": 524288, "1": 100}


@pytest.mark.parametrize("text", ["", "x 1\n", "vllm:cache_config_info{", info(0, "None"), info(0, "-3"), "a{b=} 1\n"])
def test_an_exposition_without_wanted_metrics_gives_empty_metrics(text):
    assert scrape.read(text) == scrape.EngineMetrics()


@pytest.mark.parametrize("value", ["NaN", "+Inf", "-Inf", "12x", "", "0x"])
def test_a_value_that_is_not_a_finite_number_is_skipped(value):
    assert scrape.read(running(0, value) + running(1, 3)).engines.keys() == {"1"}


def test_a_line_that_was_cut_off_is_skipped():
    assert scrape.read(running(0, 12).rstrip("\n")[:-1]).engines == {}


@given(st.text())
def test_read_accepts_any_text(text):
    scrape.read(text)
    assert scrape.read(f"{text}\n{info(0, 7)}").kv_cache_tokens == {"0": 7}


@given(st.integers(0, len(REAL.read_text())))
def test_a_partial_exposition_has_no_value_above_those_of_the_whole(cut):
    whole, partial = scrape.read(REAL.read_text()), scrape.read(REAL.read_text()[:cut])
    for name, engine in partial.engines.items():
        for sign, value in engine.steps.items():
            assert value <= whole.engines[name].steps[sign]


# ---- requests over HTTP


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


def get_from(handler, timeout_s=5.0):
    """Return the answer to a GET of a server with this handler."""

    async def ask():
        async with served(web.get("/x", handler)) as (session, url):
            return await scrape.get(session, f"{url}/x", timeout_s, api_key="k")

    return asyncio.run(ask())


def answering(status, text=""):
    async def handler(_):
        return web.Response(status=status, text=text)

    return handler


def test_an_answer_has_status_and_body_and_the_request_carries_the_key():
    async def handler(request):
        return web.Response(status=418, text=request.headers["Authorization"])

    assert get_from(handler) == scrape.Answer(418, "Bearer k")


def test_a_body_larger_than_the_limit_is_no_answer(monkeypatch):
    monkeypatch.setattr(scrape, "MAX_BYTES", 1000)
    assert get_from(answering(200, "x" * 1000)).ok
    assert get_from(answering(200, "x" * 300_000)).status == 0


def exposition(text, monkeypatch):
    """Return the answer to a request for this /metrics, with MAX_BYTES at 100,000."""
    monkeypatch.setattr(scrape, "MAX_BYTES", 100_000)

    async def ask():
        async with served(web.get("/metrics", answering(200, text))) as (session, url):
            return await scrape.get_metrics(session, f"{url}/metrics", 10.0)

    return asyncio.run(ask())


def test_only_wanted_lines_of_a_long_exposition_are_kept(monkeypatch):
    filler = "# filler\n" * 30_000
    text = filler + running(0, 3) + filler + info(0, 7) + filler + running(1, 4).rstrip("\n")
    assert exposition(text, monkeypatch).body == running(0, 3) + info(0, 7)
    assert scrape.read(exposition(REAL.read_text(), monkeypatch).body) == scrape.read(REAL.read_text())


@pytest.mark.parametrize("text", ["x" * 100_001, "# filler\n" * 800_000, running(0, 3) * 3000])
def test_an_exposition_larger_than_any_limit_is_no_answer(text, monkeypatch):
    answer = exposition(text, monkeypatch)
    assert answer.status == 0
    assert answer.body.endswith("/metrics: the response is larger than 0 MiB")


def test_a_body_that_breaks_off_is_no_answer():
    async def handler(request):
        answer = web.StreamResponse(headers={"Content-Length": "1000"})
        await answer.prepare(request)
        await answer.write(b"x" * 500)
        request.transport.close()
        return answer

    answer = get_from(handler)
    assert answer.status == 0
    assert answer.body.endswith("/x: the server closed the connection before the end of its answer")


def test_a_server_that_does_not_answer_in_time_is_status_0():
    async def handler(_):
        await asyncio.sleep(60)

    answer = get_from(handler, 0.1)
    assert (answer.status, answer.none) == (0, "silent")
    assert answer.body.endswith("/x: no answer within 0.1 s")


def get_url(url):
    async def ask():
        async with scrape.session() as session:
            return await scrape.get(session, url, 5)

    return asyncio.run(ask())


def test_a_closed_port_is_refused():
    answer = get_url("http://127.0.0.1:1/x")
    assert answer == scrape.Answer(0, "http://127.0.0.1:1/x: Connection refused", "refused")


def test_a_url_that_is_not_valid_is_no_answer():
    assert get_url("http://[::1/x") == scrape.Answer(0, "http://[::1/x: the URL is not valid", "failed")


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [("http", "the answer is not valid HTTP"), ("https", "the server does not use TLS, or its TLS does not work")],
)
def test_a_server_with_another_protocol_is_no_answer(scheme, reason):
    async def ask():
        async def answer(reader, writer):
            await reader.read(1)
            writer.write(b"220 mail\r\n\r\n")
            writer.close()

        listening = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = listening.sockets[0].getsockname()[1]
        async with listening, scrape.session() as session:
            return await scrape.get(session, f"{scheme}://127.0.0.1:{port}/x", 5)

    assert asyncio.run(ask()).body.endswith(f"/x: {reason}")


@pytest.mark.parametrize(
    ("answer", "health"),
    [
        (scrape.Answer(200, ""), "ok"),
        (scrape.Answer(503, ""), "engine dead"),
        (scrape.Answer(503, "\n"), "engine dead"),
        (scrape.Answer(503, "upstream connect error"), "unavailable"),
        (scrape.Answer(503, '{"error": "The model is unavailable"}'), "unavailable"),
        (scrape.Answer(0, "", "refused"), "refused"),
        (scrape.Answer(0, ""), "unanswered"),
        (scrape.Answer(404, ""), "unanswered"),
        (scrape.Answer(500, ""), "unanswered"),
    ],
)
def test_the_meaning_of_each_answer_of_health(answer, health):
    assert scrape.health(answer) == health


# ---- canaries


def canary(*routes, rank=None, timeout_s=5.0, **target):
    async def ask():
        async with served(*routes) as (session, url):
            return await canary_at(session, Target(url=url, **target), rank, timeout_s)

    return asyncio.run(ask())


def canary_at(session, target, rank=None, timeout_s=5.0):
    return scrape.canary(session, target, "shown", rank, timeout_s, connect_s=1.0)


class Api:
    """A handler that answers with one status and body. ``requests``: path, body and headers of each request."""

    def __init__(self, status=200, body="{}"):
        self.requests, self.status, self.body = [], status, body

    async def answer(self, request):
        self.requests.append((request.path, await request.json(), dict(request.headers)))
        return web.Response(status=self.status, text=self.body)


def test_a_canary_requests_one_token_of_the_served_model():
    api = Api()
    assert canary(web.post("/v1/completions", api.answer), api_key="k") == CanaryResult("answered")
    ((_, body, headers),) = api.requests
    assert body == {"model": "shown", "prompt": [1], "max_tokens": 1, "temperature": 0}
    assert headers["Authorization"] == "Bearer k"
    assert "X-data-parallel-rank" not in headers


def test_a_canary_can_name_the_engine_and_another_model_name():
    api = Api()
    canary(web.post("/v1/completions", api.answer), rank=3, model="mine")
    ((_, body, headers),) = api.requests
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
def test_a_model_that_does_not_generate_gets_a_pooling_request(no_route):
    pooling = Api()
    assert canary(
        web.post("/v1/completions", Api(*no_route).answer), web.post("/pooling", pooling.answer)
    ) == CanaryResult("answered")
    assert pooling.requests[0][1] == {"model": "shown", "input": [1]}


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
def test_a_4xx_status_is_refused_and_other_errors_are_inconclusive(status, kind):
    body = '{"error": {"message": "The model `x`\\ndoes not exist."}}'
    pooling = Api()
    result = canary(web.post("/v1/completions", Api(status, body).answer), web.post("/pooling", pooling.answer))
    assert result == CanaryResult(kind, f"{status} from /v1/completions: The model `x` does not exist.")
    assert not pooling.requests


def test_a_canary_without_an_answer_in_time_is_none():
    async def never(_):
        await asyncio.sleep(60)

    assert canary(web.post("/v1/completions", never), timeout_s=0.2) is None


def canary_of(url, **target):
    async def ask():
        async with scrape.session() as session:
            return await canary_at(session, Target(url=url, **target))

    return asyncio.run(ask())


def test_a_canary_that_cannot_be_sent_failed_and_says_why():
    assert canary_of("http://127.0.0.1:1") == CanaryResult("failed", "http://127.0.0.1:1/is_paused: Connection refused")
    no_such_host = canary_of("http://no-such-host.invalid")
    assert no_such_host.kind == "failed"
    assert "no-such-host.invalid/is_paused: " in no_such_host.detail


def test_a_key_that_no_header_can_carry_fails_the_canary_and_is_not_shown():
    async def ask():
        async with served(web.post("/v1/completions", Api().answer)) as (session, url):
            return await canary_at(session, Target(url=url, api_key="secret\nkey"))

    result = asyncio.run(ask())
    assert result.kind == "failed"
    assert "the prober cannot send the request" in result.detail
    assert "secret" not in result.detail


def test_a_canary_whose_connection_is_reset_failed():
    async def ask():
        async def reset(_, writer):
            writer.transport.abort()

        listening = await asyncio.start_server(reset, "127.0.0.1", 0)
        port = listening.sockets[0].getsockname()[1]
        async with listening, scrape.session() as session:
            return await canary_at(session, Target(url=f"http://127.0.0.1:{port}"))

    assert asyncio.run(ask()).kind == "failed"


def test_a_canary_without_a_free_file_descriptor_failed():
    async def ask():
        async with scrape.session() as session:
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, limit[1]))
            try:
                return await canary_at(session, Target(url="http://127.0.0.1:9"))
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limit)

    result = asyncio.run(ask())
    assert result.kind == "failed"
    assert result.detail.endswith("/is_paused: Too many open files")


@contextlib.contextmanager
def stopped_server():
    """Yield the URL of a server that accepts nothing. Its queue is full, so connections wait."""
    with socket.socket() as full, contextlib.ExitStack() as waiting:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(3):
            client = waiting.enter_context(socket.socket())
            client.setblocking(0)
            client.connect_ex(full.getsockname())
        yield f"http://127.0.0.1:{full.getsockname()[1]}"


def test_a_full_queue_of_connections_is_silence_only_on_this_machine():
    with stopped_server() as url:
        assert canary_of(url) is None


def test_a_connection_to_another_machine_that_times_out_says_nothing_of_vllm(monkeypatch):
    monkeypatch.setattr(scrape, "is_own_address", lambda _: False)
    with stopped_server() as url:
        result = canary_of(url)
    assert result.kind == "failed"
    assert result.detail.endswith("/is_paused: the server does not accept the connection in time")


def test_a_paused_engine_gets_no_canary():
    api = Api()
    paused = web.get("/is_paused", answering(200, '{"is_paused": true}'))
    assert canary(paused, web.post("/v1/completions", api.answer)) == CanaryResult("paused")
    assert not api.requests
    resumed = web.get("/is_paused", answering(200, '{"is_paused":false}'))
    assert canary(resumed, web.post("/v1/completions", api.answer)) == CanaryResult("answered")
