"""Follows one start of vLLM: its log and processes give the phase, what has moved, and lines for the user.

Pure: time and everything that is seen are arguments.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from vllm_health.state import Movement
from vllm_launch.engine import multicast
from vllm_launch.serve import progress
from vllm_launch.serve.process import Process

SPEAK_SECONDS = 10.0
"""Between two lines of progress while the phase stays the same."""


class StartFollower:
    """What is known of a start: its ``phase`` (one of ``progress.PHASES``) and, in ``moved``, what has moved so far."""

    def __init__(
        self, began: float, usual: Mapping[str, float], weights_bytes: int | None, *, gpu: bool, no_multicast: bool
    ) -> None:
        """``began``: the start's time, of a monotonic clock. ``usual``: seconds by phase of the last such start.

        ``gpu``: whether vLLM runs on GPUs. ``no_multicast``: NVLink multicast must stay unused.
        """
        self.phase = "starting"
        self.moved = self._loading_from = Movement()
        self._began = self._spoken = began
        self._usual, self._weights_bytes = usual, weights_bytes
        self._gpu, self._no_multicast = gpu, no_multicast
        self._lines = 0

    def follow(self, lines: Iterable[str], alive: Sequence[Process], gpu_bytes: int, now: float) -> list[str]:
        """Take in what is new and return the lines to print.

        ``lines``: of vLLM's log, since the last call. ``alive``: its processes. ``gpu_bytes``: in use on its GPUs.
        """
        before, said = self.phase, list[str]()
        for line in lines:
            self._lines += progress.tells_progress(line)
            self.phase = progress.phase_after(self.phase, line)
            if self._no_multicast and (ways := multicast.all_reduce_backends(line)):
                said.append(all_reduce_sentence(ways))
        self._move(alive, gpu_bytes)
        if self.phase != before or now - self._spoken >= SPEAK_SECONDS:
            self._spoken = now
            said.append(self.sentence(now))
        return said

    def _move(self, alive: Sequence[Process], gpu_bytes: int) -> None:
        now = Movement(
            lines=self._lines,
            processes=len(alive),
            read=sum(one.read for one in alive),
            written=sum(one.written for one in alive),
            resident=sum(one.resident for one in alive),
            gpu=gpu_bytes,
        )
        if progress.downloading(self.phase, self.moved, now):
            self.phase = "downloading"
        if progress.PHASES.index(self.phase) < progress.PHASES.index("loading weights"):
            self._loading_from = now
        self.moved = now

    @property
    def loaded_bytes(self) -> int | None:
        """Bytes of weights loaded so far; None where their size is not known."""
        return min(self._loaded, self._weights_bytes) if self._weights_bytes else None

    @property
    def _loaded(self) -> int:
        return progress.loaded(self._loading_from, self.moved)

    def remaining_s(self, taken: Mapping[str, float]) -> float | None:
        """Return the seconds that are left if this start takes as long as the last one; None where there was none.

        ``taken``: seconds by phase of this start.
        """
        return progress.remaining(self._usual, taken, self.phase)

    def sentence(self, now: float) -> str:
        """Return how far the start has come, in one line."""
        elapsed = now - self._began
        return progress.sentence(self.phase, elapsed, self._loaded, self._weights_bytes, self._usual, gpu=self._gpu)


def all_reduce_sentence(ways: Sequence[str]) -> str:
    """Return whether vLLM leaves NVLink multicast alone. ``ways``: its all-reduce backends, as its log names them."""
    if users := multicast.multicast_users(ways):
        return f"warning: all-reduce uses NVLink multicast: {', '.join(users)}"
    return f"all-reduce leaves NVLink multicast alone: {', '.join(ways)}"
