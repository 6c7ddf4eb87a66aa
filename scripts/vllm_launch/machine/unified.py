"""GPUs that are part of a processor and use the host's memory: GB10 (DGX Spark), Jetson.

NVML answers "Not Supported" when it is asked for their memory. vLLM uses them like other GPUs. Its total memory is
CUDA's, which is the host's. Its free memory is the host's available memory, because CUDA's free memory does not include
the page cache, which the kernel can free (vllm/utils/mem_utils.py:MemorySnapshot.measure).
"""

from __future__ import annotations

from pathlib import Path

from vllm_health import gpu_facts
from vllm_launch.machine.cpu import host_memory

INTEGRATED = frozenset({(5, 3), (6, 2), (7, 2), (8, 7), (11, 0), (12, 1)})
"""Compute capabilities of GPUs that are part of a processor: Jetson Nano, TX2, Xavier, Orin and Thor, and GB10. No GPU
with its own memory has them (NVIDIA, "CUDA GPU Compute Capability"). vLLM asks CUDA instead
(platforms/cuda.py:is_integrated_gpu). A GH200 or GB200 is not integrated: it has its own memory, which NVML reports."""

UNIFIED_WARNING = (
    "{name} shares its memory with the host. The plan keeps memory free for the host, because other programs and the "
    "page cache of the model's files need it too"
)


def is_unified(compute_capability: tuple[int, int] | None, memory: gpu_facts.Memory | None) -> bool:
    """Whether a GPU uses the host's memory. ``memory`` is NVML's.

    A GPU of unknown capability whose memory NVML cannot tell counts as unified.
    """
    return memory is None if compute_capability is None else compute_capability in INTEGRATED


def unified_memory(memory: gpu_facts.Memory | None, root: Path) -> gpu_facts.Memory | None:
    """Return the memory that vLLM finds on a unified GPU, or None if it is unknown. ``memory`` is NVML's.

    The total is CUDA's: NVML's if it reports one, or else the host's. torch and vLLM print 121.69 GiB on a GB10, which
    is also the host's total there (llamastash/llamastash#80). The free memory is the host's available memory. A limit
    of the cgroup does not count: psutil ignores it, and so does vLLM's check.
    """
    host = host_memory(root)
    if host is None:
        return memory
    total, available = host
    if memory is not None:
        total = memory.total - (memory.reserved or 0)
    return gpu_facts.Memory(total=total, reserved=0, free=min(available, total), used=max(0, total - available))
