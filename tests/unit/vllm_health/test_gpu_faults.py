"""GPU faults, with NVML simulated at the functions of its Python binding. No test machine has a broken GPU."""

from __future__ import annotations

import threading
import time

import pynvml
import pytest
from simulated_nvml import LOST, NOT_SUPPORTED

from vllm_health import gpu_faults, metrics, nvml


@pytest.fixture
def opened(fake):
    del fake
    with nvml.open_nvml() as nvml_opened:
        yield nvml_opened


def test_a_healthy_machine_has_no_faults_simulated(opened):
    report = gpu_faults.Reader(opened).read()
    assert (report.faults, report.xids, report.down) == ((), {}, None)
    assert (report.ecc, report.slowdowns) == (dict.fromkeys("0123", 0), dict.fromkeys("0123", ()))
    assert report.fatal == ()
    assert report.used == 0


@pytest.mark.parametrize(
    ("xid", "fatal"), [(79, True), (48, True), (119, True), (31, False), (94, False), (999, False)]
)
def test_an_xid_stays_in_every_later_report_and_is_fatal_by_its_number_simulated(opened, fake, xid, fatal):
    reader = gpu_faults.Reader(opened)
    assert reader.read().faults == ()
    fake.xids += [(2, xid), (2, xid)]
    for _ in range(2):
        report = reader.read()
        assert [(fault.gpu, fault.kind, fault.fatal) for fault in report.faults] == [("2", f"xid {xid}", fatal)]
        assert report.xids == {("2", str(xid)): 2}
        assert bool(report.fatal) == fatal
    assert f"GPU 2: Xid {xid}, " in report.faults[0].sentence


def test_a_lost_gpu_is_a_fatal_fault_and_the_other_gpus_are_still_read_simulated(opened, fake):
    reader = gpu_faults.Reader(opened)
    fake.broken["handle", 1] = LOST
    report = reader.read()
    assert report.fatal == ("GPU 1: GPU is lost: it fell off the bus",)
    assert set(report.ecc) == {"0", "2", "3"}


def test_only_faults_of_the_gpus_that_vllm_uses_count_simulated(opened, fake):
    ours = [fake.machine["gpus"][index]["uuid"] for index in (0, 1)]
    reader = gpu_faults.Reader(opened, ours)
    fake.xids += [(3, 79)]
    fake.broken["handle", 3] = LOST
    assert reader.read().faults == ()
    fake.broken["handle", 1] = LOST
    # NVML gives no UUID for a lost GPU, so either of the two may be ours.
    assert [fault.gpu for fault in reader.read().faults] == ["1", "3"]


def test_a_mig_slice_has_the_faults_of_its_gpu_simulated(opened, fake):
    reader = gpu_faults.Reader(opened, ["MIG-11111111-2222-3333-4444-555555555555"])
    fake.xids += [(3, 79)]
    assert [fault.gpu for fault in reader.read().faults] == ["3"]


def test_pending_and_failed_row_remaps_are_faults_but_not_fatal_simulated(opened, fake):
    fake.rows = {0: (0, 1, 1, 0), 1: (0, 1, 0, 1)}
    report = gpu_faults.Reader(opened).read()
    assert [(fault.gpu, fault.kind) for fault in report.faults] == [
        ("0", "row remap pending"),
        ("1", "row remap failure"),
    ]
    assert [fault.sentence for fault in report.faults] == [
        "GPU 0: a row remap is pending: reset the GPU when it is idle, or reboot",
        "GPU 1: row remapping failed: replace the GPU",
    ]
    assert report.fatal == ()


def test_ecc_errors_used_memory_and_slow_clocks_are_in_the_metrics_simulated(opened, fake):
    fake.ecc[1, pynvml.NVML_VOLATILE_ECC] = 7
    fake.slow = {0: 0x1 | 0x4, 2: 0x40 | 0x8}
    fake.machine["gpus"][3]["mem_v2"]["used"] = 5 << 30
    report = gpu_faults.Reader(opened).read()
    assert report.ecc["1"] == 7
    assert report.slowdowns == {"0": (), "1": (), "2": ("HW Slowdown", "HW Thermal Slowdown"), "3": ()}
    assert report.used == 5 << 30
    values = report.values()
    assert {labels for labels, value in values["gpu_throttled"].items() if value} == {
        ("2", "HW Slowdown"), ("2", "HW Thermal Slowdown"),
    }  # fmt: skip
    assert values["gpu_throttled"]["0", "HW Power Brake Slowdown"] == 0
    assert values["gpu_ecc_uncorrected_errors"]["1",] == 7
    assert values["nvml_up"] == {(): 1}


