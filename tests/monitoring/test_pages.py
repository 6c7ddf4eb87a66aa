"""Faults of the real engine lead to pages, with the real rules, Prometheus and Alertmanager.

The field `for` of the rules is at most SHORT_FOR here. test_alerts.py tests the shipped values, and `make test-faults`
(SHIPPED_TIMES=1) waits for them here. A fixture causes all faults first, and then each test waits for its page.
"""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from machine import free_port
from serving import Serving, after
from stack import INTERVAL_S, SHIPPED_RULES, Pager, Prometheus

from vllm_monitoring import rules, thresholds

pytestmark = pytest.mark.timeout(1500)
HERE = Path(__file__).parent
SHIPPED_TIMES = "SHIPPED_TIMES" in os.environ
SHORT_FOR = "15s"


def rules_with_short_for(folder):
    """Write the shipped rules with `for` of at most SHORT_FOR, and return the path."""
    numbers = yaml.safe_load(thresholds.SHIPPED.read_text())
    for limit in (*numbers["alerts"].values(), *numbers["slo"]["burn"]):
        limit["for"] = min(limit["for"], SHORT_FOR, key=thresholds.seconds)
    (folder / "thresholds.yaml").write_text(yaml.safe_dump(numbers))
    (folder / "rules.yaml").write_text(rules.as_yaml(thresholds.read(folder / "thresholds.yaml")))
    return folder / "rules.yaml"


def health_port_is_open(run):
    """Return whether the health port of ``run`` is open."""
    try:
        return run.health("/livez")[0] > 0
    except OSError:
        return False


class Scenario:
    """The running engines, Prometheus and Alertmanager, and the time at which each fault began."""

    def __init__(self, folder, model):
        self.folder, self.model = folder, model
        self.pager = Pager(folder)
        rule_files = SHIPPED_RULES if SHIPPED_TIMES else [rules_with_short_for(folder)]
        self.prometheus = Prometheus(folder, alertmanager=self.pager.address, rules=rule_files)
        self.runs, self.others, self.targets, self.faults = [], [], [], {}

    def scrape(self, pod, *ports):
        self.targets += [(pod, port) for port in ports]
        self.prometheus.watch(self.targets)

    def start(self, name, *flags, **options):
        folder = self.folder / f"{name}-{len(self.runs)}"
        folder.mkdir()
        run = Serving(folder, self.model, name=name, flags=flags, **options)
        self.runs.append(run)
        return run

    def fault(self, *alerts):
        """Note that a fault begins now. ``alerts``: expected pairs of an alert's name and its pod or model."""
        self.faults |= dict.fromkeys(alerts, time.monotonic())

    def page(self, alert, seconds):
        """Wait for a page. It must come within ``seconds`` after its fault."""
        deadline = self.faults[alert] + seconds
        while alert not in self.pager.pages:
            assert time.monotonic() < deadline, f"no page {alert} within {seconds} s, only {sorted(self.pager.pages)}"
            time.sleep(0.2)
        at, page = self.pager.pages[alert]
        assert at < deadline, f"{alert} came after {at - self.faults[alert]:.0f} s, later than {seconds} s"
        assert page["annotations"]["runbook"].endswith(f"/{alert[0]}.md")
        print(f"{alert[0]}: {at - self.faults[alert]:.0f} s after the fault: {page['annotations']['summary']}")

    def close(self):
        for run in self.runs:
            if run.process.poll() is None:
                run.process.send_signal(signal.SIGQUIT)
        for process in (*(run.process for run in self.runs), *self.others):
            if process.poll() is None:
                process.terminate()
            process.wait(60)
        self.prometheus.close()
        self.pager.close()


@pytest.fixture(scope="module")
def scenario(tmp_path_factory, tiny_model):
    result = Scenario(tmp_path_factory.mktemp("pages"), tiny_model)
    try:
        yield result
    finally:
        result.close()


@pytest.fixture(scope="module")
def broken(scenario):
    """Cause all faults except the late drain. Two engines start while the other faults happen."""
    hung = scenario.start("hung", f"--launch-stall-seconds={2 * INTERVAL_S * 5}")
    scenario.scrape("hung-0", hung.port, hung.health_port)
    flooded = scenario.start("flooded", "--max-num-queued-reqs=4", max_num_seqs=2, drain_seconds=60)
    scenario.scrape("flooded-0", flooded.port, flooded.health_port)
    stop_start_up(scenario)
    restart_in_a_loop(scenario)
    hung.wait_for("vllm-launch: ready")
    flooded.wait_for("vllm-launch: ready")
    time.sleep(3 * INTERVAL_S)
    hang(scenario, hung)
    break_gpus(scenario, flooded)
    flood(scenario, flooded)
    return Broken(hung, flooded)


