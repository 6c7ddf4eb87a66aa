"""The health port over real sockets. The tests make the states that it shows."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import re
import socket
import time
from pathlib import Path
from typing import get_args

import aiohttp
import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from vllm_health import judgement, metrics, server, state
from vllm_health.limits import Limits
from vllm_health.state import Engine, EngineWatch, Name, State

CSS_COLORS = {"blue", "green", "lightgreen", "yellow", "orange", "chocolate", "grey", "darkred", "purple", "red"}
"""The ten named colours of CSS Color Module Level 4 that the states may use."""

STARTING = state.initial(0.0)
READY = msgspec.structs.replace(
    STARTING,
    name="ready",
    reason="All <is> well.",
    started=True,
    phases={"compiling": 12.0},
    engines={"0": EngineWatch(engine=Engine(steps={}, running=3, kv_usage=0.25), quiet_s=7)},
)


class Port:
    """A server under test. It shows ``state`` and ``values``."""

    def __init__(self, shown: State = READY) -> None:
        self.state, self.values = shown, {"ready": {(): 1.0}, "canaries": {("answered",): 4.0}}

    @contextlib.asynccontextmanager
    async def open(self):
        view = server.View(lambda: self.state, Limits(), lambda: self.values)
        listening = await server.serve(view, "127.0.0.1", 0)
        self.port = listening.port
        try:
            async with aiohttp.ClientSession() as session:
                yield lambda route: session.get(f"http://127.0.0.1:{self.port}{route}")
        finally:
            await listening.close()

    def ask(self, *routes):
        async def ask_all():
            answers = []
            async with self.open() as get:
                for route in routes:
                    async with get(route) as answer:
                        answers.append((answer.status, await answer.text(), answer.headers))
            return answers

        return asyncio.run(ask_all())


@pytest.mark.parametrize(("shown", "codes"), [(STARTING, [200, 503, 503]), (READY, [200, 200, 200])])
def test_each_probe_answers_with_its_verdict_and_the_reason(shown, codes):
    answers = Port(shown).ask("/livez", "/readyz", "/startupz")
    assert [status for status, _, _ in answers] == codes
    assert {text for _, text, _ in answers} == {f"{shown.reason}\n"}


@pytest.mark.parametrize("host", ["", "::"])
def test_a_server_on_every_address_answers_on_both_families(host):
    async def ask_both():
        view = server.View(lambda: READY, Limits(), dict)
        listening = await server.serve(view, host, 0)
        try:
            async with aiohttp.ClientSession() as session:
                for address in ("127.0.0.1", "[::1]"):
                    async with session.get(f"http://{address}:{listening.port}/livez") as answer:
                        assert answer.status == 200
        finally:
            await listening.close()

    asyncio.run(ask_both())


def test_metrics_are_in_prometheus_format_with_help_and_include_our_process():
    ((status, text, headers),) = Port().ask("/metrics")
    assert status == 200
    assert headers["Content-Type"].startswith("text/plain; version=0.0.4")
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert families["vllm_health_ready"].samples[0].value == 1
    (canaries,) = families["vllm_health_canaries"].samples
    assert (canaries.name, canaries.labels) == ("vllm_health_canaries_total", {"model_name": "", "result": "answered"})
    assert families["vllm_health_process_resident_memory_bytes"].samples[0].value > 1 << 20
    assert all(family.documentation for family in families.values())


def test_a_metric_without_a_description_is_an_error():
    exposition = metrics.Exposition()
    exposition.values = {"no such metric": {(): 1.0}}
    with pytest.raises(KeyError):
        exposition.text()


def test_the_page_shows_state_duration_and_reason():
    shown = msgspec.structs.replace(READY, since=time.monotonic() - 100)
    ((status, text, headers),) = Port(shown).ask("/")
    assert status == 200
    assert headers["Content-Type"].startswith("text/html")
    for words in (
        "<h1>vLLM: ready</h1>",
        "All &lt;is&gt; well.",
        "In this state for 100 s. Live. Ready. Started.",
        "compiling",
        "25%",
        "7 s",
    ):
        assert words in text
    assert "Not ready." in Port(STARTING).ask("/")[0][1]


@pytest.mark.parametrize("name", get_args(Name))
def test_the_page_has_a_css_colour_for_each_state(name):
    ((_, text, _),) = Port(msgspec.structs.replace(READY, name=name)).ask("/")
    (color,) = re.findall(r"solid (\w+);", text)
    assert color == metrics.COLORS[name].replace(" ", "") in CSS_COLORS


def test_an_unknown_route_is_404():
    assert Port().ask("/health")[0][0] == 404


def test_a_port_in_use_is_an_oserror_and_leaves_nothing_open():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        view = server.View(lambda: READY, Limits(), dict)
        with pytest.raises(OSError, match="address already in use"):
            asyncio.run(server.serve(view, "127.0.0.1", listener.getsockname()[1]))


def test_probes_are_answered_during_a_flood_of_silent_connections_and_old_ones_are_closed():
    async def flood():
        port = Port()
        async with port.open() as get:
            silent = []
            for _ in range(2000):
                silent.append(await asyncio.open_connection("127.0.0.1", port.port))
                if len(silent) % 100 == 0:
                    async with get("/livez") as answer:
                        assert answer.status == 200
            gc.collect()
            handlers = [item for item in gc.get_objects() if type(item) is aiohttp.web_protocol.RequestHandler]
            open_handlers = [handler for handler in handlers if handler.transport is not None]
            for _, writer in silent:
                writer.close()
            return len(open_handlers)

    assert asyncio.run(flood()) <= server.MAX_CONNECTIONS


def test_each_answer_closes_its_connection():
    assert Port().ask("/livez")[0][2]["Connection"] == "close"


README = (Path(__file__).parents[3] / "healthcheck/README.md").read_text()


def test_the_readme_has_every_state_with_its_verdicts():
    rows = {
        row[1].strip(" `"): [int(cell) for cell in row[2:5]]
        for row in (line.split("|") for line in README.splitlines())
        if len(row) == 7 and row[2].strip().isdecimal()
    }
    assert set(rows) == set(metrics.STATES)
    for name, codes in rows.items():
        shown = msgspec.structs.replace(READY, name=name, started=name != "starting")
        verdicts = judgement.verdicts(shown, Limits())
        passed = (verdicts.started, verdicts.ready, verdicts.live)
        assert codes == [200 if answer else 503 for answer in passed], name


def test_the_readme_has_every_metric_and_the_time_bounds():
    text = " ".join(README.split())
    for name in (*metrics.GAUGES, *metrics.COUNTERS):
        assert re.search(rf"`{name.removeprefix(metrics.PREFIX)}[`{{]", text), name
    limits = Limits()
    assert f"within {limits.unready_after_s:.0f} s, and dead and ended within {limits.dead_after_s:.0f} s" in text
