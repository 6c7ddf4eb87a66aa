"""Writes a machine as a table for people."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_launch.machine.gpus import Gpu, Hardware
from vllm_launch.report.columns import columns
from vllm_launch.units import gib


def hardware_table(hardware: Hardware, width: int = 100) -> str:
    """Return a table of the machine's driver, GPUs, links and CPU, with its warnings. Ends with a newline."""
    lines = []
    if hardware.driver:
        cuda = "" if hardware.cuda is None else ", CUDA up to {}.{}".format(*hardware.cuda)
        lines += [f"driver {hardware.driver}{cuda}", ""]
    rows = [("GPU", "name", "free", "total", "capability", "uuid")]
    for gpu in hardware.gpus:
        capability = "{}.{}".format(*gpu.compute_capability)
        total = f"{gib(gpu.memory_total)}{' (shared with the host)' if gpu.unified else ''}"
        rows.append((str(gpu.index), gpu.name, gib(gpu.memory_free), total, capability, gpu.uuid))
    lines += list(columns(rows, max(width, 140))) if hardware.gpus else ["  no GPU"]
    lines += _links(hardware)
    for gpu in hardware.gpus:
        processes = [f"{p.name} (pid {p.pid}) {gib(p.memory) if p.memory else ''}".rstrip() for p in gpu.processes]
        lines += [f"  GPU {gpu.index} is used by {', '.join(processes)}"] if processes else []
        lines += [f"  GPU {gpu.index}: {fault}" for fault in gpu.faults]
    if (cpu := hardware.cpu) is not None:
        limit = "no limit" if cpu.memory_limit is None else f"limit {gib(cpu.memory_limit)}"
        nodes = f", {len(cpu.numa_nodes)} NUMA nodes" if len(cpu.numa_nodes) > 1 else ""
        memory = f"{gib(cpu.memory_available)} of {gib(cpu.memory_total)} available, {limit}"
        lines += ["", f"CPU: {cpu.cores} cores{nodes}; memory: {memory}"]
    lines += [f"warning: {warning}" for warning in hardware.warnings]
    return "\n".join(lines) + "\n"


def _links(hardware: Hardware) -> list[str]:
    if len(hardware.gpus) < 2 or not hardware.nvlink:  # noqa: PLR2004 - a pair
        return []
    pairs = [(a, b) for a in range(len(hardware.gpus)) for b in range(a)]
    nvlink = sum(hardware.nvlink[a][b] for a, b in pairs)
    p2p = sum(hardware.p2p[a][b] for a, b in pairs) if hardware.p2p else 0
    return ["", f"  NVLink connects {nvlink} of {len(pairs)} GPU pairs; {p2p} pairs can copy directly (P2P)"]


def machine_name(hardware: Hardware, gpus: Sequence[Gpu]) -> str:
    """Return a name for what a plan runs on: ``gpus`` of ``hardware``, or the CPU if ``gpus`` is empty."""
    if gpus:
        return f"{len(gpus)} of {len(hardware.gpus)} GPUs ({gpus[0].name}, {gib(gpus[0].memory_total)} each)"
    cpu = hardware.cpu
    return f"the CPU ({cpu.cores} cores, {gib(cpu.memory_available)} of memory available)" if cpu else "the CPU"
