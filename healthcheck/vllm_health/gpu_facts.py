"""Facts about GPUs as plain data, in NVML's terms. ``nvml`` reads them. This module does not need NVML.

None means that a GPU, driver or container does not offer the fact.
"""

from __future__ import annotations

import msgspec


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """Memory of a GPU or MIG slice, in bytes.

    ``reserved`` is the driver's share, None if the driver is too old for ``nvmlMemory_v2_t``.
    ``total - reserved`` is what cudaMemGetInfo calls total. If ``reserved`` is None, ``used`` includes the driver's
    share.
    """

    total: int
    reserved: int | None
    free: int
    used: int


class Process(msgspec.Struct, frozen=True, kw_only=True):
    """A process that uses the GPU. ``name`` and ``memory`` (bytes) are None where a container or vGPU hides them."""

    pid: int
    name: str | None
    memory: int | None


class Ecc(msgspec.Struct, frozen=True, kw_only=True):
    """Uncorrectable ECC errors. ``volatile``: since the driver was loaded, None if ECC is off or unknown."""

    volatile: int | None


class RemappedRows(msgspec.Struct, frozen=True, kw_only=True):
    """Row remapping of a GPU (Ampere and newer).

    ``correctable`` and ``uncorrectable``: rows that were remapped, by the kind of error. ``pending``: a row will be
    remapped by the next GPU reset. ``failure``: a row could not be remapped.
    """

    correctable: int
    uncorrectable: int
    pending: bool
    failure: bool


def remap_faults(rows: RemappedRows | None) -> dict[str, str]:
    """Return the faults that row remapping shows: a sentence with the remedy, by kind of fault.

    Source: NVIDIA, "GPU Memory Error Management", row remapping.
    """
    faults = {}
    if rows and rows.failure:
        faults["row remap failure"] = "row remapping failed: replace the GPU"
    if rows and rows.pending:
        faults["row remap pending"] = "a row remap is pending: reset the GPU when it is idle, or reboot"
    return faults


def ecc_faults(ecc: Ecc) -> tuple[str, ...]:
    """Return a sentence about a GPU's ECC errors with the remedy, or an empty tuple if it has none.

    Source: as in ``remap_faults``.
    """
    if not ecc.volatile:
        return ()
    problem = f"uncorrectable ECC errors since the driver was loaded: {ecc.volatile}"
    return (f"{problem}. Reset the GPU, and watch for new errors",)


class MigSlice(msgspec.Struct, frozen=True, kw_only=True):
    """A MIG device, the compute instance that CUDA runs on. ``profile`` is NVIDIA's name, "1g.10gb"."""

    uuid: str
    name: str
    profile: str
    memory: Memory | None
    processes: tuple[Process, ...] | None


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """One physical GPU. ``memory`` is None with MIG enabled: NVML answers "Insufficient Permissions" then."""

    index: int
    uuid: str
    name: str
    pci_bus_id: str | None
    memory: Memory | None
    compute_capability: tuple[int, int] | None
    mig_enabled: bool
    mig_slices: tuple[MigSlice, ...]
    processes: tuple[Process, ...] | None  # None: a container or vGPU hides them
    ecc: Ecc
    remapped_rows: RemappedRows | None
    nvlinks: tuple[bool, ...]  # for each NVLink of the GPU: whether it is up


class P2P(msgspec.Struct, frozen=True, kw_only=True):
    """Peer-to-peer access of a pair of GPUs, as NVML reports it."""

    read: bool | None
    write: bool | None
    nvlink: bool | None


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The machine at one moment. ``p2p[i][j]`` is from ``devices[i]`` to ``devices[j]``, None on the diagonal."""

    driver: str | None
    cuda: tuple[int, int] | None  # the newest CUDA that the driver runs
    devices: tuple[Device, ...]
    p2p: tuple[tuple[P2P | None, ...], ...]
    lost: tuple[tuple[int, str], ...]  # (NVML index, reason) of each GPU that NVML cannot reach


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """Load of a GPU at one moment: share of time with a kernel running (0 to 1), watts, degrees Celsius."""

    utilization: float | None
    power: float | None
    temperature: float | None
