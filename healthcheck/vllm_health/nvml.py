"""Reads this machine's GPUs from NVML into ``gpu_facts``. The only importer of pynvml.

The launcher reads the whole machine once (``Nvml.snapshot``). The prober reads single facts again and again
(``Nvml.ecc``, ``Nvml.remapped_rows``, ``Nvml.slowdowns``, ``Nvml.load``, ``XidEvents``). A fact that a GPU, driver or
container does not offer is None, never an error. A GPU that fell off the bus raises ``GpuLost``. A missing or broken
NVML raises ``NvmlUnavailable``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal

import msgspec

from vllm_health.gpu_facts import P2P, Device, Ecc, Load, Memory, MigSlice, Process, RemappedRows, Snapshot

# nvml.h, nvmlGpuP2PCapsIndex_t. In the binding, a stray comma makes NVML_P2P_CAPS_INDEX_READ the tuple (0,), for which
# nvmlDeviceGetP2PStatus raises a TypeError.
_P2P_READ, _P2P_WRITE, _P2P_NVLINK = 0, 1, 2
_P2P_OK = 0  # nvml.h, NVML_P2P_STATUS_OK

UnavailableReason = Literal["no_binding", "no_library", "no_driver", "version_mismatch", "unknown_error", "other"]

# Reason and remedy for each error code with which NVML fails as a whole. Source: nvml.h, nvmlReturn_t.
_FAILURES: dict[int, tuple[UnavailableReason, str]] = {
    4: (
        "other",
        "no access to /dev/nvidiactl: run as a user who has access, or give the container its GPUs (--gpus all)",
    ),
    9: ("no_driver", "the NVIDIA kernel driver is not loaded: run nvidia-smi on the host and fix what it reports"),
    12: (
        "no_library",
        "libnvidia-ml.so.1 is missing: install the NVIDIA driver, or give the container its GPUs (--gpus all)",
    ),
    18: (
        "version_mismatch",
        "Driver/library version mismatch: the driver was updated, but its old kernel module is loaded: reboot the host",
    ),
    # NVIDIA/nvidia-container-toolkit#48: systemd rewrites the container's device cgroup and takes its GPUs away.
    999: (
        "unknown_error",
        "NVML answers Unknown Error: `systemctl daemon-reload` may have taken away the GPUs: restart the container",
    ),
}
# NVML_ERROR_GPU_IS_LOST, NVML_ERROR_RESET_REQUIRED
_GPU_LOST = {15: "GPU is lost: it fell off the bus", 16: "GPU requires a reset"}


# Reasons for slow clocks that are faults, by bit. The reasons that are no faults are missing: an idle GPU, a power cap,
# and a clock that an operator set. The names are those that `nvidia-smi -q -d PERFORMANCE` shows. Source of the bits:
# nvml.h, nvmlClocksEventReasons.
SLOWDOWNS = {
    0x8: "HW Slowdown",
    0x20: "SW Thermal Slowdown",
    0x40: "HW Thermal Slowdown",
    0x80: "HW Power Brake Slowdown",
}
_MAX_XIDS_PER_READ = 100


class NvmlUnavailable(Exception):  # noqa: N818  an outcome that callers handle, not a failure of the program
    """NVML does not work at all. ``what``: the problem and the remedy. ``reason``: the same problem as a code."""

    def __init__(self, reason: UnavailableReason, what: str) -> None:
        self.reason, self.what = reason, what
        super().__init__(what)


class GpuLost(Exception):  # noqa: N818  as above
    """NVML cannot use a GPU that it lists: the GPU is lost, requires a reset, or does not open."""

    def __init__(self, index: int, why: str) -> None:
        self.index, self.why = index, why
        super().__init__(f"GPU {index}: {why}")


class Nvml:
    """Reads facts from NVML, which is initialised. A GPU's index is NVML's, in PCI bus order.

    CUDA_VISIBLE_DEVICES does not change it.
    """

    def __init__(self, binding: Any) -> None:
        self._binding = binding

    def _ask(self, index: int | None, function: str, *args: Any) -> Any:
        """Return NVML's answer, or None if this GPU, driver or container has none. Raises GpuLost for GPU ``index``."""
        call = getattr(self._binding, function, None)
        if call is None:
            return None
        try:
            return call(*args)
        except (self._binding.NVMLError, self._binding.NVMLLibraryMismatchError) as error:
            code = getattr(error, "value", None)
            if index is not None and code in _GPU_LOST:
                raise GpuLost(index, _GPU_LOST[code]) from error
            return None

    def _handle(self, index: int) -> Any:
        handle = self._ask(index, "nvmlDeviceGetHandleByIndex", index)
        if handle is None:
            raise GpuLost(index, "NVML cannot open it: check dmesg for Xid lines")
        return handle

    def driver_version(self) -> str | None:
        """Return the version of the kernel driver, such as "580.159.04"."""
        version: str | None = self._ask(None, "nvmlSystemGetDriverVersion")
        return version

    def cuda_version(self) -> tuple[int, int] | None:
        """Return the newest CUDA version that the driver runs, such as (13, 0)."""
        version = self._ask(None, "nvmlSystemGetCudaDriverVersion_v2")
        return None if version is None else (version // 1000, version % 1000 // 10)

    def count(self) -> int:
        """Return the number of physical GPUs that NVML shows. A container sees only its own. Raises NvmlUnavailable."""
        try:
            number: int = self._binding.nvmlDeviceGetCount()
        except self._binding.NVMLError as error:
            raise _unavailable(error) from error
        return number

    def ecc(self, index: int) -> Ecc:
        """Return the uncorrectable ECC errors of a GPU. Raises GpuLost."""
        handle = self._handle(index)
        kind = self._binding.NVML_MEMORY_ERROR_TYPE_UNCORRECTED
        counter = self._binding.NVML_VOLATILE_ECC
        return Ecc(volatile=self._ask(index, "nvmlDeviceGetTotalEccErrors", handle, kind, counter))

    def remapped_rows(self, index: int) -> RemappedRows | None:
        """Return the row remapping of a GPU. None before Ampere and on GPUs without ECC memory. Raises GpuLost."""
        rows = self._ask(index, "nvmlDeviceGetRemappedRows", self._handle(index))
        if rows is None:
            return None
        correctable, uncorrectable, pending, failure = rows
        return RemappedRows(
            correctable=correctable, uncorrectable=uncorrectable, pending=bool(pending), failure=bool(failure)
        )

    def slowdowns(self, index: int) -> tuple[str, ...] | None:
        """Return the faults that slow the GPU down, such as heat or power supply. Raises GpuLost."""
        handle = self._handle(index)
        mask = self._ask(index, "nvmlDeviceGetCurrentClocksEventReasons", handle)
        # Drivers before 535 know only the older name.
        mask = self._ask(index, "nvmlDeviceGetCurrentClocksThrottleReasons", handle) if mask is None else mask
        return None if mask is None else tuple(name for bit, name in SLOWDOWNS.items() if mask & bit)

    def memory(self, index: int) -> Memory | None:
        """Return the memory of a GPU. ``used`` counts all processes. None with MIG enabled. Raises GpuLost."""
        return self._memory(index, self._handle(index))

    def load(self, index: int) -> Load:
        """Return the utilisation, power and temperature of a GPU. Raises GpuLost."""
        handle = self._handle(index)
        rates = self._ask(index, "nvmlDeviceGetUtilizationRates", handle)
        milliwatts = self._ask(index, "nvmlDeviceGetPowerUsage", handle)
        degrees = self._ask(index, "nvmlDeviceGetTemperature", handle, self._binding.NVML_TEMPERATURE_GPU)
        return Load(
            utilization=None if rates is None else rates.gpu / 100,
            power=None if milliwatts is None else milliwatts / 1000,
            temperature=None if degrees is None else float(degrees),
        )

    def name(self, index: int) -> str:
        """Return NVIDIA's product name of a GPU. Raises GpuLost."""
        return self._ask(index, "nvmlDeviceGetName", self._handle(index)) or "unknown GPU"

    def uuid(self, index: int) -> str:
        """Return the UUID of a GPU, "GPU-…". Empty if NVML does not show it. Raises GpuLost."""
        return self._ask(index, "nvmlDeviceGetUUID", self._handle(index)) or ""

    def xid_events(self, indices: Sequence[int]) -> XidEvents | None:
        """Return a reader of the Xid errors that these GPUs report from now on.

        None if the driver reports no Xids, as on vGPUs.
        """
        events = self._ask(None, "nvmlEventSetCreate")
        if events is None:
            return None
        kind, by_uuid = self._binding.nvmlEventTypeXidCriticalError, {}
        for index in indices:
            try:
                self._binding.nvmlDeviceRegisterEvents(self._handle(index), kind, events)
                by_uuid[self.uuid(index)] = index
            except (self._binding.NVMLError, GpuLost):
                continue
        return XidEvents(self._binding, events, by_uuid) if by_uuid else None

    def device(self, index: int) -> Device:
        """Return all facts of one GPU. Raises GpuLost."""
        handle = self._handle(index)
        mode = self._ask(index, "nvmlDeviceGetMigMode", handle)
        mig_enabled = bool(mode and mode[0])
        pci = self._ask(index, "nvmlDeviceGetPciInfo", handle)
        return Device(
            index=index,
            uuid=self._ask(index, "nvmlDeviceGetUUID", handle) or "",
            name=self.name(index),
            pci_bus_id=None if pci is None else _text(pci.busId),
            memory=self._memory(index, handle),
            compute_capability=self._ask(index, "nvmlDeviceGetCudaComputeCapability", handle),
            mig_enabled=mig_enabled,
            mig_slices=self._mig_slices(index, handle) if mig_enabled else (),
            processes=self._processes(index, handle),
            ecc=self.ecc(index),
            remapped_rows=self.remapped_rows(index),
            nvlinks=self._nvlinks(index, handle),
        )

    def p2p(self, index: int, peer: int) -> P2P:
        """Return the peer-to-peer access from a GPU to its peer. Raises GpuLost."""
        pair = self._handle(index), self._handle(peer)

        def status(capability: int) -> bool | None:
            answer = self._ask(index, "nvmlDeviceGetP2PStatus", *pair, capability)
            return None if answer is None else answer == _P2P_OK

        return P2P(read=status(_P2P_READ), write=status(_P2P_WRITE), nvlink=status(_P2P_NVLINK))

    def snapshot(self) -> Snapshot:
        """Return the facts of the whole machine. A lost GPU is listed and does not raise. Raises NvmlUnavailable."""
        devices, lost = [], []
        for index in range(self.count()):
            try:
                devices.append(self.device(index))
            except GpuLost as error:
                lost.append((error.index, error.why))
        return Snapshot(
            driver=self.driver_version(),
            cuda=self.cuda_version(),
            devices=tuple(devices),
            p2p=tuple(tuple(None if a is b else self._p2p(a.index, b.index) for b in devices) for a in devices),
            lost=tuple(lost),
        )

    def _p2p(self, index: int, peer: int) -> P2P | None:
        try:
            return self.p2p(index, peer)
        except GpuLost:  # after the snapshot had read it
            return None

    def _memory(self, index: int, handle: Any) -> Memory | None:
        info = self._ask(index, "nvmlDeviceGetMemoryInfo", handle, self._binding.nvmlMemory_v2)
        if info is not None:
            return Memory(total=info.total, reserved=info.reserved, free=info.free, used=info.used)
        info = self._ask(index, "nvmlDeviceGetMemoryInfo", handle)  # drivers before 510 have only this
        return None if info is None else Memory(total=info.total, reserved=None, free=info.free, used=info.used)

    def _processes(self, index: int, handle: Any) -> tuple[Process, ...] | None:
        processes: dict[int, Process] = {}
        hidden = True
        for kind in ("Compute", "Graphics", "MPSCompute"):
            listed = self._ask(index, f"nvmlDeviceGet{kind}RunningProcesses", handle)
            hidden = hidden and listed is None
            for process in listed or ():
                name = self._ask(index, "nvmlSystemGetProcessName", process.pid)
                processes[process.pid] = Process(pid=process.pid, name=name, memory=process.usedGpuMemory)
        return None if hidden else tuple(processes.values())

    def _mig_slices(self, index: int, handle: Any) -> tuple[MigSlice, ...]:
        slices = []
        for slot in range(self._ask(index, "nvmlDeviceGetMaxMigDeviceCount", handle) or 0):
            mig = self._ask(index, "nvmlDeviceGetMigDeviceHandleByIndex", handle, slot)
            if mig is None:  # "Not Found": the slot is empty
                continue
            name = self._ask(index, "nvmlDeviceGetName", mig) or ""
            slices.append(
                MigSlice(
                    uuid=self._ask(index, "nvmlDeviceGetUUID", mig) or "",
                    name=name,
                    profile=name.rpartition("MIG ")[2],
                    memory=self._memory(index, mig),
                    processes=self._processes(index, mig),
                )
            )
        return tuple(slices)

    def _nvlinks(self, index: int, handle: Any) -> tuple[bool, ...]:
        links = range(self._binding.NVML_NVLINK_MAX_LINKS)
        states = [self._ask(index, "nvmlDeviceGetNvLinkState", handle, link) for link in links]
        return tuple(bool(state) for state in states if state is not None)


class XidEvents:
    """The Xid errors that the driver reports (nvmlEventTypeXidCriticalError). Each is returned once."""

    def __init__(self, binding: Any, events: Any, index_by_uuid: Mapping[str, int]) -> None:
        self._binding, self._events, self._index = binding, events, index_by_uuid

    def new(self) -> list[tuple[int, int]]:
        """Return (GPU index, Xid) of each error since the last call. Does not wait."""
        xids: list[tuple[int, int]] = []
        while len(xids) < _MAX_XIDS_PER_READ:
            try:
                event = self._binding.nvmlEventSetWait_v2(self._events, 0)
                uuid = self._binding.nvmlDeviceGetUUID(event.device)
            except self._binding.NVMLError:  # NVML_ERROR_TIMEOUT: no more errors. Or the GPU is lost: see `_handle`
                break
            xids.append((self._index.get(uuid, -1), event.eventData))
        return xids


@contextmanager
def open_nvml() -> Iterator[Nvml]:
    """Yield NVML, initialised, and shut it down again. Raises NvmlUnavailable if NVML is missing or does not work."""
    try:
        import pynvml  # noqa: PLC0415  loaded only when NVML is read
    except ImportError as error:
        raise NvmlUnavailable("no_binding", "the Python package nvidia-ml-py is not installed: install it") from error
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise _unavailable(error) from error
    try:
        yield Nvml(pynvml)
    finally:
        # Shutting down fails if a GPU was lost meanwhile. Then there is nothing left to close.
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def _unavailable(error: Any) -> NvmlUnavailable:
    reason, what = _FAILURES.get(
        error.value, ("other", f"NVML does not work ({error}): run nvidia-smi and fix what it reports")
    )
    return NvmlUnavailable(reason, what)


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


if __name__ == "__main__":
    # Print the facts of this machine, for tests/data/hardware and bug reports.
    with open_nvml() as nvml:
        print(msgspec.json.format(msgspec.json.encode(nvml.snapshot()), indent=1).decode())
