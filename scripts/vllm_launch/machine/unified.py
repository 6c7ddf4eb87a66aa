"""GPUs that are part of a processor and use the host's memory: GB10 (DGX Spark), Jetson.

On most of them, NVML answers "Not Supported" to a query of their memory. vLLM uses them like other GPUs. It reads the
total memory from CUDA, which reports the host's total. For the free memory it takes the host's available memory. CUDA's
free memory would not include the page cache, which the kernel can free (vllm/utils/mem_utils.py:
MemorySnapshot.measure).
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
    """Whether a GPU uses the host's memory.

    ``memory``: the GPU's memory in NVML, or None if NVML does not report it. If the compute capability is unknown, a
    GPU without ``memory`` counts as unified.
    """
    return memory is None if compute_capability is None else compute_capability in INTEGRATED


def unified_memory(memory: gpu_facts.Memory | None, root: Path) -> gpu_facts.Memory | None:
    """Return the memory that vLLM finds on a unified GPU, or None if it is unknown.

    ``memory``: the GPU's memory in NVML, or None if NVML does not report it. The total is NVML's total, or else the
    host's total, which CUDA reports too: on a GB10, torch and vLLM print 121.69 GiB, the host's total
    (llamastash/llamastash#80). The free memory is the host's available memory. A limit of the cgroup does not lower it,
    because psutil ignores the limit, and vLLM asks psutil.
    """
    host = host_memory(root)
    if host is None:
        return memory
    total, available = host
    if memory is not None:
        total = memory.total - (memory.reserved or 0)
    return gpu_facts.Memory(total=total, reserved=0, free=min(available, total), used=max(0, total - available))
