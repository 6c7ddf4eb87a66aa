"""The drain of vLLM: first unready, then closed to new requests, then SIGTERM until it has ended.

Touches files, signals and processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from vllm_launch.serve import process, progress

POLL_SECONDS = 0.5


class Drain:
    """One drain; it has begun once ``sentence``, which says so to probes, is not None.

    ``asked_to_end`` is True from vLLM's SIGTERM on: from then on its processes are expected to go.
    """

    def __init__(
        self,
        *,
        delay: float,
        shutdown_timeout: float,
        margin: float,
        drain_flag: Path,
        refuse_flag: Path,
        say: Callable[[str], None],
    ) -> None:
        """Seconds: ``delay`` until new requests are refused, ``shutdown_timeout`` for vLLM, ``margin`` on top of it.

        The presence of ``drain_flag`` tells the guard inside vLLM that connections end with their next answer, that of
        ``refuse_flag`` that new requests are turned away.
        """
        self.sentence: str | None = None
        self.asked_to_end = False
        self._delay, self._shutdown_timeout, self._limit = delay, shutdown_timeout, shutdown_timeout + margin
        self._drain_flag, self._refuse_flag, self._say = drain_flag, refuse_flag, say

    def begin(self, number: signal.Signals) -> None:
        """Say that vLLM is not ready any more. ``run`` does the rest."""
        self.sentence = f"{number.name} came: vLLM drains for at most {self._delay + self._limit:.0f} s."
        self._say(f"{number.name}: not ready any more, still serving for {self._delay:g} s")

    async def run(self, pid: int, exited: asyncio.Future[int], vital: Mapping[int, str]) -> tuple[int, str | None]:
        """Drain vLLM and return the launcher's exit code, and why in one sentence, None if all went well.

        ``pid`` is vLLM's and ``exited`` its exit status. ``vital``: titles of its processes by pid.
        """
        _touch(self._drain_flag)
        await asyncio.sleep(self._delay)
        _touch(self._refuse_flag)
        limit = f"{self._shutdown_timeout:g} s"
        self._say(f"vLLM finishes what it has begun, for at most {limit}; once more ends it at once")
        self.asked_to_end = True
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        servers = [one for one, title in vital.items() if "::APIServer" in title]
        try:
            async with asyncio.timeout(self._limit):
                status = await self._end_or_idle(exited, servers)
        except TimeoutError:
            return 1, f"vLLM did not end within {self._limit:.0f} s of its drain, so all was ended"
        if status in {0, -signal.SIGTERM, 128 + signal.SIGTERM, None}:
            return 0, None
        return progress.exit_code(status), f"vLLM ended its drain with {status}"

    async def _end_or_idle(self, exited: asyncio.Future[int], servers: Sequence[int]) -> int | None:
        """Return vLLM's exit status, or None as soon as all ``servers`` are gone, and with them the last stream.

        With several API servers vLLM then gives each engine the whole shutdown timeout once more, and data-parallel
        engines use it up (v1/utils.py:shutdown; seen with vLLM 0.32.0, DP=2).
        """
        while not exited.done():
            if servers and not any(map(process.is_alive, servers)):
                self._say("every stream has ended, and so do the engines")
                return None
            await asyncio.wait([exited], timeout=POLL_SECONDS)
        return exited.result()


def _touch(flag: Path) -> None:
    with contextlib.suppress(OSError):  # a full disk must not keep us from draining
        flag.touch()
