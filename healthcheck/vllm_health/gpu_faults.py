"""GPU faults, as NVML tells of them: Xid errors, ECC, row remapping, lost GPUs, slow clocks. Reads in its own thread.

Meanings and remedies of Xids: docs.nvidia.com/deploy/xid-errors. NVML that fails is a warning, never a death: it stops
answering in containers whose engine works on (NVIDIA/nvidia-container-toolkit#48).
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from vllm_health import metrics, nvml

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


class Fault(msgspec.Struct, frozen=True):
    """``kind``: "xid 79", "lost", "row remap failure", …; ``fatal``: nothing can be served on this GPU."""

    gpu: str
    kind: str
    sentence: str
    fatal: bool = False


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One look at the GPUs; by GPU, which is NVML's index as text. ``down``: why NVML does not answer."""

    faults: tuple[Fault, ...] = ()
    ecc: dict[str, int] = {}
    slowdowns: dict[str, tuple[str, ...]] = {}
    xids: dict[metrics.Labels, int] = {}
    used: int = 0  # bytes of memory, all GPUs together
    down: str | None = None

    @property
    def fatal(self) -> tuple[str, ...]:
        """Sentences of the faults that end all service."""
        return tuple(fault.sentence for fault in self.faults if fault.fatal)

    def values(self) -> metrics.Values:
        """As our /metrics shows them."""
        return {
            "nvml_up": {(): float(self.down is None)},
            "gpu_faults": {(one.gpu, one.kind, str(one.fatal).lower()): 1.0 for one in self.faults},
            "gpu_ecc_uncorrected_errors": {(gpu,): float(count) for gpu, count in self.ecc.items()},
            "gpu_throttled": {(gpu, why): 1.0 for gpu, reasons in self.slowdowns.items() for why in reasons},
            "gpu_xid_errors": {labels: float(count) for labels, count in self.xids.items()},
        }


class Reader:
    """Reads the GPUs with these UUIDs, or all that NVML shows; remembers Xids, since NVML tells of each but once.

    MIG slices have no faults of their own: where ``uuids`` are theirs, every GPU that NVML shows is read.
    """

    def __init__(self, nvml: nvml.Nvml, uuids: Sequence[str] = ()) -> None:
        self._nvml, self._uuids = nvml, {uuid for uuid in uuids if not uuid.startswith("MIG-")}
        self._xids: Counter[tuple[int, int]] = Counter()
        self._events = nvml.xid_events(self._indices()[0])

    def _indices(self) -> tuple[list[int], list[Fault]]:
        found, lost = [], []
        for index in range(self._nvml.count()):
            try:
                uuid = self._nvml.uuid(index)
            except nvml.GpuLost as error:
                lost.append(_lost(error))
                continue
            if not self._uuids or uuid in self._uuids:
                found.append(index)
        # A GPU that cannot be asked for its name may be another's: it counts where one of ours is missing.
        return found, lost if not self._uuids or len(found) < len(self._uuids) else []

    def read(self) -> Report:
        """One look. Raises nvml.NvmlUnavailable."""
        indices, faults = self._indices()
        self._xids.update(self._events.new() if self._events else ())
        faults += [_xid(index, xid) for index, xid in sorted(self._xids)]
        ecc, slowdowns, used = {}, {}, 0
        for index in indices:
            gpu = str(index)
            try:
                errors, rows = self._nvml.ecc(index).volatile, self._nvml.remapped_rows(index)
                slow, used = self._nvml.slowdowns(index), used + (self._nvml.used(index) or 0)
            except nvml.GpuLost as error:
                faults.append(_lost(error))
                continue
            if errors is not None:
                ecc[gpu] = errors
            if slow is not None:
                slowdowns[gpu] = slow
            if rows and rows.failure:
                what = f"GPU {gpu}: a memory row could not be replaced by a spare one: have the GPU replaced"
                faults.append(Fault(gpu, "row remap failure", what))
            if rows and rows.pending:
                what = f"GPU {gpu}: a memory row is to be replaced by a spare one: reset the GPU when it is idle"
                faults.append(Fault(gpu, "row remap pending", what))
        counts: dict[metrics.Labels, int] = {
            (str(index), str(xid)): count for (index, xid), count in self._xids.items()
        }
        return Report(faults=tuple(faults), ecc=ecc, slowdowns=slowdowns, xids=counts, used=used)


def _lost(error: nvml.GpuLost) -> Fault:
    return Fault(str(error.index), "lost", str(error), fatal=True)


def _xid(index: int, xid: int) -> Fault:
    meaning = FATAL_XIDS.get(xid) or APPLICATION_XIDS.get(xid) or "see docs.nvidia.com/deploy/xid-errors"
    return Fault(str(index), f"xid {xid}", f"GPU {index}: Xid {xid}, {meaning}", fatal=xid in FATAL_XIDS)


class Watch:
    """Reads again and again in a thread of its own: a driver that hangs blocks whoever asks it, and nobody else."""

    def __init__(self, uuids: Sequence[str] = (), seconds: float = READ_SECONDS) -> None:
        self.report: Report | None = None
        self._uuids, self._seconds, self._ended = uuids, seconds, threading.Event()
        self._thread = threading.Thread(target=self._run, name="GPU faults", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """No more looks; one that hangs is left to hang."""
        self._ended.set()

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                with nvml.open_nvml() as opened:
                    self._read_on(Reader(opened, self._uuids).read)
            except nvml.NvmlUnavailable as error:
                self.report = Report(down=error.what)
            except Exception as error:  # noqa: BLE001 - a thread that dies would leave its last report standing for ever
                self.report = Report(down=f"reading it failed: {error!r}")
            self._ended.wait(self._seconds)

    def _read_on(self, read: Callable[[], Report]) -> None:
        while not self._ended.is_set():
            self.report = read()
            self._ended.wait(self._seconds)
