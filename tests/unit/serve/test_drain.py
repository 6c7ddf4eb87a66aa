"""The drain of real processes in place of vLLM. test_supervisor.py tests it through the supervisor."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys

import pytest

from vllm_launch.serve.drain import Drain

EXITS = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(CODE)); print(flush=True); time.sleep(60)"
IGNORES_SIGTERM = EXITS.replace("lambda *_: sys.exit(CODE)", "signal.SIG_IGN")


class DrainRun:
    """One drain of a child in place of vLLM, next to a process of vLLM that has already exited."""

    def __init__(self, folder, **changes):
        self.flags, self.lines = [folder / "draining", folder / "refusing"], []
        flags = dict(zip(("drain_flag", "refuse_flag"), self.flags, strict=True))
        self.drain = Drain(
            **{"delay": 0.3, "shutdown_timeout": 1, "margin": 1, "say": self.lines.append, **flags, **changes}
        )

    def drain_child(self, code, title="VLLM::EngineCore"):
        return asyncio.run(self._drain_child(code, title))

    async def _drain_child(self, code, title):
        child = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=subprocess.PIPE)
        try:
            assert await child.stdout.readline() == b"\n"  # the child has set its signal handler
            exited = asyncio.ensure_future(child.wait())
            server = await asyncio.create_subprocess_exec("true")
            await server.wait()
            self.drain.begin(signal.SIGTERM)
            self.flags_before = [flag.exists() for flag in self.flags], self.drain.asked_to_end
            running = asyncio.ensure_future(self.drain.run(child.pid, exited, {server.pid: title}))
            await asyncio.sleep(0.1)
            self.flags_in_delay = [flag.exists() for flag in self.flags], self.drain.asked_to_end
            return await running
        finally:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (0, (0, None)),
        (143, (0, None)),
        (3, (3, "vLLM exited with status 3 at the end of the drain")),
    ],
)
def test_a_drain_exits_with_0_unless_vllm_exits_with_an_error(tmp_path, code, expected):
    run = DrainRun(tmp_path)
    assert run.drain_child(EXITS.replace("CODE", str(code))) == expected
    assert run.lines == [
        "SIGTERM: not ready any more, still accepting new requests for 0.3 s",
        "vLLM finishes accepted requests for at most 1 s and refuses new ones. A second signal stops vLLM at once",
    ]


def test_requests_are_refused_and_vllm_gets_sigterm_only_after_the_delay(tmp_path):
    run = DrainRun(tmp_path)
    assert run.drain.sentence is None
    run.drain_child(EXITS.replace("CODE", "0"))
    assert run.drain.sentence == "SIGTERM received: vLLM drains for at most 2 s."
    assert run.flags_before == ([False, False], False)
    assert run.flags_in_delay == ([True, False], False)
    assert (all(flag.exists() for flag in run.flags), run.drain.asked_to_end) == (True, True)


def test_a_vllm_that_ignores_sigterm_is_exit_1_with_a_reason(tmp_path):
    run = DrainRun(tmp_path, delay=0, shutdown_timeout=0.5, margin=0.6)
    assert run.drain_child(IGNORES_SIGTERM) == (
        1,
        "vLLM did not exit within 1 s of SIGTERM, so the launcher killed all of its processes",
    )


def test_the_drain_does_not_wait_for_engines_after_the_last_api_server_exits(tmp_path):
    run = DrainRun(tmp_path, shutdown_timeout=60)
    assert run.drain_child(IGNORES_SIGTERM, title="VLLM::APIServer_0") == (0, None)
    assert run.lines[-1] == "all API servers have exited, so no stream is open. The launcher stops the engines"


def test_vllm_drains_even_if_the_flag_files_cannot_be_written(tmp_path):
    run = DrainRun(tmp_path / "not" / "there")
    assert run.drain_child(EXITS.replace("CODE", "0")) == (0, None)


DIES_IN_THE_DELAY = "import os, signal, sys, threading, time; print(flush=True); threading.Timer(0.3, lambda: END).start(); time.sleep(60)"


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        ("os._exit(0)", (0, None)),
        ("os._exit(143)", (0, None)),
        ("os.kill(os.getpid(), signal.SIGTERM)", (0, None)),
        ("os._exit(3)", (3, "vLLM exited with status 3 at the end of the drain")),
        ("os.kill(os.getpid(), signal.SIGKILL)", (137, "vLLM was killed by SIGKILL at the end of the drain")),
    ],
)
def test_a_vllm_that_ends_before_the_launchers_sigterm_ends_the_drain_at_once(tmp_path, end, expected):
    run = DrainRun(tmp_path, delay=60)
    assert run.drain_child(DIES_IN_THE_DELAY.replace("END", end)) == expected
    assert run.drain.early
    assert any("got the signal too" in line for line in run.lines) == (expected == (0, None))


def test_the_first_step_ends_when_vllm_no_longer_serves(tmp_path):
    run = DrainRun(tmp_path, delay=60)
    run.drain.hurry()
    assert run.drain_child(EXITS.replace("CODE", "0")) == (0, None)
    assert not run.drain.early


@pytest.mark.parametrize(("count", "cut"), [(0, None), (1, "cut 1 request,"), (3, "cut 3 requests,")])
def test_requests_that_are_open_when_time_is_over_are_counted(tmp_path, count, cut):
    run = DrainRun(tmp_path, delay=0, shutdown_timeout=0.5, margin=0.6, streams=lambda: count)
    run.drain_child(IGNORES_SIGTERM)
    assert [line for line in run.lines if line.startswith("warning: ")] == (
        [line for line in run.lines if cut and cut in line]
    )
    assert any("cut" in line for line in run.lines) == bool(cut)


def test_requests_of_a_vllm_that_finishes_in_time_are_not_called_cut(tmp_path):
    run = DrainRun(tmp_path, shutdown_timeout=60, streams=lambda: 3)  # seen a second ago, and finished since
    run.drain_child(EXITS.replace("CODE", "0"))
    assert not any("cut" in line for line in run.lines)
