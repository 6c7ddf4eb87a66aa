"""vllm_health.nvml, with NVML simulated at the functions of its Python binding."""

import sys
from types import SimpleNamespace

import msgspec
import pynvml
import pytest
from simulated_nvml import LOST, NO_PERMISSION, NOT_SUPPORTED, FakePynvml

from vllm_health import gpu_facts, nvml


def snapshot():
    with nvml.open_nvml() as opened:
        return opened.snapshot()


@pytest.mark.usefixtures("fake")
def test_a_machine_of_four_gpus_is_read_as_it_was_captured_simulated():
    read = snapshot()
    assert (read.driver, read.cuda, len(read.devices), read.lost) == ("580.159.04", (13, 0), 4, ())
    first = read.devices[0]
    assert first.memory == gpu_facts.Memory(total=150754820096, reserved=644939776, free=150109880320, used=0)
    assert (first.index, first.uuid, first.name) == (0, "GPU-4d2de922-b912-9b40-dc91-7cee04db3669", "NVIDIA H200")
    assert (first.compute_capability, first.pci_bus_id) == ((9, 0), "00000000:00:06.0")
    assert first.nvlinks == (True,) * 18
    assert (first.mig_enabled, first.mig_slices, first.processes) == (False, (), ())
    assert first.ecc == gpu_facts.Ecc(volatile=0)
    assert first.remapped_rows == gpu_facts.RemappedRows(correctable=0, uncorrectable=0, pending=False, failure=False)
    works = gpu_facts.P2P(read=True, write=True, nvlink=True)
    assert read.p2p == tuple(tuple(None if a == b else works for b in range(4)) for a in range(4))


@pytest.mark.usefixtures("fake")
def test_a_snapshot_survives_a_round_trip_through_json_simulated():
    read = snapshot()
    assert msgspec.json.decode(msgspec.json.encode(read), type=gpu_facts.Snapshot) == read