def test_load_memory_and_names_are_in_the_metrics_simulated(opened, fake):
    fake.machine["gpus"][3]["mem_v2"]["used"] = 5 << 30
    fake.broken["power", 2] = NOT_SUPPORTED
    values = gpu_faults.Reader(opened, [fake.machine["gpus"][index]["uuid"] for index in (2, 3)]).read().values()
    assert values["gpu_utilization"] == {("2",): 0.42, ("3",): 0.43}
    assert values["gpu_power_watts"] == {("3",): 350.5}
    assert values["gpu_temperature_celsius"] == {("2",): 55, ("3",): 55}
    assert values["gpu_memory_used_bytes"]["3",] == 5 << 30
    assert values["gpu_memory_total_bytes"]["3",] == fake.machine["gpus"][3]["mem_v2"]["total"]
    assert ("3", fake.machine["gpus"][3]["uuid"], fake.machine["gpus"][3]["name"]) in values["gpu_info"]


@pytest.mark.parametrize("function", ["event set", "register"])
def test_a_driver_that_reports_no_xids_is_still_read_simulated(opened, fake, function):
    for index in (None, 0, 1, 2, 3):
        fake.broken[function, index] = NOT_SUPPORTED
    fake.xids += [(0, 79)]
    assert gpu_faults.Reader(opened).read().faults == ()


def test_a_fact_that_a_gpu_does_not_offer_is_left_out_simulated(opened, fake):
    for function in ("ecc", "rows", "clocks", "memory", "memory_v2"):
        fake.broken[function, 0] = NOT_SUPPORTED
    report = gpu_faults.Reader(opened).read()
    assert set(report.ecc) == set(report.slowdowns) == {"1", "2", "3"}


def test_every_gpu_metric_is_described():
    fault = gpu_faults.Fault("0", "xid 79", "GPU 0.", fatal=True)
    slowdowns = {"0": ("HW Power Brake Slowdown",)}
    report = gpu_faults.Report(faults=(fault,), ecc={"0": 1}, slowdowns=slowdowns, xids={("0", "79"): 1})
    exposition = metrics.Exposition()
    exposition.values, exposition.model = report.values(), "tiny"
    text = exposition.text().decode()
    assert 'vllm_health_gpu_faults{fatal="true",gpu="0",kind="xid 79",model_name="tiny"} 1.0' in text
    assert 'vllm_health_gpu_xid_errors_total{gpu="0",model_name="tiny",xid="79"} 1.0' in text


def wait_for(watch, condition):
    """Wait until ``condition`` is true for the watcher's report, and return the report."""
    deadline = time.monotonic() + 30
    while not (watch.report and condition(watch.report)):
        assert time.monotonic() < deadline, watch.report
        time.sleep(0.01)
    return watch.report


def test_the_watcher_keeps_fatal_faults_while_nvml_fails_and_reads_again_afterwards_simulated(fake):
    watch = gpu_faults.GpuWatcher(seconds=0.01)
    try:
        assert wait_for(watch, lambda report: report.ecc).down is None
        fake.xids += [(0, 79)]
        assert wait_for(watch, lambda report: report.fatal)
        fake.broken["count", None] = 999
        assert "Unknown Error" in wait_for(watch, lambda report: report.down).down
        assert watch.report.fatal == ("GPU 0: Xid 79, the GPU has fallen off the bus",)  # still reported
        del fake.broken["count", None]
        wait_for(watch, lambda report: report.ecc)
    finally:
        watch.close()


@pytest.mark.usefixtures("fake")
def test_the_watcher_survives_an_unexpected_exception_simulated(monkeypatch):
    read, works = gpu_faults.Reader.read, threading.Event()

    def read_or_fail(reader):
        if not works.is_set():
            raise ZeroDivisionError("strange")
        return read(reader)

    monkeypatch.setattr(gpu_faults.Reader, "read", read_or_fail)
    watch = gpu_faults.GpuWatcher(seconds=0.01)
    try:
        assert wait_for(watch, lambda report: report.down).down == "reading NVML failed: ZeroDivisionError('strange')"
        works.set()
        assert wait_for(watch, lambda report: report.ecc).down is None
    finally:
        watch.close()


def test_a_driver_that_hangs_does_not_block_the_prober_simulated(fake, monkeypatch):
    hangs = threading.Event()
    monkeypatch.setattr(fake, "nvmlInit", lambda: hangs.wait(30), raising=False)
    watch = gpu_faults.GpuWatcher(seconds=0.01, hang_seconds=0.5)
    assert watch.report is None
    assert "NVML has not answered" in wait_for(watch, lambda report: report.down).down
    watch.close()
    hangs.set()
