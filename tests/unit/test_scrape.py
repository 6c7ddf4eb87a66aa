import asyncio

import aiohttp
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from vllm_health import scrape


def info(engine, size):
    return f'vllm:cache_config_info{{block_size="128",engine="{engine}",kv_cache_size_tokens="{size}"}} 1.0\n'


def test_the_kv_cache_of_each_engine_is_read_from_the_exposition():
    head = "# TYPE vllm:cache_config_info gauge\n"
    assert scrape.kv_cache_tokens(head + info(0, 524288) + info(1, 100)) == {"0": 524288, "1": 100}


@pytest.mark.parametrize("text", ["", "x 1\n", "vllm:cache_config_info{", info(0, "None"), info(0, "-3"), "a{b=} 1\n"])
def test_an_exposition_that_does_not_say_gives_nothing(text):
    assert scrape.kv_cache_tokens(text) == {}


@given(st.text())
def test_no_text_breaks_the_reader(text):
    assert isinstance(scrape.kv_cache_tokens(text), dict)
    assert isinstance(scrape.kv_cache_tokens(info(0, 7) + text), dict)


async def asked(handler, timeout_s):
    app = web.Application()
    app.router.add_get("/x", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    try:
        async with aiohttp.ClientSession() as session:
            return await scrape.get(session, f"http://127.0.0.1:{port}/x", timeout_s)
    finally:
        await runner.cleanup()


def test_an_answer_has_its_status_and_body():
    async def handler(_):
        return web.Response(status=503, text="dead")

    assert asyncio.run(asked(handler, 5)) == scrape.Answer(503, "dead")


def test_a_body_is_cut_at_its_bound(monkeypatch):
    monkeypatch.setattr(scrape, "MAX_BYTES", 1000)

    async def handler(_):
        return web.Response(text="x" * 300_000)

    assert len(asyncio.run(asked(handler, 5)).body) == 1000


def test_a_server_that_does_not_answer_in_time_is_status_0():
    async def handler(_):
        await asyncio.sleep(60)

    answer = asyncio.run(asked(handler, 0.1))
    assert answer.status == 0
    assert "Timeout" in answer.body


def test_nobody_there_is_status_0():
    async def ask():
        async with aiohttp.ClientSession() as session:
            return await scrape.get(session, "http://127.0.0.1:1/x", 5)

    assert asyncio.run(ask()).status == 0
