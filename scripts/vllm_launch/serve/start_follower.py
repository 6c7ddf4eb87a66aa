"""Follows one start of vLLM. Derives the phase, the progress and the lines for the user from its log and processes.

Pure: the time, the log lines and the processes are arguments.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from vllm_health.state import Movement
from vllm_launch.engine import multicast
from vllm_launch.serve import progress
from vllm_launch.serve.process import Process

SPEAK_SECONDS = 10.0
"""Seconds between two progress lines within one phase."""


class StartFollower:
    """One start of vLLM. ``phase`` is one of ``progress.PHASES``. ``moved`` has its I/O and memory so far."""

    def __init__(
        self,
        began: float,
        last_phases: Mapping[str, float],
        weights_bytes: int | None,
        *,
        gpu: bool,
        no_multicast: bool,
    ) -> None:
        """Begin at the time ``began`` of a monotonic clock.

        ``last_phases``: seconds by phase of the last start like this one. ``gpu``: whether vLLM runs on GPUs.
        ``no_multicast``: NVLink multicast must stay unused.
        """
        self.phase = "starting"
        self.moved = self._loading_from = Movement()
        self._began = self._spoken = began
        self._last_phases, self._weights_bytes = last_phases, weights_bytes
        self._gpu, self._no_multicast = gpu, no_multicast
        self._lines = 0

    def follow(self, lines: Iterable[str], alive: Sequence[Process], gpu_bytes: int, now: float) -> list[str]:
        """Update the phase and the progress, and return the lines to print.

        ``lines``: vLLM's log since the last call. ``alive``: its processes. ``gpu_bytes``: bytes in use on its GPUs.
        """
        before, messages = self.phase, list[str]()
        for line in lines:
            self._lines += progress.shows_progress(line)
            self.phase = progress.phase_after(self.phase, line)
            if self._no_multicast and (backends := multicast.all_reduce_backends(line)):
                messages.append(all_reduce_sentence(backends))
        self._move(alive, gpu_bytes)
        if self.phase != before or now - self._spoken >= SPEAK_SECONDS:
            self._spoken = now
            messages.append(self.sentence(now))
        return messages

    def _move(self, alive: Sequence[Process], gpu_bytes: int) -> None:
        now = Movement(
            lines=self._lines,
            processes=len(alive),
            read=sum(process.read for process in alive),
            written=sum(process.written for process in alive),
            resident=sum(process.resident for process in alive),
            gpu=gpu_bytes,
        )
        if progress.downloading(self.phase, self.moved, now):
            self.phase = "downloading"
        if progress.PHASES.index(self.phase) < progress.PHASES.index("loading weights"):
            self._loading_from = now
        self.moved = now

    @property
    def loaded_bytes(self) -> int | None:
        """The bytes of weights loaded so far, or None if their size is unknown."""
        return min(self._loaded, self._weights_bytes) if self._weights_bytes else None

    @property
    def _loaded(self) -> int:
        return progress.loaded(self._loading_from, self.moved)

    def remaining_s(self, phases: Mapping[str, float]) -> float | None:
        """Return the seconds that are left if this start takes as long as the last one, or None without a last one.

        ``phases``: seconds by phase of this start.
        """
        return progress.remaining(self._last_phases, phases, self.phase)

    def sentence(self, now: float) -> str:
        """Return the progress of the start in one line."""
        elapsed_s = now - self._began
        return progress.sentence(
            self.phase, elapsed_s, self._loaded, self._weights_bytes, self._last_phases, gpu=self._gpu
        )


def all_reduce_sentence(backends: Sequence[str]) -> str:
    """Return whether vLLM may use NVLink multicast, as a sentence. ``backends``: the all-reduces in vLLM's log."""
    if users := multicast.multicast_users(backends):
        return f"warning: NVLink multicast is off, but these all-reduce backends of vLLM may use it: {', '.join(users)}"
    return f"all-reduce does not use NVLink multicast: {', '.join(backends)}"
