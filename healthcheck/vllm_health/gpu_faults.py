"""Reads GPU faults and load from NVML: Xid errors, ECC, row remapping, lost GPUs, slow clocks. Has its own thread.

Source for the meanings and remedies of Xids: docs.nvidia.com/deploy/xid-errors. A failure of NVML is a warning and
never makes vLLM dead, because NVML stops answering in containers whose engine still works
(NVIDIA/nvidia-container-toolkit#48).
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
"""Meaning of each Xid after which the GPU cannot be used until it is reset."""
APPLICATION_XIDS: Final = {
    13: "graphics engine exception",
    31: "memory page fault",
    43: "GPU stopped processing the work of one process",
    45: "preemptive cleanup: the process exited, was killed, or had an earlier error",
    94: "contained ECC error",
}
"""Meaning of each Xid that ends only the process that caused it. The GPU is not faulty."""
READ_SECONDS: Final = 5.0
"""Seconds between two reads of the GPUs."""
HANG_SECONDS: Final = 60.0
"""Seconds after which a read counts as hung. A read takes milliseconds, or a second while a GPU wakes up."""


_LOAD: Final[dict[str, Callable[[gpu_facts.Load], float | None]]] = {
    "gpu_utilization": lambda load: load.utilization,
    "gpu_power_watts": lambda load: load.power,
    "gpu_temperature_celsius": lambda load: load.temperature,
}


class Fault(msgspec.Struct, frozen=True):
    """One fault of one GPU.

    ``kind``: "xid 79", "lost", "row remap failure", …. ``fatal``: vLLM cannot serve on this GPU.
    """

    gpu: str
    kind: str
    sentence: str
    fatal: bool = False


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The result of one read of the GPUs.

    The keys are GPUs, by NVML's index as text. ``down``: why NVML does not answer, or None if it does.
    """

    faults: tuple[Fault, ...] = ()
    names: dict[str, metrics.Labels] = {}  # UUID and product name
    memory: dict[str, gpu_facts.Memory] = {}
    load: dict[str, gpu_facts.Load] = {}
    ecc: dict[str, int] = {}
    slowdowns: dict[str, tuple[str, ...]] = {}
    xids: dict[metrics.Labels, int] = {}
    down: str | None = None

    @property
    def used(self) -> int:
        """Return the bytes of memory in use on all GPUs together."""
        return sum(memory.used for memory in self.memory.values())

    @property
    def fatal(self) -> tuple[str, ...]:
        """Return the sentences of the fatal faults."""
        return tuple(fault.sentence for fault in self.faults if fault.fatal)

    def values(self) -> metrics.Values:
        """Return the values for our /metrics."""
        return {
            "nvml_up": {(): float(self.down is None)},
            "gpu_faults": {(fault.gpu, fault.kind, str(fault.fatal).lower()): 1.0 for fault in self.faults},
            "gpu_info": {(gpu, *names): 1.0 for gpu, names in self.names.items()},
            "gpu_memory_used_bytes": {(gpu,): float(memory.used) for gpu, memory in self.memory.items()},
            "gpu_memory_total_bytes": {(gpu,): float(memory.total) for gpu, memory in self.memory.items()},
            **{
                name: {(gpu,): value for gpu, load in self.load.items() if (value := value_of(load)) is not None}
                for name, value_of in _LOAD.items()
            },
            "gpu_ecc_uncorrected_errors": {(gpu,): float(count) for gpu, count in self.ecc.items()},
            "gpu_throttled": {
                (gpu, reason): float(reason in reasons)
                for gpu, reasons in self.slowdowns.items()
                for reason in nvml.SLOWDOWNS.values()
            },
            "gpu_xid_errors": {labels: float(count) for labels, count in self.xids.items()},
        }


