"""Describes a machine: its GPUs as CUDA will see them, the links between them, its CPUs.

``read_hardware`` reads through ``vllm_health.nvml`` (the only importer of NVML), /proc and /sys. The rest is data.
A hardware file is this data as JSON, so a laptop can plan for another machine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from vllm_health import gpu_facts, nvml
from vllm_launch.engine.requirements import MINIMUM_COMPUTE_CAPABILITY
from vllm_launch.errors import UsageError
from vllm_launch.machine.cpu import Cpu as Cpu  # noqa: PLC0414  part of Hardware, so importable from here too
from vllm_launch.machine.cpu import NumaNode as NumaNode  # noqa: PLC0414  as above
from vllm_launch.machine.cpu import read_cpu
from vllm_launch.machine.generation import Generation, generation_of
from vllm_launch.machine.known_gpus import known_gpu
from vllm_launch.machine.unified import UNIFIED_WARNING, is_unified, unified_memory
from vllm_launch.units import GIB, gib


class GpuProcess(msgspec.Struct, frozen=True, kw_only=True):
    """Another process that uses the GPU. ``memory`` is in bytes, or None if NVML hides it."""

    pid: int
    name: str
    memory: int | None


class Gpu(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One GPU or one MIG slice, as CUDA would see it. Memory is in bytes.

    ``memory_total`` equals the total of ``cudaMemGetInfo``. It is NVML's v2 ``total - reserved``, compared on an H200
    and equal to the byte. ``memory_free`` is the free part of it now, before this launcher makes a CUDA context. A GPU
    with ``unified`` memory has the host's memory (see ``unified_memory``).
    """

    index: int  # nvidia-smi's index of the whole GPU; all slices of one GPU share it
    uuid: str
    name: str
    memory_total: int
    memory_free: int
    compute_capability: tuple[int, int]
    mig_profile: str | None = None  # "1g.10gb"; None for a whole GPU
    unified: bool = False  # the GPU is part of a processor and uses the host's memory
    numa_node: int | None = None
    pci_bus_id: str | None = None
    processes: tuple[GpuProcess, ...] = ()
    faults: tuple[str, ...] = ()  # sentences about ECC errors and failed or pending row remapping; empty if healthy

    @property
    def generation(self) -> Generation:
        """Return the GPU's generation, which follows from its compute capability."""
        return generation_of(self.compute_capability)


