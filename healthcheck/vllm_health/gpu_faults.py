"""GPU faults and load, as NVML tells: Xid errors, ECC, row remapping, lost GPUs, slow clocks. Reads in its own thread.

Meanings and remedies of Xids: docs.nvidia.com/deploy/xid-errors. NVML that fails is a warning, never a death: it stops
answering in containers whose engine works on (NVIDIA/nvidia-container-toolkit#48).
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from vllm_health import gpu_facts, metrics, nvml

FATAL_XIDS: Final = {
    48: "uncorrectable ECC error",
    62: "internal micro-controller halt",
    64: "row remapping failed",
    74: "NVLink error",
    79: "the GPU has fallen off the bus",
    95: "uncontained ECC error",
    119: "GSP firmware does not answer",
    120: "GSP firmware error",
}
"""After these the GPU serves nobody until it is reset."""
APPLICATION_XIDS: Final = {
    13: "graphics engine exception",
    31: "memory page fault",
    43: "the process's channel was stopped",
    45: "the process was ended on the GPU",
    94: "contained ECC error",
}
"""These end the process that met them; the GPU is well."""
READ_SECONDS: Final = 5.0
HANG_SECONDS: Final = 60.0
"""A look takes milliseconds, and a second while a GPU wakes up; one that takes this long will not end."""


_LOAD: Final[dict[str, Callable[[gpu_facts.Load], float | None]]] = {
    "gpu_utilization": lambda load: load.utilization,
    "gpu_power_watts": lambda load: load.power,
    "gpu_temperature_celsius": lambda load: load.temperature,
}


class Fault(msgspec.Struct, frozen=True):
    """``kind``: "xid 79", "lost", "row remap failure", …; ``fatal``: nothing can be served on this GPU."""

    gpu: str
    kind: str
    sentence: str
    fatal: bool = False


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One look at the GPUs; by GPU, which is NVML's index as text. ``down``: why NVML does not answer."""

    faults: tuple[Fault, ...] = ()
    names: dict[str, metrics.Labels] = {}  # UUID and product
    memory: dict[str, gpu_facts.Memory] = {}
    load: dict[str, gpu_facts.Load] = {}
    ecc: dict[str, int] = {}
    slowdowns: dict[str, tuple[str, ...]] = {}
    xids: dict[metrics.Labels, int] = {}
    down: str | None = None

    @property
    def used(self) -> int:
        """Bytes of memory in use, all GPUs together."""
        return sum(memory.used for memory in self.memory.values())

    @property
    def fatal(self) -> tuple[str, ...]:
        """Sentences of the faults that end all service."""
        return tuple(fault.sentence for fault in self.faults if fault.fatal)

    def values(self) -> metrics.Values:
        """As our /metrics shows them."""
        return {
            "nvml_up": {(): float(self.down is None)},
            "gpu_faults": {(one.gpu, one.kind, str(one.fatal).lower()): 1.0 for one in self.faults},
            "gpu_info": {(gpu, *names): 1.0 for gpu, names in self.names.items()},
            "gpu_memory_used_bytes": {(gpu,): float(memory.used) for gpu, memory in self.memory.items()},
            "gpu_memory_total_bytes": {(gpu,): float(memory.total) for gpu, memory in self.memory.items()},
            **{
                name: {(gpu,): value for gpu, load in self.load.items() if (value := of(load)) is not None}
                for name, of in _LOAD.items()
            },
            "gpu_ecc_uncorrected_errors": {(gpu,): float(count) for gpu, count in self.ecc.items()},
            "gpu_throttled": {
                (gpu, why): float(why in reasons)
                for gpu, reasons in self.slowdowns.items()
                for why in nvml.SLOWDOWNS.values()
            },
            "gpu_xid_errors": {labels: float(count) for labels, count in self.xids.items()},
        }


