"""Memory that PyTorch's CUDA allocator holds but cannot use while vLLM serves, in bytes. Pure."""

from __future__ import annotations

from vllm_launch.sizing.placement import Placement
from vllm_launch.units import MIB

FRAGMENTS = 256 * MIB
"""Bytes that stay free on every GPU: fragments of the allocator, and what nobody has measured."""

ORDINARY_FRAGMENTS = 1 / 3
"""Share of the temporary memory that is lost in ordinary segments. Measured: Llama-3-8B under the worst load of
benchmarks/gpu/edge.py. H100, 2026-11-26: 2,240 MiB in use at most, 3,489 MiB reserved for it. H200, 2026-11-29: one of
three runs with FRAGMENTS alone ran out of memory. The planned temporary memory is 3,060 MiB."""


def uses_expandable_segments(placement: Placement) -> bool:
    """Whether vLLM's allocator uses expandable segments: as the user's environment says, or else as the plan decides.

    The plan uses them if a whole GPU runs all layers alone. With tensor parallelism, vLLM's custom all-reduce shares
    the memory of CUDA graphs by IPC handles, which expandable segments do not have, and the engine ends
    (vllm-project/vllm#42609). With experts spread over replicas, on MIG slices, and on GPUs that use the host's memory,
    nobody has tried them.
    """
    if placement.run_config.expandable_segments is not None:
        return placement.run_config.expandable_segments
    layout, gpu = placement.layout, placement.gpu
    experts_spread = layout.data > 1 and placement.model.experts is not None
    whole = gpu is not None and gpu.mig_profile is None and not gpu.unified
    return whole and layout.tensor == 1 and not experts_spread


def fragments(placement: Placement, temporary: int) -> int:
    """Return the bytes to keep free for fragments. ``temporary``: bytes that forward passes and sampling allocate."""
    if uses_expandable_segments(placement):
        return FRAGMENTS
    return FRAGMENTS + round(ORDINARY_FRAGMENTS * temporary)
