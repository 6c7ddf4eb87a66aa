"""The prober's time limits. All follow from two numbers, which the launcher and the sidecar set. Owns the defaults."""

from __future__ import annotations

from typing import Final

import msgspec

DEFAULT_STALL_S: Final = 300
"""Default of ``Limits.stall_s``, in seconds. vLLM's own limit is 300 s a step, where it has one
(VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS). JIT compilation on live traffic has stalled engines for 30-70 s
(ai-dynamo/dynamo#14735)."""
DEFAULT_START_STALL_S: Final = 600
"""Default of ``Limits.start_stall_s``, in seconds."""
STALLED_STRIKES: Final = 2
"""Unanswered canaries after which an engine is ``stalled``."""
DEAD_STRIKES: Final = 3
"""Unanswered canaries after which an engine is ``dead``."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """The time limits of one prober, in seconds.

    Counted from the last step of a stuck engine, /readyz fails after at most ``unready_after_s``, and the engine is
    dead after at most ``dead_after_s``. Both bounds hold only while the prober itself gets CPU time.
    """

    stall_s: float = DEFAULT_STALL_S
    """Time without a step, plus some samples, after which a hung engine is dead. 0: never."""
    start_stall_s: float = DEFAULT_START_STALL_S
    """Time without progress after which a start is dead. 0: never."""
    drain_s: float = 0.0
    """Time for a drain. Requests that still run after it are cut. 0: unknown, as in a sidecar. No verdict uses it."""
    gpu_fault_kills: bool = False
    """Whether a fatal GPU fault fails liveness too. A restart repairs no GPU, but may move vLLM to another one."""

    @property
    def interval_s(self) -> float:
        """Return the time between two samples."""
        return min(max(self.stall_s / 30, 0.2), 5.0) if self.stall_s else 5.0

    @property
    def busy_quiet_s(self) -> float:
        """Return the time without a step after which a busy engine gets a canary.

        The default, 120 s, is far longer than any JIT compilation.
        """
        return self.stall_s * 0.4

    @property
    def idle_quiet_s(self) -> float:
        """Return the time without a step after which an idle engine gets a canary.

        Nothing else would show that an idle engine hangs.
        """
        return self.stall_s * 0.2

    @property
    def canary_s(self) -> float:
        """Return the time that a canary may take. A canary that takes longer is a strike, unless the engine steps."""
        return self.stall_s * 0.2

    @property
    def refused_retry_s(self) -> float:
        """Return the time after which a canary that vLLM or a proxy refused is tried again."""
        return self.stall_s

    @property
    def longest_gap_s(self) -> float:
        """Return the most that a pause between samples counts for. A stopped prober has watched nothing meanwhile."""
        return 2 * self.interval_s

    @property
    def unready_after_s(self) -> float:
        """Return the longest time from a stuck engine's last step to not ready. Each stage may be a sample late."""
        return self.busy_quiet_s + STALLED_STRIKES * self.canary_s + (STALLED_STRIKES + 2) * self.interval_s

    @property
    def dead_after_s(self) -> float:
        """Return the longest time from a stuck engine's last step to dead."""
        return self.busy_quiet_s + DEAD_STRIKES * self.canary_s + (DEAD_STRIKES + 2) * self.interval_s
