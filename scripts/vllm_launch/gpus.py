"""What the machine has: its GPUs as CUDA will see them, how they are linked, its CPUs.

Reading goes through ``vllm_health.nvml`` (the only importer of NVML) and /sys; everything else here is data.
A hardware file is this data as JSON, so a plan can be made on a laptop for a machine elsewhere.
"""

from __future__ import annotations

import msgspec


class GpuProcess(msgspec.Struct, frozen=True, kw_only=True):
    """A process of someone else that holds memory on a GPU. ``memory`` in bytes, None where NVML hides it."""

    pid: int
    name: str
    memory: int | None


class Gpu(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One GPU or one MIG slice, as CUDA would see it.

    ``memory_total`` is what ``cudaMemGetInfo`` calls total: NVML's v2 ``total - reserved``, checked to the byte on
    H200. ``memory_free`` is what is left of it now, before a CUDA context of ours. Bytes.
    """

    index: int
    uuid: str
    name: str
    memory_total: int
    memory_free: int
    compute_capability: tuple[int, int]
    mig_profile: str | None = None  # "1g.10gb"; None for a whole GPU
    numa_node: int | None = None
    pci_bus_id: str | None = None
    processes: tuple[GpuProcess, ...] = ()
    faults: tuple[str, ...] = ()  # sentences: ECC errors, row remapping failed or pending; empty when healthy


class NumaNode(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One NUMA node. ``memory_total`` in bytes."""

    index: int
    cores: int
    memory_total: int


class Cpu(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the CPU engine may use: ``cores`` by affinity and cgroup quota, memory by the cgroup's limit (bytes)."""

    cores: int
    memory_total: int  # the machine's
    memory_limit: int | None  # the cgroup's (v1 or v2), None where there is none
    memory_available: int  # the smaller of what the machine and the cgroup have left
    numa_nodes: tuple[NumaNode, ...] = ()


class Hardware(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A machine. Matrices are ``len(gpus)`` square, row and column in the order of ``gpus``; the diagonal is False."""

    gpus: tuple[Gpu, ...]
    nvlink: tuple[tuple[bool, ...], ...] = ()  # NVML says the pair is joined by NVLink
    p2p: tuple[tuple[bool, ...], ...] = ()  # NVML says the pair can read each other's memory
    driver: str | None = None
    cuda: tuple[int, int] | None = None  # the newest CUDA the driver runs, (13, 0)
    cpu: Cpu | None = None
    source: str = "nvml"  # "nvml", "catalogue" or the hardware file's path
    warnings: tuple[str, ...] = ()