class Broken(NamedTuple):
    """The runs that tests use afterwards."""

    hung: Serving
    flooded: Serving


def stop_start_up(scenario):
    run = scenario.start("stuck", "--launch-start-stall-seconds=60")
    scenario.scrape("stuck-0", run.health_port)
    engine = run.wait_for_title("VLLM::EngineCore")
    scenario.fault(("VLLMStartupStuck", "stuck-0"))
    for pid in [engine, *(pid for pid, title in run.processes().items() if "vllm.entrypoints" in title)]:
        os.kill(pid, signal.SIGSTOP)


def restart_in_a_loop(scenario):
    port, health_port = free_port(), free_port()
    scenario.scrape("looping-0", port, health_port)
    scenario.fault(("VLLMRestartLoop", "looping-0"))
    for _ in range(4):
        run = scenario.start("looping", port=port, health_port=health_port)
        after(functools.partial(health_port_is_open, run), 60)
        time.sleep(2 * INTERVAL_S)
        run.process.send_signal(signal.SIGQUIT)
        run.process.wait(60)


def hang(scenario, run):
    """Stop an engine. It hangs, its launcher ends it, and nothing restarts it.

    Before that it is `stalled` for a fifth of its stall time (VLLMEngineStalled.md): two scrapes, so one sees it.
    """
    scenario.fault(("VLLMEngineStalled", "hung-0"), ("VLLMNoReplicaReady", "hung"))
    os.kill(run.wait_for_title("VLLM::EngineCore"), signal.SIGSTOP)


GPU_ALERTS = ["GPUXidFatal", "GPULost", "GPURowRemapFailure", "GPUECCErrors"]


def break_gpus(scenario, run):
    """Start a second prober for ``run`` with simulated GPUs, and break them."""
    health_port, faults = free_port(), scenario.folder / "faults"
    prober = subprocess.Popen(
        [sys.executable, str(HERE / "simulated_gpus.py"), "serve", f"--target={run.url}", f"--port={health_port}",
         "--host=127.0.0.1", "--model=broken", f"--api-key-file={run.keys}"],
        env=os.environ | {"FAULTS": str(faults)},
    )  # fmt: skip
    scenario.others.append(prober)
    scenario.scrape("broken-0", health_port)
    time.sleep(4 * INTERVAL_S)
    scenario.fault(*((alert, "broken-0") for alert in GPU_ALERTS))
    faults.touch()


def flood(scenario, run):
    """Send an engine far more requests than it can serve. It rejects some."""
    scenario.fault(("VLLMAvailabilityBurn", "flooded"), ("VLLMAdmissionRejections", "flooded"))
    arguments = [run.url, "flooded", "700", "12", "512", run.key]
    scenario.others.append(
        subprocess.Popen([sys.executable, str(HERE / "mixed_load.py"), *arguments], stdout=subprocess.DEVNULL)
    )


@pytest.mark.usefixtures("broken")
def test_gpu_faults_page_simulated(scenario):
    for alert in GPU_ALERTS:
        scenario.page((alert, "broken-0"), 60)


@pytest.mark.usefixtures("broken")
def test_a_start_up_without_progress_pages(scenario):
    scenario.page(("VLLMStartupStuck", "stuck-0"), 90)


@pytest.mark.usefixtures("broken")
def test_a_restart_loop_pages(scenario):
    scenario.page(("VLLMRestartLoop", "looping-0"), 180)


def test_a_hung_engine_pages(scenario, broken):
    scenario.page(("VLLMEngineStalled", "hung-0"), 90)
    broken.hung.process.wait(60)


@pytest.mark.usefixtures("broken")
def test_rejected_requests_burn_the_error_budget_and_page(scenario):
    scenario.page(("VLLMAvailabilityBurn", "flooded"), 400 if SHIPPED_TIMES else 295)


@pytest.mark.usefixtures("broken")
def test_admission_rejections_page(scenario):
    scenario.page(("VLLMAdmissionRejections", "flooded"), 900 if SHIPPED_TIMES else 180)


def test_a_late_drain_pages_before_it_ends(scenario, broken):
    """The streams do not end, because the engine is stopped."""
    os.kill(broken.flooded.wait_for_title("VLLM::EngineCore"), signal.SIGSTOP)
    scenario.fault(("VLLMDrainLate", "flooded-0"))
    broken.flooded.process.send_signal(signal.SIGTERM)
    scenario.page(("VLLMDrainLate", "flooded-0"), 60)


@pytest.mark.usefixtures("broken")
def test_a_model_without_a_ready_replica_pages(scenario):
    scenario.page(("VLLMNoReplicaReady", "hung"), 420 if SHIPPED_TIMES else 135)