def test_a_gpu_without_nvlink_has_no_links_simulated(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", FakePynvml("nvml-h200-x1.json"))
    assert snapshot().devices[0].nvlinks == ()


def test_each_fact_that_the_gpu_does_not_support_is_none_simulated(fake):
    for function in ("memory_v2", "memory", "mig", "compute processes", "graphics processes", "ecc", "rows", "p2p"):
        fake.broken[function, 0] = NOT_SUPPORTED
    fake.broken |= {("driver", None): 999, ("cuda", None): 999, ("pci", 0): NOT_SUPPORTED, ("nvlink", 0): 999}
    read = snapshot()
    device = read.devices[0]
    assert (read.driver, read.cuda) == (None, None)
    assert (device.memory, device.processes, device.remapped_rows, device.pci_bus_id) == (None, None, None, None)
    assert device.ecc == gpu_facts.Ecc(volatile=None)
    assert (device.mig_enabled, device.nvlinks) == (False, ())
    assert read.p2p[0][1] == gpu_facts.P2P(read=None, write=None, nvlink=None)
    assert read.p2p[1][0] == gpu_facts.P2P(read=True, write=True, nvlink=True)


def test_an_old_driver_shows_memory_without_the_reserved_part_simulated(fake):
    fake.broken["memory_v2", 0] = 13  # NVML_ERROR_FUNCTION_NOT_FOUND
    assert snapshot().devices[0].memory == gpu_facts.Memory(
        total=150754820096, reserved=None, free=150109880320, used=644939776
    )


@pytest.mark.usefixtures("fake")
def test_a_binding_that_lacks_a_function_gives_none_simulated(monkeypatch):
    monkeypatch.delattr(FakePynvml, "nvmlDeviceGetRemappedRows")
    assert snapshot().devices[0].remapped_rows is None


def test_mig_slices_are_read_and_empty_slots_are_skipped_simulated(fake):
    fake.machine["gpus"][1]["mig"] = [1, 1]
    fake.broken |= {("memory_v2", 1): NO_PERMISSION, ("memory", 1): NO_PERMISSION}
    memory = {"total": 10468982784, "reserved": 0, "free": 10000000000, "used": 468982784}
    mig_slice = SimpleNamespace(uuid="MIG-1111", name="NVIDIA H200 MIG 1g.18gb", memory=memory)
    fake.slices[1] = [None, mig_slice, None]
    fake.processes["MIG-1111", "compute"] = [SimpleNamespace(pid=7, usedGpuMemory=4096)]
    fake.names[7] = "python3"
    device = snapshot().devices[1]
    assert (device.mig_enabled, device.memory) == (True, None)
    assert device.mig_slices == (
        gpu_facts.MigSlice(
            uuid="MIG-1111",
            name="NVIDIA H200 MIG 1g.18gb",
            profile="1g.18gb",
            memory=gpu_facts.Memory(**memory),
            processes=(gpu_facts.Process(pid=7, name="python3", memory=4096),),
        ),
    )


def test_each_process_is_listed_once_and_its_hidden_facts_are_none_simulated(fake):
    fake.processes[0, "compute"] = [
        SimpleNamespace(pid=1, usedGpuMemory=10),
        SimpleNamespace(pid=2, usedGpuMemory=None),
    ]
    fake.processes[0, "graphics"] = [
        SimpleNamespace(pid=1, usedGpuMemory=10),
        SimpleNamespace(pid=3, usedGpuMemory=5),
    ]
    fake.names = {1: "vllm", 3: "Xorg"}
    assert snapshot().devices[0].processes == (
        gpu_facts.Process(pid=1, name="vllm", memory=10),
        gpu_facts.Process(pid=2, name=None, memory=None),
        gpu_facts.Process(pid=3, name="Xorg", memory=5),
    )


def test_ecc_errors_and_remapped_rows_are_read_simulated(fake):
    fake.ecc = {(2, pynvml.NVML_VOLATILE_ECC): 3, (2, pynvml.NVML_AGGREGATE_ECC): 9}
    fake.rows[2] = (4, 1, 1, 0)
    device = snapshot().devices[2]
    assert device.ecc == gpu_facts.Ecc(volatile=3)
    assert device.remapped_rows == gpu_facts.RemappedRows(correctable=4, uncorrectable=1, pending=True, failure=False)


@pytest.mark.parametrize(
    ("function", "code", "why"), [("handle", LOST, "lost"), ("ecc", 16, "reset"), ("handle", NO_PERMISSION, "Xid")]
)
def test_a_lost_gpu_is_listed_with_the_reason_and_the_others_are_read_simulated(fake, function, code, why):
    fake.broken[function, 1] = code
    read = snapshot()
    assert [device.index for device in read.devices] == [0, 2, 3]
    assert len(read.p2p) == 3
    ((index, text),) = read.lost
    assert index == 1
    assert why in text


def test_a_gpu_that_is_lost_during_the_snapshot_has_unknown_p2p_simulated(fake):
    fake.broken["p2p", 3] = LOST
    read = snapshot()
    assert read.p2p[3] == (None,) * 4
    assert read.p2p[0][1] is not None


def test_reading_a_single_fact_of_a_lost_gpu_raises_simulated(fake):
    fake.broken["handle", 0] = LOST
    with nvml.open_nvml() as opened, pytest.raises(nvml.GpuLost, match="GPU 0: GPU is lost") as caught:
        opened.ecc(0)
    assert caught.value.index == 0


@pytest.mark.parametrize(
    ("code", "reason", "remedy"),
    [
        (4, "other", "/dev/nvidiactl"),
        (9, "no_driver", "nvidia-smi"),
        (12, "no_library", "--gpus all"),
        (18, "version_mismatch", "reboot"),
        (999, "unknown_error", "daemon-reload"),
        (20, "other", "Insufficient Memory"),
    ],
)
def test_nvml_that_does_not_start_gives_a_reason_and_a_remedy_simulated(fake, code, reason, remedy):
    fake.init_error = code
    with pytest.raises(nvml.NvmlUnavailable) as caught:
        snapshot()
    assert caught.value.reason == reason
    assert remedy in str(caught.value)


def test_gpus_that_cannot_be_counted_are_an_error_simulated(fake):
    fake.broken["count", None] = 999
    with pytest.raises(nvml.NvmlUnavailable, match="Unknown Error") as caught:
        snapshot()
    assert caught.value.reason == "unknown_error"
    assert fake.opened == 0


def test_a_missing_python_binding_is_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(nvml.NvmlUnavailable, match="nvidia-ml-py is not installed") as caught:
        snapshot()
    assert caught.value.reason == "no_binding"


def test_nvml_is_shut_down_after_a_failed_read_even_if_shutting_down_fails_simulated(fake):
    fake.shutdown_error = LOST
    with pytest.raises(KeyError), nvml.open_nvml():
        raise KeyError
    assert fake.opened == 0


def test_importing_nvml_loads_no_binding_and_no_slow_module():
    import subprocess  # noqa: PLC0415  only this test needs a fresh interpreter

    code = (
        "import sys, vllm_health.nvml; print([m for m in ('pynvml', 'ctypes', 'torch', 'asyncio') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout == "[]\n"
