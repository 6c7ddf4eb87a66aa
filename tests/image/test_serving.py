"""The image serves, drains, dies and comes back, as somebody without a name on a root that nobody can write."""

from __future__ import annotations

import os
import signal
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from containers import LOCKED_DOWN, docker, inside
from streams import USAGE, cut

pytestmark = pytest.mark.timeout(900)
STREAM = {"model": "tiny", "prompt": "hi", "max_tokens": 300, "ignore_eos": True, "stream": True} | USAGE
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}


def test_a_killed_engine_is_a_failure_that_a_restart_policy_mends_and_docker_stop_cuts_no_stream(begin):
    container = begin(*LOCKED_DOWN, "--restart=on-failure")
    container.wait_for("vllm-launch: ready")
    os.kill(next(pid for pid, _, title in container.processes() if "VLLM::EngineCore" in title), signal.SIGKILL)
    container.wait_for("vllm-launch: ready", times=2)
    assert container.state("RestartCount") == 1
    assert "VLLM::EngineCore" in container.log()
    ended_without_a_cut(container, lambda: docker("stop", "-t", "180", container.name))
    assert container.state("RestartCount") == 1


def test_below_an_init_too_and_a_hangup_drains_as_sigterm_does(begin):
    """It was asked for, so the policy does not start it again."""
    container = begin(*LOCKED_DOWN, "--init", "--restart=on-failure")
    container.wait_for("vllm-launch: ready")
    ended_without_a_cut(container, lambda: docker("kill", "--signal=HUP", container.name))
    assert container.state("RestartCount") == 0


def ended_without_a_cut(container, end):
    """Clients that leave, then fifty streams in the middle of which ``end`` ends the container: none is cut."""
    assert container.ask("/v1/chat/completions", CHAT)[0] == 200
    for _ in range(20):  # clients that go away in the middle
        request = urllib.request.Request(
            f"{container.url}/v1/completions",
            b'{"model": "tiny", "prompt": "hi", "max_tokens": 400, "ignore_eos": true, "stream": true}',
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            answer.readline()
    assert [title for _, state, title in container.processes() if state.startswith("Z")] == []
    with ThreadPoolExecutor(50) as pool:
        streams = [pool.submit(container.ask, "/v1/completions", STREAM) for _ in range(50)]
        time.sleep(3)
        end()
        assert container.wait(180) == 0
        answers = [stream.result(10) for stream in streams]
    assert [status for status, _ in answers] == [200] * 50
    assert [why for _, text in answers if (why := cut(text.splitlines(), STREAM["max_tokens"]))] == []
    assert container.state("State.ExitCode") == 0
    assert not container.state("State.OOMKilled")


def test_without_a_network_the_smoke_client_inside_finds_all_that_is_switched_on(begin):
    # The model is random: it would fill with white space what a grammar allows it to, and calls no tool.
    strict = '--structured-outputs-config={"backend": "xgrammar", "disable_any_whitespace": true}'
    container = begin(*LOCKED_DOWN, "--network=none", serve=[strict])
    container.wait_for("vllm-launch: ready")
    told = inside(container.name, "vllm-health smoke http://127.0.0.1:8000").splitlines()
    assert [(line[6:].partition(":")[0], line[:4].strip()) for line in told] == [
        ("models", "ok"), ("completion", "ok"), ("chat", "ok"), ("stream", "ok"), ("tool call", "off"),
        ("structured output", "ok"),
    ]  # fmt: skip
    cost = inside(
        container.name,
        "b=${EPOCHREALTIME/./}; for i in {1..20}; do healthcheck livez >/dev/null; done; echo $(((${EPOCHREALTIME/./} - b) / 20))",
    )
    print(f"a health check takes {int(cost) / 1000:.1f} ms")
    assert int(cost) < 25_000
    deadline = time.monotonic() + 60
    while container.state("State.Health.Status") != "healthy":
        assert time.monotonic() < deadline
        time.sleep(1)
    docker("kill", "--signal=QUIT", container.name)
    assert container.wait(15) == 128 + signal.SIGQUIT
