"""Drains vLLM: it becomes unready, then refuses new requests, then gets SIGTERM and finishes its requests.

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
"""Seconds between two checks whether all API servers have exited."""


class Drain:
    """One drain of vLLM. ``sentence`` is the text that the probes show, and None before the drain begins.

    ``asked_to_end`` is True once vLLM got SIGTERM. From then on its processes may exit.
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
        """Store the times, in seconds, and the two flag files.

        ``delay``: until vLLM refuses new requests. ``shutdown_timeout``: for vLLM to finish its requests. ``margin``:
        for its processes to exit after that. While the file ``drain_flag`` exists, the guard inside vLLM closes each
        connection after its next response. While ``refuse_flag`` exists, it refuses new requests. ``say`` prints a
        line.
        """
        self.sentence: str | None = None
        self.asked_to_end = False
        self._delay, self._shutdown_timeout, self._limit = delay, shutdown_timeout, shutdown_timeout + margin
        self._drain_flag, self._refuse_flag, self._say = drain_flag, refuse_flag, say

    def begin(self, number: signal.Signals) -> None:
        """Mark vLLM as not ready. ``run`` does the rest of the drain."""
        self.sentence = f"{number.name} received: vLLM drains for at most {self._delay + self._limit:.0f} s."
        self._say(f"{number.name}: not ready any more, still accepting new requests for {self._delay:g} s")

    async def run(self, pid: int, exited: asyncio.Future[int], titles: Mapping[int, str]) -> tuple[int, str | None]:
        """Drain vLLM. Return the launcher's exit code and one sentence that says what failed, or None.

        ``pid``: vLLM's. ``exited``: its exit status. ``titles``: the titles of vLLM's processes by pid.
        """
        _touch(self._drain_flag)
        await asyncio.sleep(self._delay)
        _touch(self._refuse_flag)
        limit = f"{self._shutdown_timeout:g} s"
        self._say(
            f"vLLM finishes accepted requests for at most {limit} and refuses new ones. "
            "A second signal stops vLLM at once"
        )
        self.asked_to_end = True
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        servers = [server for server, title in titles.items() if "::APIServer" in title]
        try:
            async with asyncio.timeout(self._limit):
                status = await self._end_or_idle(exited, servers)
        except TimeoutError:
            limit = f"{self._limit:.0f} s"
            return 1, f"vLLM did not exit within {limit} of SIGTERM, so the launcher killed all of its processes"
        if status in {0, -signal.SIGTERM, 128 + signal.SIGTERM, None}:
            return 0, None
        return progress.exit_code(status), f"vLLM {progress.how_it_ended(status)} at the end of the drain"

    async def _end_or_idle(self, exited: asyncio.Future[int], servers: Sequence[int]) -> int | None:
        """Return vLLM's exit status, or None as soon as all ``servers`` have exited, because then no stream is open.

        With several API servers, vLLM then gives each engine the whole shutdown timeout again. Data-parallel engines
        use all of it (v1/utils.py:shutdown; measured with vLLM 0.32.0, DP=2).
        """
        while not exited.done():
            if servers and not any(map(process.is_alive, servers)):
                self._say("all API servers have exited, so no stream is open. The launcher stops the engines")
                return None
            await asyncio.wait([exited], timeout=POLL_SECONDS)
        return exited.result()


def _touch(flag: Path) -> None:
    with contextlib.suppress(OSError):  # a full disk must not prevent the drain
        flag.touch()
