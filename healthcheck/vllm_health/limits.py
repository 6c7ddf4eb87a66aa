"""The prober's times, all derived from two numbers; the launcher and the sidecar fill them in. Owns their defaults."""

from __future__ import annotations

from typing import Final

import msgspec

DEFAULT_STALL_S: Final = 300
"""Default of ``Limits.stall_s``, in seconds: vLLM's own limit, where it has one, is 300 s a step
(VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS), and JIT compilation on live traffic has stalled engines for 30-70 s
(ai-dynamo/dynamo#14735)."""
DEFAULT_START_STALL_S: Final = 600
"""Default of ``Limits.start_stall_s``, in seconds."""
STALLED_STRIKES: Final = 2
DEAD_STRIKES: Final = 3


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """How long what may last, in seconds.

    From the last step of a stuck engine it takes at most ``dead_after_s`` to the verdict dead, and at most
    ``unready_after_s`` until it is taken out of rotation, as long as the prober itself gets to run.
    """

    stall_s: float = DEFAULT_STALL_S
    """A hung engine is dead after this, and some samples more. 0: never."""
    start_stall_s: float = DEFAULT_START_STALL_S
    """A start in which nothing moves is given up after this. 0: never."""
    drain_s: float = 0.0
    """A drain has this long; what runs then is cut. 0: not known, as to a sidecar. No verdict hangs on it."""
    gpu_fault_kills: bool = False
    """Whether a fatal GPU fault fails liveness too: a restart mends no GPU, but whoever restarts may move elsewhere."""

    @property
    def interval_s(self) -> float:
        """Between two samples."""
        return min(max(self.stall_s / 30, 0.2), 5.0) if self.stall_s else 5.0

    @property
    def busy_quiet_s(self) -> float:
        """Without a step while requests run; then a canary is sent. Far above any JIT compilation, by default 120 s."""
        return self.stall_s * 0.4

    @property
    def idle_quiet_s(self) -> float:
        """Without a step while none runs; then a canary is sent: nothing else would show that an idle engine hangs."""
        return self.stall_s * 0.2

    @property
    def canary_s(self) -> float:
        """That a canary may take; each one that takes longer, while nothing else moves either, is a strike."""
        return self.stall_s * 0.2

    @property
    def longest_gap_s(self) -> float:
        """What a pause between samples counts for at most: a prober that was stopped has seen nothing meanwhile."""
        return 2 * self.interval_s

    @property
    def unready_after_s(self) -> float:
        """Bound from the last step of a stuck engine to not ready; each turn of it is noticed up to a sample late."""
        return self.busy_quiet_s + STALLED_STRIKES * self.canary_s + (STALLED_STRIKES + 2) * self.interval_s

    @property
    def dead_after_s(self) -> float:
        """Bound from the last step of a stuck engine to dead."""
        return self.busy_quiet_s + DEAD_STRIKES * self.canary_s + (DEAD_STRIKES + 2) * self.interval_s