class Reader:
    """Reads the GPUs with these UUIDs, or all GPUs that NVML shows if ``uuids`` is empty.

    It counts Xids in ``xids``, because NVML reports each Xid only once. MIG slices have no faults of their own, and
    some GPUs have no UUID. If ``uuids`` has no UUID of a whole GPU ("GPU-…"), it reads every GPU that NVML shows.
    """

    def __init__(
        self, nvml: nvml.Nvml, uuids: Sequence[str] = (), xids: Counter[tuple[int, int]] | None = None
    ) -> None:
        self._nvml, self._uuids = nvml, {uuid for uuid in uuids if uuid.startswith("GPU-")}
        self._xids: Counter[tuple[int, int]] = Counter() if xids is None else xids
        self._events = nvml.xid_events([*self._gpus()[0]])

    def _gpus(self) -> tuple[dict[int, str], list[Fault]]:
        """Return the UUIDs by index, and a fault for each GPU that NVML cannot reach."""
        uuids, lost = {}, []
        for index in range(self._nvml.count()):
            try:
                uuid = self._nvml.uuid(index)
            except nvml.GpuLost as error:
                lost.append(_lost(error))
                continue
            if not self._uuids or uuid in self._uuids:
                uuids[index] = uuid
        # NVML gives no UUID for a lost GPU, so it may not be one of ours. It counts only if one of ours is missing.
        return uuids, lost if not self._uuids or len(uuids) < len(self._uuids) else []

    def read(self) -> Report:
        """Read the GPUs once and return the result. Raises nvml.NvmlUnavailable."""
        uuids, faults = self._gpus()
        self._xids.update(self._events.new() if self._events else ())
        faults += [_xid(index, xid) for index, xid in sorted(self._xids)]
        names: dict[str, metrics.Labels] = {}
        memory, load, ecc, slowdowns = {}, {}, {}, {}
        for index, uuid in uuids.items():
            gpu = str(index)
            try:
                errors, rows = self._nvml.ecc(index).volatile, self._nvml.remapped_rows(index)
                reasons, capacity = self._nvml.slowdowns(index), self._nvml.memory(index)
                names[gpu] = uuid, self._nvml.name(index)
                load[gpu] = self._nvml.load(index)
            except nvml.GpuLost as error:
                faults.append(_lost(error))
                continue
            if capacity is not None:
                memory[gpu] = capacity
            if errors is not None:
                ecc[gpu] = errors
            if reasons is not None:
                slowdowns[gpu] = reasons
            remap_faults = gpu_facts.remap_faults(rows)
            faults += [Fault(gpu, kind, f"GPU {gpu}: {sentence}") for kind, sentence in remap_faults.items()]
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
    """Reads the GPUs again and again in its own thread, so that a driver that hangs blocks only this thread.

    While NVML does not answer, the watcher still reports the fatal faults that it has read before. Such a GPU stays
    unusable whether NVML answers or not.
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
        """Return the last report, or None before the first."""
        if time.monotonic() - self._read_at > self._hang_seconds:
            # The sentence gives the limit, not the elapsed time: a sentence that changes would be logged again.
            limit = f"{self._hang_seconds:g} s"
            return self._without_nvml(f"NVML has not answered for {limit}: look for hung processes and Xids in dmesg")
        return self._report

    def close(self) -> None:
        """Stop reading. Does not wait for a read that hangs."""
        self._ended.set()

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                with nvml.open_nvml() as opened:
                    self._read_until_closed(Reader(opened, self._uuids, self._xids).read)
            except nvml.NvmlUnavailable as error:
                self._store(self._without_nvml(error.what))
            except Exception as error:  # noqa: BLE001 - if this thread ended, its last report would never be replaced
                self._store(self._without_nvml(f"reading NVML failed: {error!r}"))
            self._ended.wait(self._seconds)

    def _read_until_closed(self, read: Callable[[], Report]) -> None:
        while not self._ended.is_set():
            self._store(read())
            self._ended.wait(self._seconds)

    def _store(self, report: Report) -> None:
        self._report, self._read_at = report, time.monotonic()

    def _without_nvml(self, reason: str) -> Report:
        known = self._report.faults if self._report else ()
        return Report(faults=tuple(fault for fault in known if fault.fatal), xids=_counts(self._xids), down=reason)
