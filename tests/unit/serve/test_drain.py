"""The drain over real processes that stand in for vLLM; through the supervisor it is tried in test_supervisor.py."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys

import pytest

from vllm_launch.serve.drain import Drain

ENDS = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(CODE)); print(flush=True); time.sleep(60)"
DEAF = ENDS.replace("lambda *_: sys.exit(CODE)", "signal.SIG_IGN")


class Drained:
    """One drain of a stand-in, beside a process of vLLM's that has already ended."""

    def __init__(self, folder, **changes):
        self.flags, self.lines = [folder / "draining", folder / "refusing"], []
        flags = dict(zip(("drain_flag", "refuse_flag"), self.flags, strict=True))
        self.drain = Drain(
            **{"delay": 0.3, "shutdown_timeout": 1, "margin": 1, "say": self.lines.append, **flags, **changes}
        )

    def through(self, code, title="VLLM::EngineCore"):
        return asyncio.run(self._through(code, title))

    async def _through(self, code, title):
        child = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=subprocess.PIPE)
        try:
            assert await child.stdout.readline() == b"\n"  # its handler is there
            exited = asyncio.ensure_future(child.wait())
            server = await asyncio.create_subprocess_exec("true")
            await server.wait()
            self.drain.begin(signal.SIGTERM)
            self.before = [flag.exists() for flag in self.flags], self.drain.asked_to_end
            running = asyncio.ensure_future(self.drain.run(child.pid, exited, {server.pid: title}))
            await asyncio.sleep(0.1)
            self.meanwhile = [flag.exists() for flag in self.flags], self.drain.asked_to_end
            return await running
        finally:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()


@pytest.mark.parametrize(
    ("code", "expected"),
    [(0, (0, None)), (143, (0, None)), (3, (3, "vLLM ended its drain with 3"))],
)
def test_the_end_of_a_drain_is_good_unless_vllm_exits_with_an_error(tmp_path, code, expected):
    drained = Drained(tmp_path)
    assert drained.through(ENDS.replace("CODE", str(code))) == expected
    assert drained.lines == [
        "SIGTERM: not ready any more, still serving for 0.3 s",
        "vLLM finishes what it has begun, for at most 1 s; once more ends it at once",
    ]


def test_requests_are_refused_and_the_end_is_expected_only_after_the_delay(tmp_path):
    drained = Drained(tmp_path)
    assert drained.drain.sentence is None
    drained.through(ENDS.replace("CODE", "0"))
    assert drained.drain.sentence == "SIGTERM came: vLLM drains for at most 2 s."
    assert drained.before == ([False, False], False)
    assert drained.meanwhile == ([True, False], False)
    assert (all(flag.exists() for flag in drained.flags), drained.drain.asked_to_end) == (True, True)


def test_a_vllm_that_does_not_end_is_given_up_with_a_reason(tmp_path):
    drained = Drained(tmp_path, delay=0, shutdown_timeout=0.5, margin=0.6)
    assert drained.through(DEAF) == (1, "vLLM did not end within 1 s of its drain, so all was ended")


def test_engines_are_not_waited_for_once_the_last_api_server_is_gone(tmp_path):
    drained = Drained(tmp_path, shutdown_timeout=60)
    assert drained.through(DEAF, title="VLLM::APIServer_0") == (0, None)
    assert drained.lines[-1] == "every stream has ended, and so do the engines"


def test_flags_that_cannot_be_written_do_not_keep_vllm_from_draining(tmp_path):
    drained = Drained(tmp_path / "not" / "there")
    assert drained.through(ENDS.replace("CODE", "0")) == (0, None)
