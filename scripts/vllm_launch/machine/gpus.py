"""What the machine has: its GPUs as CUDA will see them, how they are linked, its CPUs.

Reading goes through ``vllm_health.nvml`` (the only importer of NVML) and /sys; everything else here is data.
A hardware file is this data as JSON, so a plan can be made on a laptop for a machine elsewhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import msgspec

from vllm_health import gpu_facts, nvml
from vllm_launch.engine.requirements import MINIMUM_COMPUTE_CAPABILITY
from vllm_launch.errors import UsageError
from vllm_launch.machine.cpu import Cpu as Cpu  # noqa: PLC0414  part of Hardware, so importable from here too
from vllm_launch.machine.cpu import NumaNode as NumaNode  # noqa: PLC0414  as above
from vllm_launch.machine.cpu import read_cpu
from vllm_launch.machine.generation import Generation, generation_of


class GpuProcess(msgspec.Struct, frozen=True, kw_only=True):
    """A process of another user of the GPU. ``memory`` in bytes, None where NVML hides it."""

    pid: int
    name: str
    memory: int | None


class Gpu(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One GPU or one MIG slice, as CUDA would see it.

    ``memory_total`` is what ``cudaMemGetInfo`` calls total: NVML's v2 ``total - reserved``, checked to the byte on
    H200. ``memory_free`` is what is left of it now, before a CUDA context of ours. Bytes.
    """

    index: int  # nvidia-smi's, of the whole GPU: the slices of one GPU share it
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

    @property
    def generation(self) -> Generation:
        """The GPU's generation, by its compute capability."""
        return generation_of(self.compute_capability)


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


def read_hardware(environ: Mapping[str, str], root: Path = Path("/")) -> Hardware:
    """This machine: its GPUs from NVML, its CPUs from /proc and /sys under ``root``. Never raises.

    All GPUs that NVML shows, whatever CUDA_VISIBLE_DEVICES says (``visible`` applies it). Without a working NVML the
    machine is a CPU machine, and a warning says why if there are signs of GPUs: device files, or a container
    runtime's NVIDIA_VISIBLE_DEVICES.
    """
    cpu, signs = read_cpu(root), _signs_of_gpus(environ, root)
    try:
        with nvml.open_nvml() as opened:
            snapshot = opened.snapshot()
    except nvml.NvmlUnavailable as error:
        return Hardware(gpus=(), cpu=cpu, warnings=_unused(signs, error.what))
    hardware = from_snapshot(snapshot, root)
    if not snapshot.devices and not snapshot.lost:
        warnings = _unused(signs, "NVML shows none: start the container with its GPUs (--gpus all)")
        return msgspec.structs.replace(hardware, cpu=cpu, warnings=warnings)
    return msgspec.structs.replace(hardware, cpu=cpu)


def _unused(signs: str | None, why: str) -> tuple[str, ...]:
    return (f"no GPU is used although {signs}: {why}",) if signs else ()


def _signs_of_gpus(environ: Mapping[str, str], root: Path) -> str | None:
    device = next(iter(sorted(root.glob("dev/nvidia[0-9]*"))), None)
    if device is not None:
        return f"/dev/{device.name} exists"
    wanted = environ.get("NVIDIA_VISIBLE_DEVICES", "")
    return f"NVIDIA_VISIBLE_DEVICES is {wanted}" if wanted not in ("", "void", "none") else None


def from_snapshot(snapshot: gpu_facts.Snapshot, root: Path = Path("/")) -> Hardware:
    """NVML's facts as CUDA would see them: slices in place of GPUs with MIG; ``root`` has /sys for NUMA nodes."""
    warnings = [f"GPU {index} is left out: {why}" for index, why in snapshot.lost]
    gpus: list[Gpu] = []
    rows: list[int] = []  # of each in gpus: its device's place in the snapshot
    for place, device in enumerate(snapshot.devices):
        found = _gpus_of(device, _numa_node(root, device.pci_bus_id))
        if not found:
            warnings.append(
                f"GPU {device.index} ({device.name}) is left out: "
                + (
                    "MIG is enabled but it has no slice that can be read; create slices (nvidia-smi mig -cgi ... -C)"
                    " or disable MIG (nvidia-smi -mig 0)"
                    if device.mig_enabled
                    else "NVML does not tell its memory; describe the machine in a file and give it with --hardware"
                )
            )
        gpus += found
        rows += [place] * len(found)

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


def _gpus_of(device: gpu_facts.Device, numa_node: int | None) -> list[Gpu]:
    parts: list[tuple[gpu_facts.Device | gpu_facts.MigSlice, str | None]] = (
        [(part, part.profile) for part in device.mig_slices] if device.mig_enabled else [(device, None)]
    )
    return [
        Gpu(
            index=device.index,
            uuid=part.uuid,
            name=part.name,
            memory_total=part.memory.total - (part.memory.reserved or 0),
            memory_free=part.memory.free,
            compute_capability=device.compute_capability or (0, 0),
            mig_profile=profile,
            numa_node=numa_node,
            pci_bus_id=device.pci_bus_id,
            processes=tuple(
                GpuProcess(pid=process.pid, name=process.name or "unknown", memory=process.memory)
                for process in part.processes or ()
            ),
            faults=faults(device),
        )
        for part, profile in parts
        if part.memory is not None
    ]


