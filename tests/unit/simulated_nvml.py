"""Simulates the functions of NVML's Python binding with captured values. Error classes are the binding's own."""

# ruff: noqa: N802  the fake has the binding's names

import json
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pynvml

CAPTURES = Path(__file__).parent.parent / "data" / "hardware"
NOT_SUPPORTED, NO_PERMISSION, NOT_FOUND, TIMEOUT, LOST = 3, 4, 6, 10, 15


class FakePynvml(ModuleType):
    """Fake binding with values captured on a real machine. ``broken`` maps (function, GPU index) to an error code."""

    def __init__(self, capture="nvml-h200-x4.json"):
        super().__init__("pynvml")
        self.machine = json.loads((CAPTURES / capture).read_text())
        self.broken = {}
        self.slices = {}  # GPU index -> [None | SimpleNamespace(uuid, name, memory)]
        self.processes = {}  # (GPU index, kind) -> list
        self.names = {}  # pid -> name
        self.ecc = {}  # (GPU index, counter) -> errors
        self.rows = {}  # GPU index -> (correctable, uncorrectable, pending, failure)
        self.slow = {}  # GPU index -> mask of nvmlClocksEventReasons
        self.xids = []  # (GPU index, Xid) events that the driver will report
        self.init_error = self.shutdown_error = None
        self.opened = 0

    def __getattr__(self, name):
        # Constants and error classes come from the binding. A function that is not simulated must raise.
        value = getattr(pynvml, name)
        if name in ("__file__", "__path__") or (name.startswith("nvml") and callable(value)):
            raise AttributeError(name)
        return value

    def _answer(self, function, index, value):
        code = self.broken.get((function, index))
        if isinstance(value, str) and value.startswith("ERR:"):
            code = {text: code for code, text in pynvml.NVMLError._errcode_to_string.items()}[value[4:]]
        if code is not None:
            raise pynvml.NVMLError(code)
        return value

    def nvmlInit(self):
        if self.init_error is not None:
            raise pynvml.NVMLError(self.init_error)
        self.opened += 1

    def nvmlShutdown(self):
        self.opened -= 1
        if self.shutdown_error is not None:
            raise pynvml.NVMLError(self.shutdown_error)

    def nvmlSystemGetDriverVersion(self):
        return self._answer("driver", None, self.machine["driver"])

    def nvmlSystemGetCudaDriverVersion_v2(self):
        return self._answer("cuda", None, self.machine["cuda"])

    def nvmlDeviceGetCount(self):
        return self._answer("count", None, self.machine["count"])

    def nvmlDeviceGetHandleByIndex(self, index):
        self._answer("handle", index, None)
        return index

    def _gpu(self, handle):
        return self.machine["gpus"][handle]

    def nvmlDeviceGetUUID(self, handle):
        return handle.uuid if isinstance(handle, SimpleNamespace) else self._gpu(handle)["uuid"]

    def nvmlDeviceGetName(self, handle):
        return handle.name if isinstance(handle, SimpleNamespace) else self._gpu(handle)["name"]

    def nvmlDeviceGetPciInfo(self, handle):
        return SimpleNamespace(busId=self._answer("pci", handle, self._gpu(handle)["pci"]))

    def nvmlDeviceGetCudaComputeCapability(self, handle):
        return tuple(self._gpu(handle)["cc"])

    def nvmlDeviceGetMemoryInfo(self, handle, version=None):
        if isinstance(handle, SimpleNamespace):
            return SimpleNamespace(**handle.memory)
        if version is None:
            return SimpleNamespace(**self._answer("memory", handle, self._gpu(handle)["mem"]))
        assert version == pynvml.nvmlMemory_v2
        return SimpleNamespace(**self._answer("memory_v2", handle, self._gpu(handle)["mem_v2"]))

    def nvmlDeviceGetUtilizationRates(self, handle):
        return SimpleNamespace(gpu=self._answer("utilization", handle, 40 + handle), memory=20)

    def nvmlDeviceGetPowerUsage(self, handle):
        return self._answer("power", handle, 350_500)

    def nvmlDeviceGetTemperature(self, handle, sensor):
        assert sensor == pynvml.NVML_TEMPERATURE_GPU
        return self._answer("temperature", handle, 55)

    def nvmlDeviceGetMigMode(self, handle):
        return self._answer("mig", handle, self._gpu(handle)["mig"])

    def nvmlDeviceGetMaxMigDeviceCount(self, handle):
        return len(self.slices.get(handle, []))

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle, index):
        mig_slice = self.slices[handle][index]
        if mig_slice is None:
            raise pynvml.NVMLError(NOT_FOUND)
        return mig_slice

    def _running(self, handle, kind):
        key = handle.uuid if isinstance(handle, SimpleNamespace) else handle
        return self._answer(f"{kind} processes", key, self.processes.get((key, kind), []))

    def nvmlDeviceGetComputeRunningProcesses(self, handle):
        return self._running(handle, "compute")

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle):
        return self._running(handle, "graphics")

    def nvmlDeviceGetMPSComputeRunningProcesses(self, _handle):
        raise pynvml.NVMLLibraryMismatchError("no such function")

    def nvmlSystemGetProcessName(self, pid):
        if pid not in self.names:
            raise pynvml.NVMLError(NOT_FOUND)
        return self.names[pid]

    def nvmlDeviceGetTotalEccErrors(self, handle, kind, counter):
        assert kind == pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED
        return self._answer("ecc", handle, self.ecc.get((handle, counter), 0))

    def nvmlDeviceGetRemappedRows(self, handle):
        return self._answer("rows", handle, self.rows.get(handle, (0, 0, 0, 0)))

    def nvmlDeviceGetNvLinkState(self, handle, link):
        links = self._gpu(handle)["nvlink"]
        return self._answer("nvlink", handle, links[link]["state"] if link < len(links) else "ERR:Invalid Argument")

    def nvmlDeviceGetP2PStatus(self, handle, peer, capability):
        assert type(capability) is int, "ctypes does not accept a tuple"
        rows = {0: "p2p_read", 1: "p2p_read", 2: "p2p_nvlink"}
        return self._answer("p2p", handle, self._gpu(handle)[rows[capability]][peer])

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle):
        return self._answer("clocks", handle, self.slow.get(handle, 0))

    def nvmlEventSetCreate(self):
        return self._answer("event set", None, [])

    def nvmlDeviceRegisterEvents(self, handle, kind, events):
        assert kind == pynvml.nvmlEventTypeXidCriticalError
        self._answer("register", handle, None)
        events.append(handle)

    def nvmlEventSetWait_v2(self, events, milliseconds):
        assert milliseconds == 0
        for position, (index, xid) in enumerate(self.xids):
            if index in events:
                del self.xids[position]
                return SimpleNamespace(device=index, eventType=pynvml.nvmlEventTypeXidCriticalError, eventData=xid)
        raise pynvml.NVMLError(TIMEOUT)
