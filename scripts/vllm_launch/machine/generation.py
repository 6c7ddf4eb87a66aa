"""Generations of NVIDIA GPUs that vLLM and its kernels treat differently. Pure."""

from __future__ import annotations

from enum import IntEnum


class Generation(IntEnum):
    """A generation of NVIDIA GPUs. Members are ordered from old to new, so ``>=`` means "this one or newer".

    Source: NVIDIA, "CUDA GPU Compute Capability".
    """

    UNKNOWN = 0  # NVML does not report the compute capability
    BEFORE_TURING = 1
    TURING = 2  # 7.5
    A100 = 3  # 8.0: A100 and A30
    AMPERE = 4  # 8.6 and 8.7
    ADA = 5  # 8.9
    HOPPER = 6  # 9.x
    BLACKWELL = 7  # 10.x: B200, B300
    THOR = 8  # 11.x
    BLACKWELL_RTX = 9  # 12.x: GeForce RTX 50, RTX PRO, GB10
    NEWER = 10


_LOWEST_CAPABILITIES = (
    ((13, 0), Generation.NEWER),
    ((12, 0), Generation.BLACKWELL_RTX),
    ((11, 0), Generation.THOR),
    ((10, 0), Generation.BLACKWELL),
    ((9, 0), Generation.HOPPER),
    ((8, 9), Generation.ADA),
    ((8, 1), Generation.AMPERE),
    ((8, 0), Generation.A100),
    ((7, 5), Generation.TURING),
    ((0, 1), Generation.BEFORE_TURING),
)
"""The lowest compute capability of each generation, newest first."""


def generation_of(compute_capability: tuple[int, int]) -> Generation:
    """Return the generation of GPUs with ``compute_capability``."""
    return next(
        (generation for least, generation in _LOWEST_CAPABILITIES if compute_capability >= least), Generation.UNKNOWN
    )
