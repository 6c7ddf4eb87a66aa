"""Memory that PyTorch's CUDA allocator holds but cannot use while vLLM serves, in bytes. Pure."""

from __future__ import annotations

from vllm_launch.sizing.placement import Placement
from vllm_launch.units import MIB

FRAGMENTS = 256 * MIB
"""Bytes that the plan leaves free on each GPU, for fragments of the allocator and for unmeasured memory."""

ORDINARY_FRAGMENTS = 1 / 3
"""Share of the temporary memory that ordinary segments lose. Measured: Llama-3-8B under the worst load of
benchmarks/gpu/edge.py. H100, 2026-11-26: at most 2,240 MiB in use, and 3,489 MiB reserved for it. These are the 3.04
GiB by which the reserved memory rose, and 381 MiB that were reserved but unused before the load. H200, 2026-11-29: one
of three runs with FRAGMENTS alone ran out of memory. The planned temporary memory is 3,060 MiB."""


def uses_expandable_segments(placement: Placement) -> bool:
    """Whether vLLM's allocator uses expandable segments. The user's environment decides first, then the plan.

    The plan uses them if tensor_parallel_size is 1, the rank has a whole GPU with memory of its own, and experts are
    not spread over replicas. Pipeline parallelism is no obstacle. With tensor parallelism, vLLM's custom all-reduce
    shares the memory of CUDA graphs by IPC handles, which expandable segments do not have, and the engine fails to
    start (vllm-project/vllm#42609). With experts spread over replicas, on MIG slices, and on GPUs that use the host's
    memory, nobody has tried them.
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
