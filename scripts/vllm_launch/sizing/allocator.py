"""Memory that PyTorch's CUDA allocator holds but cannot use while vLLM serves, in bytes. Pure."""

from __future__ import annotations

from vllm_launch.sizing.placement import Placement
from vllm_launch.units import MIB

FRAGMENTS = 256 * MIB
"""Bytes that the plan leaves free on each GPU, for fragments of the allocator and for unmeasured memory."""

ORDINARY_FRAGMENTS = 1 / 3
"""Share of the planned temporary memory that fragments take without expandable segments, in addition to FRAGMENTS.

Measured with Llama-3-8B on an H100, 2026-11-26 (benchmarks/gpu/edge.py): for temporary memory, PyTorch reserved 3,489
MiB (3.04 GiB more than before the load, and 381 MiB that were unused before it). It used at most 2,240 MiB. The plan
had 3,060 MiB. (3,489 - 2,240 - 256) / 3,060 is about 1/3. On an H200, 2026-11-29, one of three runs with FRAGMENTS
alone ran out of memory."""


def uses_expandable_segments(placement: Placement) -> bool:
    """Whether vLLM's allocator uses expandable segments.

    The user's environment decides. If it does not, some options forbid them (engine/allocator.py:FORBIDDING). Otherwise
    the plan decides.

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