class Reader:
    """Reads the GPUs with these UUIDs, or all that NVML shows; counts Xids in ``xids``, as NVML tells of each but once.

    MIG slices have no faults of their own: where ``uuids`` are theirs, every GPU that NVML shows is read.
    """

    def __init__(
        self, nvml: nvml.Nvml, uuids: Sequence[str] = (), xids: Counter[tuple[int, int]] | None = None
    ) -> None:
        self._nvml, self._uuids = nvml, {uuid for uuid in uuids if not uuid.startswith("MIG-")}
        self._xids: Counter[tuple[int, int]] = Counter() if xids is None else xids
        self._events = nvml.xid_events([*self._gpus()[0]])

    def _gpus(self) -> tuple[dict[int, str], list[Fault]]:
        """UUIDs by index, and those that cannot be reached."""
        found, lost = {}, []
        for index in range(self._nvml.count()):
            try:
                uuid = self._nvml.uuid(index)
            except nvml.GpuLost as error:
                lost.append(_lost(error))
                continue
            if not self._uuids or uuid in self._uuids:
                found[index] = uuid
        # A GPU that cannot be asked for its name may be another's: it counts where one of ours is missing.
        return found, lost if not self._uuids or len(found) < len(self._uuids) else []

    def read(self) -> Report:
        """One look. Raises nvml.NvmlUnavailable."""
        uuids, faults = self._gpus()
        self._xids.update(self._events.new() if self._events else ())
        faults += [_xid(index, xid) for index, xid in sorted(self._xids)]
        names: dict[str, metrics.Labels] = {}
        memory, load, ecc, slowdowns = {}, {}, {}, {}
        for index, uuid in uuids.items():
            gpu = str(index)
            try:
                errors, rows = self._nvml.ecc(index).volatile, self._nvml.remapped_rows(index)
                slow, space = self._nvml.slowdowns(index), self._nvml.memory(index)
                names[gpu] = uuid, self._nvml.name(index)
                load[gpu] = self._nvml.load(index)
            except nvml.GpuLost as error:
                faults.append(_lost(error))
                continue
            if space is not None:
                memory[gpu] = space
            if errors is not None:
                ecc[gpu] = errors
            if slow is not None:
                slowdowns[gpu] = slow
            faults += [Fault(gpu, kind, f"GPU {gpu}: {what}") for kind, what in gpu_facts.remap_faults(rows).items()]
        return Report(
            faults=tuple(faults),
            names=names,
            memory=memory,
            load=load,
            ecc=ecc,
            slowdowns=slowdowns,
            xids=_counts(self._xids),
        )


def _lost(error: nvml.GpuLost) -> Fault:
    return Fault(str(error.index), "lost", str(error), fatal=True)


def _counts(xids: Counter[tuple[int, int]]) -> dict[metrics.Labels, int]:
    return {(str(index), str(xid)): count for (index, xid), count in xids.items()}


def _xid(index: int, xid: int) -> Fault:
    meaning = FATAL_XIDS.get(xid) or APPLICATION_XIDS.get(xid) or "see docs.nvidia.com/deploy/xid-errors"
    return Fault(str(index), f"xid {xid}", f"GPU {index}: Xid {xid}, {meaning}", fatal=xid in FATAL_XIDS)


class GpuWatcher:
    """Reads again and again in a thread of its own: a driver that hangs blocks whoever asks it, and nobody else.

    Fatal faults are remembered while NVML does not answer: a GPU that met one serves nobody, seen or not.
    """

    def __init__(
        self, uuids: Sequence[str] = (), seconds: float = READ_SECONDS, hang_seconds: float = HANG_SECONDS
    ) -> None:
        self._report: Report | None = None
        self._read_at = time.monotonic()
        self._xids: Counter[tuple[int, int]] = Counter()
        self._uuids, self._seconds, self._hang_seconds = uuids, seconds, hang_seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="GPU faults", daemon=True)
        self._thread.start()

    @property
    def report(self) -> Report | None:
        """The last look; None before the first."""
        if time.monotonic() - self._read_at > self._hang_seconds:
            limit = f"{self._hang_seconds:g} s"  # not how long it is by now: a sentence that changes is said again
            return self._blind(f"NVML has not answered for {limit}: look for hung processes and Xids in dmesg")
        return self._report

    def close(self) -> None:
        """No more looks; one that hangs is left to hang."""
        self._ended.set()

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                with nvml.open_nvml() as opened:
                    self._read_on(Reader(opened, self._uuids, self._xids).read)
            except nvml.NvmlUnavailable as error:
                self._keep(self._blind(error.what))
            except Exception as error:  # noqa: BLE001 - a thread that dies would leave its last report standing for ever
                self._keep(self._blind(f"reading it failed: {error!r}"))
            self._ended.wait(self._seconds)

    def _read_on(self, read: Callable[[], Report]) -> None:
        while not self._ended.is_set():
            self._keep(read())
            self._ended.wait(self._seconds)

    def _keep(self, report: Report) -> None:
        self._report, self._read_at = report, time.monotonic()

    def _blind(self, why: str) -> Report:
        known = self._report.faults if self._report else ()
        return Report(faults=tuple(one for one in known if one.fatal), xids=_counts(self._xids), down=why)