class Hardware(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One machine: its GPUs, the links between them, its CPU, and warnings about them.

    The matrices ``nvlink`` and ``p2p`` have one row and one column for each of ``gpus``, in the same order. The
    diagonal is False. An empty matrix means unknown.
    """

    gpus: tuple[Gpu, ...]
    nvlink: tuple[tuple[bool, ...], ...] = ()  # NVML reports NVLink between the two GPUs
    p2p: tuple[tuple[bool, ...], ...] = ()  # NVML reports that the two GPUs can access each other's memory
    driver: str | None = None
    cuda: tuple[int, int] | None = None  # the newest CUDA version that the driver runs, such as (13, 0)
    cpu: Cpu | None = None
    source: str = "nvml"  # "nvml", "catalogue" or the path of the hardware file
    warnings: tuple[str, ...] = ()


def read_hardware(environ: Mapping[str, str], root: Path = Path("/")) -> Hardware:
    """Read this machine: its GPUs from NVML, its CPUs from /proc and /sys under ``root``. Never raises.

    The result has all GPUs that NVML shows. CUDA_VISIBLE_DEVICES does not matter here (``visible`` applies it).
    If NVML does not work, the machine has no GPUs. If there are signs of GPUs, a warning then says why none is used.
    Signs are device files, files of a Jetson, or NVIDIA_VISIBLE_DEVICES, which a container runtime sets.
    """
    cpu, sign = read_cpu(root), _sign_of_gpus(environ, root)
    try:
        with nvml.open_nvml() as opened:
            snapshot = opened.snapshot()
    except nvml.NvmlUnavailable as error:
        return Hardware(gpus=(), cpu=cpu, warnings=_unused_gpu_warnings(sign, error.what))
    hardware = from_snapshot(snapshot, root)
    if not snapshot.devices and not snapshot.lost:
        warnings = _unused_gpu_warnings(sign, "NVML finds no GPU: give the container its GPUs (--gpus all)")
        return msgspec.structs.replace(hardware, cpu=cpu, warnings=warnings)
    return msgspec.structs.replace(hardware, cpu=cpu)


def _unused_gpu_warnings(sign: str | None, why: str) -> tuple[str, ...]:
    return (f"no GPU is used, although the machine seems to have one ({sign}). Cause: {why}",) if sign else ()


def _sign_of_gpus(environ: Mapping[str, str], root: Path) -> str | None:
    """Return a sentence that shows that this machine should have GPUs, or None if nothing does."""
    device = next(iter(sorted(root.glob("dev/nvidia[0-9]*"))), None)
    if device is not None:
        return f"/dev/{device.name} exists"
    # The signs by which vLLM recognises a Jetson without NVML (vllm/platforms/__init__.py:cuda_platform_plugin).
    jetson = next(
        (path for path in ("etc/nv_tegra_release", "sys/class/tegra-firmware") if (root / path).exists()), None
    )
    if jetson is not None:
        return f"/{jetson} exists, as on a Jetson"
    devices = environ.get("NVIDIA_VISIBLE_DEVICES", "")
    return f"NVIDIA_VISIBLE_DEVICES is {devices}" if devices not in ("", "void", "none") else None


def from_snapshot(snapshot: gpu_facts.Snapshot, root: Path = Path("/")) -> Hardware:
    """Return the machine of a snapshot of NVML, as CUDA would see it: MIG slices replace their GPU.

    NUMA nodes come from /sys under ``root``.
    """
    warnings = [f"GPU {index} is left out: {why}" for index, why in snapshot.lost]
    gpus: list[Gpu] = []
    rows: list[int] = []  # for each of gpus, the position of its device in the snapshot
    for place, device in enumerate(snapshot.devices):
        device_gpus = _gpus_of(device, root)
        warnings += _device_warnings(device, device_gpus)
        gpus += device_gpus
        rows += [place] * len(device_gpus)

    def joined(kind: str) -> tuple[tuple[bool, ...], ...]:
        pairs = [[snapshot.p2p[a][b] for b in rows] for a in rows]
        return tuple(tuple(pair is not None and getattr(pair, kind) is True for pair in row) for row in pairs)

    read, write, nvlink = joined("read"), joined("write"), joined("nvlink")
    return Hardware(
        gpus=tuple(gpus),
        nvlink=nvlink,
        p2p=tuple(tuple(r and w for r, w in zip(*both, strict=True)) for both in zip(read, write, strict=True)),
        driver=snapshot.driver,
        cuda=snapshot.cuda,
        warnings=(*warnings, *cautions(tuple(gpus))),
    )


def _gpus_of(device: gpu_facts.Device, root: Path) -> list[Gpu]:
    """Return the GPUs that CUDA sees for ``device``: itself, or its MIG slices. Empty if their memory is unknown."""
    if device.mig_enabled:
        # Without a UUID, CUDA_VISIBLE_DEVICES cannot select a slice.
        slices = [part for part in device.mig_slices if part.memory is not None and part.uuid]
        return [_gpu(device, part, part.memory, root, profile=part.profile) for part in slices if part.memory]
    unified = is_unified(_capability(device), device.memory)
    memory = unified_memory(device.memory, root) if unified else device.memory or _known_memory(device)
    return [] if memory is None else [_gpu(device, device, memory, root, unified=unified)]


def _capability(device: gpu_facts.Device) -> tuple[int, int] | None:
    """Return the compute capability that NVML reports, or else that of the known model, or None."""
    known = known_gpu(device.name)
    return device.compute_capability or (known.compute_capability if known else None)


def _known_memory(device: gpu_facts.Device) -> gpu_facts.Memory | None:
    """Return the memory of a known GPU of which NVML tells the name but not the memory, or None for an unknown name.

    Only the memory of the processes that NVML lists counts as used.
    """
    if (known := known_gpu(device.name)) is None:
        return None
    total = round(known.memory * GIB)
    used = min(total, sum(process.memory or 0 for process in device.processes or ()))
    return gpu_facts.Memory(total=total, reserved=0, free=total - used, used=used)


def _gpu(
    device: gpu_facts.Device,
    part: gpu_facts.Device | gpu_facts.MigSlice,
    memory: gpu_facts.Memory,
    root: Path,
    *,
    profile: str | None = None,
    unified: bool = False,
) -> Gpu:
    return Gpu(
        index=device.index,
        uuid=part.uuid or f"unknown-{device.index}",
        name=part.name,
        memory_total=memory.total - (memory.reserved or 0),
        memory_free=memory.free,
        compute_capability=_capability(device) or (0, 0),
        mig_profile=profile,
        unified=unified,
        numa_node=_numa_node(root, device.pci_bus_id),
        pci_bus_id=device.pci_bus_id,
        processes=tuple(
            GpuProcess(pid=process.pid, name=process.name or "unknown", memory=process.memory)
            for process in part.processes or ()
        ),
        faults=faults(device),
    )


def _device_warnings(device: gpu_facts.Device, gpus: Sequence[Gpu]) -> Iterator[str]:
    """Yield what the user should know about ``device``, of which CUDA sees ``gpus``."""
    name = f"GPU {device.index} ({device.name})"
    if not gpus and device.mig_enabled:
        yield (
            f"{name} is left out: MIG is enabled, but no slice can be read: create slices (nvidia-smi mig -cgi ... -C)"
            " or disable MIG (nvidia-smi -mig 0)"
        )
    elif not gpus:
        yield f"{name} is left out: NVML does not report its memory: run nvidia-smi and fix what it reports"
    elif any(gpu.unified for gpu in gpus):
        yield UNIFIED_WARNING.format(name=name)
    elif device.memory is None and not device.mig_enabled:
        yield (
            f"NVML does not report the memory of {name}: the plan assumes {gib(gpus[0].memory_total)}, the total "
            "memory of this GPU model, and subtracts only the memory of processes that NVML lists. vLLM checks the "
            "free memory when it starts"
        )
    if gpus and device.compute_capability is None:
        yield (
            f"NVML does not report the compute capability of {name}, which vLLM also reads from NVML: vLLM may fail to"
            " start"
        )


def _numa_node(root: Path, pci_bus_id: str | None) -> int | None:
    """Return the NUMA node next to the GPU, or None if it is unknown.

    NVML's call is not used. It reports the node that a GPU itself is (GH200).
    """
    if pci_bus_id is None:
        return None
    domain, _, rest = pci_bus_id.lower().partition(":")  # NVML writes eight digits, /sys four
    try:
        node = int((root / f"sys/bus/pci/devices/{domain[-4:]}:{rest}/numa_node").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None  # -1: the machine has only one


def faults(device: gpu_facts.Device) -> tuple[str, ...]:
    """Return sentences that say what is wrong with the GPU's memory, and what to do."""
    return (*gpu_facts.remap_faults(device.remapped_rows).values(), *gpu_facts.ecc_faults(device.ecc))


def visible(hardware: Hardware, cuda_visible_devices: str | None) -> Hardware:
    """Return ``hardware`` with only the GPUs in CUDA_VISIBLE_DEVICES, in its order. None (unset) keeps all.

    An entry is an index of nvidia-smi, the UUID of a GPU or MIG slice, or the start of a UUID that matches one GPU
    only. "", "-1" and "NoDevFiles" keep no GPU. After an entry that it does not know, CUDA silently ignores the rest
    (CUDA C++ Programming Guide, environment variables). Raises UsageError for such an entry, and for duplicates.
    """
    if cuda_visible_devices is None:
        return hardware
    entries = [entry.strip() for entry in cuda_visible_devices.split(",")]
    places = [] if entries in ([""], ["-1"], ["NoDevFiles"]) else [_place_of(hardware.gpus, entry) for entry in entries]
    if duplicates := [entry for entry, place in zip(entries, places, strict=False) if places.count(place) > 1]:
        raise _not_visible(hardware.gpus, f"{' and '.join(duplicates)} name the same GPU")
    gpus = tuple(hardware.gpus[place] for place in places)
    old_cautions = cautions(hardware.gpus)
    return msgspec.structs.replace(
        hardware,
        gpus=gpus,
        nvlink=tuple(tuple(hardware.nvlink[a][b] for b in places) for a in places) if hardware.nvlink else (),
        p2p=tuple(tuple(hardware.p2p[a][b] for b in places) for a in places) if hardware.p2p else (),
        warnings=(*(text for text in hardware.warnings if text not in old_cautions), *cautions(gpus)),
    )


def _place_of(gpus: tuple[Gpu, ...], entry: str) -> int:
    """Return the position in ``gpus`` of the GPU that ``entry`` names. Raises UsageError if it is not exactly one."""
    if entry.isdecimal() and entry.isascii():
        places = [place for place, gpu in enumerate(gpus) if gpu.index == int(entry)]
        if any(gpus[place].mig_profile for place in places):
            raise _not_visible(gpus, f"GPU {entry} is split into MIG slices, which have no index")
    else:
        is_uuid = entry.upper().startswith(("GPU-", "MIG-"))
        start = entry.casefold()
        places = [place for place, gpu in enumerate(gpus) if is_uuid and gpu.uuid.casefold().startswith(start)]
    if not places:
        raise _not_visible(gpus, f"{entry!r} names no GPU of this machine")
    if len(places) > 1:
        raise _not_visible(gpus, f"{entry!r} matches several UUIDs")
    return places[0]


def _not_visible(gpus: tuple[Gpu, ...], problem: str) -> UsageError:
    """Return the error for a wrong CUDA_VISIBLE_DEVICES. It lists the GPUs that the machine has."""
    names = ", ".join(gpu.uuid if gpu.mig_profile else f"{gpu.index} ({gpu.uuid})" for gpu in gpus)
    unset = "unset it: this machine has no GPU that the launcher can see. Check with `vllm-launch gpus`"
    remedy = f"use one or more of these: {names}" if names else unset
    return UsageError("CUDA_VISIBLE_DEVICES", problem, remedy)


def alike(gpus: tuple[Gpu, ...]) -> tuple[tuple[Gpu, ...], ...]:
    """Return ``gpus`` in groups of equal model, memory and compute capability, in order of first appearance.

    GPUs of one group may share a replica.
    """
    groups: dict[tuple[str, int, tuple[int, int]], list[Gpu]] = {}
    for gpu in gpus:
        groups.setdefault((gpu.name, gpu.memory_total, gpu.compute_capability), []).append(gpu)
    return tuple(tuple(group) for group in groups.values())


def cautions(gpus: tuple[Gpu, ...]) -> tuple[str, ...]:
    """Return warnings about GPUs that cannot all be used together: GPUs of different models, several MIG slices.

    Without CUDA_DEVICE_ORDER=PCI_BUS_ID, CUDA numbers GPUs of different models by speed (FASTEST_FIRST), but NVML
    numbers them by PCI bus. An index would then have two meanings. vllm/platforms/cuda.py:log_warnings asks for the
    same setting.
    """
    warnings = []
    models = Counter(gpu.name.partition(" MIG ")[0] for gpu in gpus)
    if len(models) > 1:
        counts = ", ".join(f"{count} x {model}" for model, count in models.items())
        warnings.append(
            f"the GPUs differ ({counts}): CUDA and nvidia-smi give them the same indices only with"
            " CUDA_DEVICE_ORDER=PCI_BUS_ID"
        )
    if sum(gpu.mig_profile is not None for gpu in gpus) > 1:
        warnings.append(
            "CUDA gives a process only one MIG slice (NVIDIA, MIG User Guide): a replica runs on one slice, without"
            " tensor or pipeline parallelism; start one vllm-launch per replica, with the UUID of its own slice in"
            " CUDA_VISIBLE_DEVICES"
        )
    return tuple(warnings)


def usable(gpus: Sequence[Gpu]) -> tuple[Gpu, ...]:
    """Return the GPUs for which the pinned vLLM has kernels."""
    return tuple(gpu for gpu in gpus if not gpu_too_old(gpu))


def gpu_too_old(gpu: Gpu) -> str | None:
    """Return why the pinned vLLM has no kernels for ``gpu``, or None if it has some or the capability is unknown."""
    if (0, 0) < gpu.compute_capability < MINIMUM_COMPUTE_CAPABILITY:
        actual, minimum = (".".join(map(str, pair)) for pair in (gpu.compute_capability, MINIMUM_COMPUTE_CAPABILITY))
        return (
            f"GPU {gpu.index} ({gpu.name}) has compute capability {actual}, but vLLM needs {minimum} (Turing) or newer"
        )
    return None
