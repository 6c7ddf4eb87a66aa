"""Drains vLLM: it becomes unready, then refuses new requests, then gets SIGTERM and finishes its requests.

Touches files, signals and processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from vllm_launch.serve import cause, process

POLL_SECONDS = 0.5
"""Seconds between two checks whether all API servers have exited."""

GOOD_ENDS = frozenset({0, -signal.SIGTERM, 128 + signal.SIGTERM})
"""Exit statuses of a vLLM that did what SIGTERM asks for."""


class Drain:
    """One drain of vLLM. ``sentence`` is the text that the probes show, and None before the drain begins.

    ``asked_to_end`` is True once vLLM got SIGTERM. From then on its processes may exit. systemd and some shells send
    SIGTERM to all processes at once, so vLLM may have got it before. ``early``: it exited before the launcher sent it.
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
        streams: Callable[[], float] = lambda: 0,
        cut: Callable[[], bool] = lambda: False,
    ) -> None:
        """Store the times, in seconds, and the two flag files.

        ``delay``: until vLLM refuses new requests. ``shutdown_timeout``: for vLLM to finish its requests. ``margin``:
        for its processes to exit after that. While the file ``drain_flag`` exists, the guard inside vLLM closes each
        connection after its next response. While ``refuse_flag`` exists, it refuses new requests. ``say`` prints a
        line. ``streams`` returns the number of requests that vLLM had when it was last seen. ``cut`` returns whether
        vLLM's log says that it ended its engines by force.
        """
        self.sentence: str | None = None
        self.asked_to_end = self.early = False
        self._delay, self._shutdown_timeout, self._limit = delay, shutdown_timeout, shutdown_timeout + margin
        self._drain_flag, self._refuse_flag, self._say = drain_flag, refuse_flag, say
        self._streams, self._cut = streams, cut
        self._hurry = asyncio.Event()

    def begin(self, number: signal.Signals) -> None:
        """Mark vLLM as not ready. ``run`` does the rest of the drain."""
        self.sentence = f"{number.name} received: vLLM drains for at most {self._delay + self._limit:.0f} s."
        self._say(f"{number.name}: not ready any more, still accepting new requests for {self._delay:g} s")

    @property
    def begun(self) -> bool:
        """Whether the drain has begun."""
        return self.sentence is not None

    def hurry(self) -> None:
        """End the first step now, because vLLM no longer serves."""
        self._hurry.set()

    async def run(self, pid: int, exited: asyncio.Future[int], titles: Mapping[int, str]) -> tuple[int, str | None]:
        """Drain vLLM. Return the launcher's exit code and one sentence that says what failed, or None.

        ``pid``: vLLM's. ``exited``: its exit status. ``titles``: the titles of vLLM's processes by pid.
        """
        _touch(self._drain_flag)
        exited.add_done_callback(lambda _: self.hurry())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._delay):
                await self._hurry.wait()
        if exited.done():
            self.asked_to_end = self.early = True
            if exited.result() in GOOD_ENDS:
                self._say("vLLM has exited before the launcher sent SIGTERM: it got the signal too")
            return self._judge(exited.result(), 0)
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
        began = time.monotonic()
        try:
            async with asyncio.timeout(self._limit):
                status = await self._end_or_idle(exited, servers)
        except TimeoutError:
            limit = f"{self._limit:.0f} s"
            self._say_cut(f"vLLM did not finish in {limit}, so the launcher killed it")
            return 1, f"vLLM did not exit within {limit} of SIGTERM, so the launcher killed all of its processes"
        return self._judge(status, time.monotonic() - began)

    def _judge(self, status: int | None, seconds: float) -> tuple[int, str | None]:
        """Return what ``run`` returns. ``status``: vLLM's, None if its servers exited. ``seconds``: since SIGTERM."""
        if self._cut() or seconds >= self._shutdown_timeout - POLL_SECONDS:
            self._say_cut(f"vLLM's shutdown timeout of {self._shutdown_timeout:g} s was over")
        if status is None or status in GOOD_ENDS:
            return 0, None
        return cause.exit_code(status), f"vLLM {cause.how_it_ended(status)} at the end of the drain"

    def _say_cut(self, why: str) -> None:
        if count := round(self._streams()):
            requests = "1 request" if count == 1 else f"{count} requests"
            remedy = "If answers take longer, raise drain_seconds and the grace period"
            self._say(f"warning: {why}. This cut {requests}, the last number in vLLM's metrics. {remedy}")

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
