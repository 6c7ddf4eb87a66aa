"""From a fault of the real engine to the page that somebody gets: real rules, real Prometheus, real Alertmanager.

What the shipped rules want to see for minutes (`for`) these want to see for HELD; test_alerts.py has the shipped times, and
`make test-faults`, which says SHIPPED_TIMES=1, waits for them here. Everything is broken first, and then every page is
waited for.
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
HELD = "15s"


def told_sooner(folder):
    """The path of the shipped rules, but that HELD is enough where they want to see something for longer."""
    numbers = yaml.safe_load(thresholds.SHIPPED.read_text())
    for limit in (*numbers["alerts"].values(), *numbers["slo"]["burn"]):
        limit["for"] = min(limit["for"], HELD, key=thresholds.seconds)
    (folder / "thresholds.yaml").write_text(yaml.safe_dump(numbers))
    (folder / "rules.yaml").write_text(rules.as_yaml(thresholds.read(folder / "thresholds.yaml")))
    return folder / "rules.yaml"


def answers(run):
    """Whether the health port of ``run`` is open."""
    try:
        return run.health("/livez")[0] > 0
    except OSError:
        return False


class Course:
    """What runs, what is scraped, and when each fault began."""

    def __init__(self, folder, model):
        self.folder, self.model = folder, model
        self.pager = Pager(folder)
        told = SHIPPED_RULES if SHIPPED_TIMES else [told_sooner(folder)]
        self.prometheus = Prometheus(folder, alertmanager=self.pager.address, rules=told)
        self.runs, self.others, self.targets, self.faults = [], [], [], {}

    def scrape(self, pod, *ports):
        self.targets += [(pod, port) for port in ports]
        self.prometheus.watch(self.targets)

    def start(self, name, *flags, **options):
        place = self.folder / f"{name}-{len(self.runs)}"
        place.mkdir()
        run = Serving(place, self.model, name=name, flags=flags, **options)
        self.runs.append(run)
        return run

    def fault(self, *alerts):
        """Now something breaks that these shall tell of: pairs of an alert and the pod or model it names."""
        self.faults |= dict.fromkeys(alerts, time.monotonic())

    def page(self, alert, seconds):
        """Wait for it; it may come so many seconds after its fault."""
        deadline = self.faults[alert] + seconds
        while alert not in self.pager.pages:
            assert time.monotonic() < deadline, f"no {alert} within {seconds} s, but {sorted(self.pager.pages)}"
            time.sleep(0.2)
        at, told = self.pager.pages[alert]
        assert at < deadline, f"{alert} after {at - self.faults[alert]:.0f} s, and not within {seconds} s"
        assert told["annotations"]["runbook_url"].endswith(f"/{alert[0]}.md")
        print(f"{alert[0]}: {at - self.faults[alert]:.0f} s after the fault: {told['annotations']['summary']}")

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
def course(tmp_path_factory, tiny_model):
    one = Course(tmp_path_factory.mktemp("pages"), tiny_model)
    try:
        yield one
    finally:
        one.close()


@pytest.fixture(scope="module")
def broken(course):
    """All faults but the drain's. Engines start side by side; the others have theirs meanwhile."""
    hung = course.start("hung", f"--launch-stall-seconds={2 * INTERVAL_S * 5}")
    course.scrape("hung-0", hung.port, hung.health_port)
    flooded = course.start("flooded", "--max-num-queued-reqs=4", max_num_seqs=2, drain_seconds=60)
    course.scrape("flooded-0", flooded.port, flooded.health_port)
    stop_a_start(course)
    restart_in_a_loop(course)
    hung.wait_for("vllm-launch: ready")
    flooded.wait_for("vllm-launch: ready")
    time.sleep(3 * INTERVAL_S)
    hang(course, hung)
    break_gpus(course, flooded)
    flood(course, flooded)
    return Broken(hung, flooded)


class Broken(NamedTuple):
    """The runs that tests go on to ask."""

    hung: Serving
    flooded: Serving


def stop_a_start(course):
    run = course.start("stuck", "--launch-start-stall-seconds=60")
    course.scrape("stuck-0", run.health_port)
    engine = run.wait_for_title("VLLM::EngineCore")
    course.fault(("VLLMStartupStuck", "stuck-0"))
    for pid in [engine, *(pid for pid, title in run.processes().items() if "vllm.entrypoints" in title)]:
        os.kill(pid, signal.SIGSTOP)