def _numa_node(root: Path, pci_bus_id: str | None) -> int | None:
    """The node whose memory and cores are near. NVML's own call tells of GPUs that are themselves a node (GH200)."""
    if pci_bus_id is None:
        return None
    domain, _, rest = pci_bus_id.lower().partition(":")  # NVML writes eight digits, /sys four
    try:
        node = int((root / f"sys/bus/pci/devices/{domain[-4:]}:{rest}/numa_node").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None  # -1: the machine has only one


def faults(device: gpu_facts.Device) -> tuple[str, ...]:
    """Return what is wrong with the memory of a GPU, and what to do, in sentences."""
    return (*gpu_facts.remap_faults(device.remapped_rows).values(), *gpu_facts.ecc_faults(device.ecc))


def visible(hardware: Hardware, cuda_visible_devices: str | None) -> Hardware:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves, in its order; None (unset) leaves all.

    Entries are nvidia-smi's indices, GPU or MIG UUIDs, or beginnings of UUIDs that fit one GPU only. "", "-1" and
    "NoDevFiles" leave none. CUDA silently hides what follows an entry that it does not know (CUDA C++ Programming
    Guide, environment variables); we raise UsageError instead, as for duplicates.
    """
    if cuda_visible_devices is None:
        return hardware
    wanted = [entry.strip() for entry in cuda_visible_devices.split(",")]
    chosen = [] if wanted in ([""], ["-1"], ["NoDevFiles"]) else [_chosen(hardware.gpus, entry) for entry in wanted]
    if twice := [entry for entry, place in zip(wanted, chosen, strict=False) if chosen.count(place) > 1]:
        raise _not_visible(hardware.gpus, f"{' and '.join(twice)} name the same GPU")
    gpus = tuple(hardware.gpus[place] for place in chosen)
    old = cautions(hardware.gpus)
    return msgspec.structs.replace(
        hardware,
        gpus=gpus,
        nvlink=tuple(tuple(hardware.nvlink[a][b] for b in chosen) for a in chosen) if hardware.nvlink else (),
        p2p=tuple(tuple(hardware.p2p[a][b] for b in chosen) for a in chosen) if hardware.p2p else (),
        warnings=(*(text for text in hardware.warnings if text not in old), *cautions(gpus)),
    )


def _chosen(gpus: tuple[Gpu, ...], entry: str) -> int:
    """The place in ``gpus`` of the one that the entry names."""
    if entry.isdecimal() and entry.isascii():
        places = [place for place, gpu in enumerate(gpus) if gpu.index == int(entry)]
        if any(gpus[place].mig_profile for place in places):
            raise _not_visible(gpus, f"GPU {entry} is split by MIG, and a slice is named by its UUID alone")
    else:
        known = entry.upper().startswith(("GPU-", "MIG-"))
        places = [place for place, gpu in enumerate(gpus) if known and gpu.uuid.casefold().startswith(entry.casefold())]
    if len(places) != 1:
        raise _not_visible(gpus, f"{entry!r} is {'no GPU here' if not places else 'the beginning of several UUIDs'}")
    return places[0]


def _not_visible(gpus: tuple[Gpu, ...], what: str) -> UsageError:
    have = ", ".join(gpu.uuid if gpu.mig_profile else f"{gpu.index} ({gpu.uuid})" for gpu in gpus)
    remedy = (
        f"the GPUs of this machine are {have}" if have else "unset it: this machine shows no GPU (vllm-launch gpus)"
    )
    return UsageError("CUDA_VISIBLE_DEVICES", what, remedy)


def alike(gpus: tuple[Gpu, ...]) -> tuple[tuple[Gpu, ...], ...]:
    """GPUs that may share a replica: the same model, memory and compute capability. In order of first appearance."""
    groups: dict[tuple[str, int, tuple[int, int]], list[Gpu]] = {}
    for gpu in gpus:
        groups.setdefault((gpu.name, gpu.memory_total, gpu.compute_capability), []).append(gpu)
    return tuple(tuple(group) for group in groups.values())


def cautions(gpus: tuple[Gpu, ...]) -> tuple[str, ...]:
    """Sentences on GPUs that cannot be used as their number suggests: mixed ones, several MIG slices.

    Without CUDA_DEVICE_ORDER=PCI_BUS_ID, CUDA numbers mixed GPUs by speed (FASTEST_FIRST) and NVML by bus, so an
    index would mean two things; vllm/platforms/cuda.py:log_warnings asks for the same setting.
    """
    found = []
    names = Counter(gpu.name.partition(" MIG ")[0] for gpu in gpus)
    if len(names) > 1:
        have = ", ".join(f"{count} x {name}" for name, count in names.items())
        found.append(f"the GPUs differ ({have}): CUDA_DEVICE_ORDER=PCI_BUS_ID is needed for indices to mean one thing")
    if sum(gpu.mig_profile is not None for gpu in gpus) > 1:
        found.append(
            "CUDA gives a process one MIG slice only (NVIDIA, MIG User Guide): a replica runs on one slice, without"
            " tensor or pipeline parallelism, and each replica is started with its own slice's UUID"
        )
    return tuple(found)


def gpu_too_old(gpu: Gpu) -> str | None:
    """Why the pinned engine has no kernels for a GPU; None when it has, or when its capability is unknown."""
    if (0, 0) < gpu.compute_capability < MINIMUM_COMPUTE_CAPABILITY:
        have, need = (".".join(map(str, pair)) for pair in (gpu.compute_capability, MINIMUM_COMPUTE_CAPABILITY))
        return f"GPU {gpu.index} ({gpu.name}) has compute capability {have}, and vLLM needs {need} (Turing) or newer"
    return None
