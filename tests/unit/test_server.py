import asyncio
import socket

import aiohttp
import pytest

from vllm_health import server
from vllm_health.server import Health, judge


@pytest.mark.parametrize(
    ("state", "live", "ready", "started"),
    [
        ("starting", True, False, False),
        ("ready", True, True, True),
        ("draining", True, False, True),
        ("stopped", False, False, False),
    ],
)
def test_each_probe_is_told_what_its_state_means_for_it(state, live, ready, started):
    health = Health(state, "A sentence.")
    assert [judge(route, health).ok for route in ("/livez", "/readyz", "/startupz")] == [live, ready, started]
    assert judge("/livez", health).sentence == "A sentence."


def test_the_port_answers_with_one_sentence_and_follows_the_state():
    async def ask():
        health = Health()
        runner = await server.serve(health, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        told = []
        try:
            async with aiohttp.ClientSession() as session:
                for state in ("starting", "ready"):
                    health.state = state
                    for route in ("/livez", "/readyz", "/startupz"):
                        async with session.get(url + route) as answer:
                            told.append((answer.status, await answer.text()))
        finally:
            await runner.cleanup()
        return told

    told = asyncio.run(ask())
    assert [status for status, _ in told] == [200, 503, 503, 200, 200, 200]
    assert told[0][1] == "vLLM is starting.\n"


def test_a_taken_port_is_an_oserror_and_leaves_nothing_open():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(OSError, match="address already in use"):
            asyncio.run(server.serve(Health(), "127.0.0.1", taken.getsockname()[1]))