def restart_in_a_loop(course):
    port, health_port = free_port(), free_port()
    course.scrape("looping-0", port, health_port)
    course.fault(("VLLMRestartLoop", "looping-0"))
    for _ in range(4):
        run = course.start("looping", port=port, health_port=health_port)
        after(functools.partial(answers, run), 60)
        time.sleep(2 * INTERVAL_S)
        run.process.send_signal(signal.SIGQUIT)
        run.process.wait(60)


def hang(course, run):
    """An engine that is stopped: it hangs, is ended by its launcher, and nobody starts it again.

    It is `stalled` for a fifth of its time before it is ended (VLLMEngineStalled.md): two scrapes, so one sees it.
    """
    course.fault(("VLLMEngineStalled", "hung-0"), ("VLLMNoReplicaReady", "hung"))
    os.kill(run.wait_for_title("VLLM::EngineCore"), signal.SIGSTOP)


GPU_ALERTS = ["GPUXidFatal", "GPULost", "GPURowRemapFailure", "GPUECCErrors"]


def break_gpus(course, run):
    """Beside ``run``, GPUs that are simulated."""
    health_port, faults = free_port(), course.folder / "faults"
    prober = subprocess.Popen(
        [sys.executable, str(HERE / "simulated_gpus.py"), "serve", f"--target={run.url}", f"--port={health_port}",
         "--host=127.0.0.1", "--model=broken", f"--api-key-file={run.keys}"],
        env=os.environ | {"FAULTS": str(faults)},
    )  # fmt: skip
    course.others.append(prober)
    course.scrape("broken-0", health_port)
    time.sleep(4 * INTERVAL_S)
    course.fault(*((alert, "broken-0") for alert in GPU_ALERTS))
    faults.touch()


def flood(course, run):
    """An engine is asked for far more than it can do, and may turn requests away."""
    course.fault(("VLLMAvailabilityBurn", "flooded"), ("VLLMAdmissionRejections", "flooded"))
    words = [run.url, "flooded", "700", "12", "512", run.key]
    course.others.append(
        subprocess.Popen([sys.executable, str(HERE / "mixed_load.py"), *words], stdout=subprocess.DEVNULL)
    )


@pytest.mark.usefixtures("broken")
def test_gpu_faults_page_simulated(course):
    for alert in GPU_ALERTS:
        course.page((alert, "broken-0"), 60)


@pytest.mark.usefixtures("broken")
def test_a_start_that_does_not_move_is_told(course):
    course.page(("VLLMStartupStuck", "stuck-0"), 90)


@pytest.mark.usefixtures("broken")
def test_a_restart_loop_pages(course):
    course.page(("VLLMRestartLoop", "looping-0"), 180)


def test_a_hung_engine_pages(course, broken):
    course.page(("VLLMEngineStalled", "hung-0"), 90)
    broken.hung.process.wait(60)


@pytest.mark.usefixtures("broken")
def test_requests_that_are_turned_away_page(course):
    course.page(("VLLMAvailabilityBurn", "flooded"), 400 if SHIPPED_TIMES else 295)


@pytest.mark.usefixtures("broken")
def test_that_an_engine_turns_requests_away_is_told(course):
    course.page(("VLLMAdmissionRejections", "flooded"), 900 if SHIPPED_TIMES else 180)


def test_a_drain_that_will_cut_streams_is_told(course, broken):
    """It is told before the end. Streams are slow here because the engine is stopped in the middle of them."""
    os.kill(broken.flooded.wait_for_title("VLLM::EngineCore"), signal.SIGSTOP)
    course.fault(("VLLMDrainLate", "flooded-0"))
    broken.flooded.process.send_signal(signal.SIGTERM)
    course.page(("VLLMDrainLate", "flooded-0"), 60)


@pytest.mark.usefixtures("broken")
def test_a_model_that_nobody_serves_any_more_pages(course):
    course.page(("VLLMNoReplicaReady", "hung"), 420 if SHIPPED_TIMES else 135)
