"""Tests of a running container with an unnamed user ID and a read-only root: it serves, drains, crashes and restarts."""

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


@pytest.mark.long  # two starts; tests/engine has the exit code and the drain, tests/cluster a restart by kubelet
def test_the_restart_policy_restarts_after_a_killed_engine_and_docker_stop_cuts_no_stream(begin):
    container = begin(*LOCKED_DOWN, "--restart=on-failure")
    container.wait_for("vllm-launch: ready")
    os.kill(next(pid for pid, _, title in container.processes() if "VLLM::EngineCore" in title), signal.SIGKILL)
    container.wait_for("vllm-launch: ready", times=2)
    assert container.state("RestartCount") == 1
    assert "VLLM::EngineCore" in container.log()
    check_that_no_stream_is_cut(container, lambda: docker("stop", "-t", "180", container.name))
    assert container.state("RestartCount") == 1


def test_sighup_drains_like_sigterm_also_below_an_init(begin):
    """The user asked for this stop, so the restart policy does not start the container again."""
    container = begin(*LOCKED_DOWN, "--init", "--restart=on-failure")
    container.wait_for("vllm-launch: ready")
    check_that_no_stream_is_cut(container, lambda: docker("kill", "--signal=HUP", container.name))
    assert container.state("RestartCount") == 0


def check_that_no_stream_is_cut(container, end):
    """Check that ``end`` stops the container in the middle of 50 streams without cutting one.

    Before that, 20 clients disconnect in the middle of a response.
    """
    assert container.ask("/v1/chat/completions", CHAT)[0] == 200
    for _ in range(20):
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


def test_without_a_network_the_smoke_client_reports_all_features_that_are_on(begin):
    # The model has random weights: it calls no tool, and without this option its JSON would be only white space.
    strict = '--structured-outputs-config={"backend": "xgrammar", "disable_any_whitespace": true}'
    container = begin(*LOCKED_DOWN, "--network=none", serve=[strict])
    container.wait_for("vllm-launch: ready")
    lines = inside(container.name, "vllm-health smoke http://127.0.0.1:8000").splitlines()
    assert [(line[6:].partition(":")[0], line[:4].strip()) for line in lines] == [
        ("models", "ok"), ("completion", "ok"), ("chat", "ok"), ("stream", "ok"), ("tool call", "off"),
        ("structured output", "ok"),
    ]  # fmt: skip
    microseconds = inside(
        container.name,
        "b=${EPOCHREALTIME/./}; for i in {1..20}; do healthcheck livez >/dev/null; done; echo $(((${EPOCHREALTIME/./} - b) / 20))",
    )
    print(f"a health check takes {int(microseconds) / 1000:.1f} ms")
    assert int(microseconds) < 25_000
    deadline = time.monotonic() + 60
    while container.state("State.Health.Status") != "healthy":
        assert time.monotonic() < deadline
        time.sleep(1)
    docker("kill", "--signal=QUIT", container.name)
    assert container.wait(15) == 128 + signal.SIGQUIT
