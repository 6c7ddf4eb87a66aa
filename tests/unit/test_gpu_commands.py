"""The parts of benchmarks/gpu that need no GPU: their normal results, and their behaviour when something fails."""

import argparse
import contextlib
import json
import queue
import subprocess
import sys
import time
from pathlib import Path

import pytest
from simulated_nvml import LOST

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks/gpu"))
import bench  # noqa: E402
import bench_serve  # noqa: E402
import edge  # noqa: E402
import memory  # noqa: E402
import result  # noqa: E402
import smoke  # noqa: E402
import start  # noqa: E402
import throughput  # noqa: E402

from vllm_health import gpu_facts, nvml  # noqa: E402


@pytest.fixture
def smoke_lines(fake, monkeypatch, capsys):
    """Return a function that runs smoke.look and returns its printed lines by their subject."""
    monkeypatch.setattr(smoke, "failed", [])

    assert not fake.opened

    def look():
        smoke.look()
        return {line[5:38].strip(): line for line in capsys.readouterr().out.splitlines()}

    return look


def test_smoke_prints_one_ok_line_per_check_of_a_healthy_machine_simulated(smoke_lines):
    lines = smoke_lines()
    assert list(lines) == ["GPUs (NVML)", "faults can be seen", "memory that others hold"]
    assert all(line.startswith("ok   ") for line in lines.values())
    assert "3: NVIDIA H200, 139.8 GiB" in lines["GPUs (NVML)"]
    assert smoke.failed == []


def test_a_lost_gpu_fails_and_the_other_checks_still_run_simulated(smoke_lines, fake):
    fake.broken["handle", 1] = LOST
    lines = smoke_lines()
    assert lines["GPUs (NVML)"].startswith("FAIL ")
    assert "lost" in lines["GPUs (NVML)"]
    assert len(lines) == 3
    assert smoke.failed[0] == "GPUs (NVML)"


def test_memory_of_other_processes_is_printed_simulated(smoke_lines, fake):
    fake._gpu(2)["mem_v2"]["used"] = 1200 << 20  # without the driver's own 615 MiB
    line = smoke_lines()["memory that others hold"]
    assert line.startswith("ok   ")  # the plan uses the rest
    assert "; GPU 2: 1200 MiB; " in line


def test_memory_left_on_a_gpu_after_a_drain_is_a_failure_simulated(fake):
    before = dict.fromkeys(range(4), 100)
    smoke.emptied(before, seconds=0)
    fake._gpu(3)["mem_v2"]["used"] = 300 << 20  # the driver may keep some
    smoke.emptied(before, seconds=0)
    fake._gpu(3)["mem_v2"]["used"] = 400 << 20
    with pytest.raises(RuntimeError, match="GPU 3 still holds 400 MiB, 100 before"):
        smoke.emptied(before, seconds=0)


def test_without_a_gpu_smoke_prints_one_line_and_exits_with_2(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/gpu/smoke.py")], check=False, capture_output=True, text=True,
        cwd=tmp_path, env={"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{ROOT}/scripts:{ROOT}/healthcheck"},
    )  # fmt: skip
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("test-gpu: libnvidia-ml.so.1 is not here")


def test_load_of_gives_the_medians_of_nvmls_samples_simulated(fake, monkeypatch):
    assert not fake.opened
    utilizations = iter([0.1, *[0.9] * 1000])
    monkeypatch.setattr(
        nvml.Nvml, "load", lambda *_: gpu_facts.Load(utilization=next(utilizations), power=600.4, temperature=None)
    )
    with bench.load_of([0, 1], every_s=0.001) as load:
        time.sleep(0.1)
        assert load == {}
    assert load == {"gpu_busy": 0.9, "watts": 600}


def test_load_of_is_empty_without_samples_of_nvml_simulated(fake):
    fake.broken["handle", 0] = LOST
    with bench.load_of([0], every_s=0.001) as load:
        time.sleep(0.05)
    assert load == {}
    with bench.load_of([]) as load:
        pass
    assert load == {}


def test_an_early_end_of_a_server_raises_its_error_line_and_leaves_no_process(tmp_path):
    words = ["bash", "-c", "sleep 300 & echo ValueError: no room; exit 1"]
    with pytest.raises(bench.DeadError, match="no room"), bench.served(words, tmp_path / "log", port=1):
        pass


def test_a_failed_server_gives_one_line_with_the_log_path_and_exit_code_1(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmarks/gpu/x.py"])
    log = tmp_path / "log"

    def command():
        with bench.served(["bash", "-c", "echo ValueError: no room; echo bye; exit 3"], log, port=1):
            return 0

    with pytest.raises(SystemExit) as ended:
        bench.run(command)
    assert ended.value.code == f"x.py: {log}: it ended with 3: ValueError: no room"  # on stderr, and exit 1
    with pytest.raises(SystemExit) as ended:
        bench.run(lambda: 0)
    assert ended.value.code == 0


@pytest.mark.parametrize(
    ("plan_survives", "others_survive", "utilizations", "highest"),
    [
        (True, True, [0.9545, 0.9768], 0.9768),
        (False, False, [0.925, 0.9225], None),
        (False, True, [0.925, 0.9275], 0.9275),
    ],
    ids=["all survive", "none survives", "the plan's value fails"],
)
def test_edge_finds_the_highest_utilization_that_survives_simulated(
    tmp_path, monkeypatch, plan_survives, *, others_survive, utilizations, highest
):
    requested = []

    def simulated(command, log, _given):
        utilization = next(
            (float(word.partition("=")[2]) for word in command if "gpu-memory-utilization" in word), None
        )
        log.parent.mkdir(exist_ok=True)
        log.write_text("--gpu-memory-utilization=" + ("0.91" if plan_survives else "0.93"))
        requested.extend([utilization] if utilization else [])
        return {"survived": others_survive if utilization else plan_survives}

    monkeypatch.setattr(edge, "tried", simulated)
    (tmp_path / "tokenizer").mkdir()
    words = [f"--tokenizer={tmp_path}/tokenizer", f"--out={tmp_path}/out.json", "--tries=2"]
    monkeypatch.setattr(sys, "argv", ["edge.py", *words])
    assert edge.main() == int(not plan_survives)
    assert requested == utilizations
    assert json.loads((tmp_path / "out.json").read_text())["highest_that_survived"] == highest


def test_a_port_that_another_server_uses_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "healthy", lambda _: True)
    with pytest.raises(bench.DeadError, match="served already"), bench.served(["true"], tmp_path / "log", port=1):
        pass


def test_a_result_contains_no_path_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmarks/gpu/x.py", "--out", str(tmp_path / "r.json"), "--share", "0.5 of"])
    edge_result = result.Result(tmp_path / "r.json", "edge")
    edge_result.add(survived=True)
    written = json.loads((tmp_path / "r.json").read_text())
    assert written["provenance"]["command"] == "python benchmarks/gpu/x.py --out r.json --share '0.5 of'"
    assert written["rows"] == [{"survived": True}]


def test_provenance_records_the_state_of_the_caches(tmp_path, monkeypatch):
    for name in ("XDG_CACHE_HOME", "VLLM_CACHE_ROOT", "FLASHINFER_WORKSPACE_BASE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    compiled, built = tmp_path / ".cache/vllm/torch_compile_cache", tmp_path / ".cache/flashinfer/0.7/90a/cached_ops"
    compiled.mkdir(parents=True)
    assert result.provenance()["caches"] == "empty"
    built.mkdir(parents=True)
    (built / "norm.so").touch()
    assert result.provenance()["caches"] == "kernels"
    (compiled / "0a1b").mkdir()
    assert result.provenance()["caches"] == "warm"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    assert result.provenance()["caches"] == "kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".cache"))
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("FLASHINFER_WORKSPACE_BASE", str(tmp_path / "elsewhere"))
    assert result.provenance()["caches"] == "empty"
    (tmp_path / "flashinfer_jit_cache").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert result.provenance()["caches"] == "kernels"


def test_a_memory_row_has_each_term_of_the_plan_and_vllms_measurement():
    """The figures are vLLM's for Llama-3-8B on an H200. Only the context is rounded."""
    gib = 1 << 30
    rank = {
        "weights_bytes": 14.96 * gib, "total_consumed_bytes": 15.76 * gib, "activation_peak_bytes": 1.07 * gib,
        "cuda_graphs_estimate_bytes": 0.92 * gib, "init": {"total_memory": 139.8 * gib, "free_memory": 139.29 * gib},
    }  # fmt: skip
    row = {
        "config": bench.SHAPES["llama3-8b"], "kv_cache_tokens": 908_208, "ranks": [rank],
        "args": {**memory.SERVE, "tensor_parallel_size": 1},
    }  # fmt: skip
    parts = memory.parts(row)
    assert abs(parts["kv_error"]) < 0.005
    [terms] = parts["parts_gib"]
    for term, tolerance in {"weights": 0.05, "non_torch": 0.05, "cuda_graphs": 0.15, "context": 0.05}.items():
        planned, real = terms[term]
        assert planned == pytest.approx(real, abs=tolerance), term
    assert memory.summary([row | parts, {"error": "no"}]) == {
        "rows": 1, "mean_absolute_error": abs(parts["kv_error"]), "worst": abs(parts["kv_error"]),
    }  # fmt: skip


def test_both_cuda_graph_captures_are_read_from_a_real_log():
    (log,) = (ROOT / "tests/data/logs").glob("vllm-*-h100-start.log")
    values = memory.logged(log.read_text())
    assert (values["graphs_seen_gib"], values["graph_capture_gib"], values["graph_pool_gib"]) == (
        "0.61",
        "0.45",
        "0.45",
    )
    assert (values["attention_backend"], values["compile_s"], values["compile_cache_hit"]) == (
        "FLASH_ATTN",
        "23.67",
        False,
    )


def test_percentiles_are_in_milliseconds_for_any_number_of_values():
    assert bench_serve.percentiles([0.002]) == {"p50": 2.0, "p99": 2.0}
    assert bench_serve.percentiles([0.001, 0.003]) == {"p50": 2.0, "p99": 2.98}
    assert bench_serve.percentiles([]) == {}


# ---- throughput, with servers and load simulated


@pytest.fixture
def throughputs(tmp_path, monkeypatch):
    """Return a function that runs throughput.py and returns its exit code, its rows, and one line per server and load."""
    calls = tmp_path / "calls"

    def record(line):
        with calls.open("a") as file:
            file.write(f"{line}\n")

    @contextlib.contextmanager
    def running(command, *_, port, env):
        record(f"{port} on GPU {env.get('CUDA_VISIBLE_DEVICES')}: {' '.join(command)}")
        yield argparse.Namespace(pid=port)

    def measured(_model, ports, _workload, *, rate, requests, **_):
        if ports == [failing_port] and rate == 4:
            raise RuntimeError("it died")
        record(rate)
        row = {"requests": requests, "rate": rate, "failed": 0, "completed": 1}
        return row | {"ttft_ms": {"p50": 1.0}, "itl_ms": {"p50": 1.0}}

    failing_port = None
    monkeypatch.setattr(bench, "running", running)
    monkeypatch.setattr(bench, "wait_for", lambda *_: None)
    monkeypatch.setattr(bench, "cache_info", lambda port: [port])
    monkeypatch.setattr(bench, "utilization", lambda _: 0.9)
    monkeypatch.setattr(bench, "page_faults", lambda _: 0)
    monkeypatch.setattr(bench, "preemptions", lambda _: len(calls.read_text()))  # any number that grows
    monkeypatch.setattr(bench_serve, "measured", measured)
    monkeypatch.setattr(bench, "SHAPES", {"llama3-8b": {}})
    (tmp_path / "tokenizer").mkdir()

    def run(*words, port_that_fails=None):
        nonlocal failing_port
        failing_port = port_that_fails
        monkeypatch.setattr(
            sys,
            "argv",
            [
                "throughput.py",
                f"--tokenizer={tmp_path}/tokenizer",
                f"--out={tmp_path}/out.json",
                "--workload=512/256",
                *words,
            ],
        )
        code = throughput.main()
        return code, json.loads((tmp_path / "out.json").read_text())["rows"], calls.read_text().splitlines()

    return run


AT_ONCE = ("--configuration=vllm-defaults", "--configuration=plan", "--at-once", "--rate=4", "--rate=12")


def test_configurations_at_once_have_their_own_gpus_and_run_together_simulated(throughputs):
    code, rows, calls = throughputs(*AT_ONCE)
    assert code == 0
    assert sorted((row["configuration"], row["kv_tokens"][0], row["rate"]) for row in rows) == [
        ("plan", 8100, 4.0), ("plan", 8100, 12.0), ("vllm-defaults", 8000, 4.0), ("vllm-defaults", 8000, 12.0),
    ]  # fmt: skip
    assert sorted(call.partition(":")[0] for call in calls[:2]) == ["8000 on GPU 0", "8100 on GPU 1"]
    assert calls[2:] == ["inf", "inf", "4.0", "4.0", "12.0", "12.0"]


def test_a_failed_configuration_ends_all_others_at_once_with_an_error_simulated(throughputs):
    code, rows, _ = throughputs(*AT_ONCE, port_that_fails=8100)
    assert code == 1
    assert {row["configuration"]: row["error"] for row in rows if "error" in row}.keys() == {"plan", "vllm-defaults"}
    assert not [row for row in rows if row.get("rate") == 12]


@pytest.mark.usefixtures("fake")
def test_all_servers_in_turns_on_two_gpus_get_the_flags_simulated(throughputs):
    code, rows, calls = throughputs(
        "--configuration=two-servers", "--configuration=plan-2", "--in-turns=2", "--rate=4", "--seconds=3",
        "--gpu-memory-utilization=0.45",
    )  # fmt: skip
    assert code == 0
    servers = [call for call in calls if " on GPU " in call]
    ports_and_gpus = [call.partition(":")[0] for call in servers]
    assert ports_and_gpus == ["8000 on GPU 0", "8010 on GPU 1", "8100 on GPU 0,1"]
    assert all(call.endswith(" --gpu-memory-utilization=0.45") for call in servers)
    assert [(row["configuration"], row["turns"], row["requests"]) for row in rows] == [
        ("two-servers", 2, 12), ("plan-2", 2, 12),
    ]  # fmt: skip


@pytest.mark.usefixtures("fake")
def test_also_starts_a_configuration_with_the_command_that_it_names_simulated(throughputs):
    code, rows, calls = throughputs("--also=a=plan --max-num-seqs=9", "--also=b=vllm", "--also=c=forked", "--rate=4")
    assert (code, [row["configuration"] for row in rows]) == (0, ["a", "b", "c"])
    a, b, c = (call.partition(": ")[2] for call in calls if " on GPU " in call)
    assert " -m vllm_launch serve " in a
    assert a.endswith(" --max-num-seqs=9")
    assert " -m vllm.entrypoints.openai.api_server " in b
    assert c.startswith("env VLLM_WORKER_MULTIPROC_METHOD=fork ")
    assert " -m vllm.entrypoints.cli.main serve " in c


@pytest.mark.parametrize("words", ["=plan", "plan=vllm"])
def test_also_needs_a_unique_name(throughputs, capsys, words):
    with pytest.raises(SystemExit):
        throughputs("--configuration=plan", f"--also={words}")
    assert capsys.readouterr().err.endswith(f"error: --also {words}: give it a name of its own\n")


@pytest.mark.usefixtures("fake")
def test_configurations_that_need_too_many_gpus_are_refused_simulated(throughputs, capsys, tmp_path):
    with pytest.raises(SystemExit):
        throughputs("--configuration=plan-4", "--configuration=plan", "--at-once")
    assert "plan-4, plan need 5 GPUs together, and here are 4: name fewer" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()  # an earlier result would not be overwritten


def test_a_failed_server_in_turns_gives_an_error_row_and_exit_code_1_simulated(throughputs):
    code, rows, _ = throughputs("--configuration=plan", "--in-turns=2", "--rate=4", port_that_fails=8000)
    assert (code, [row["error"] for row in rows]) == (1, ["it died"])


def test_all_requests_are_shared_among_the_load_processes():
    assert bench_serve.shared(6, 4) == [2, 2, 1, 1]
    assert bench_serve.shared(2, 4) == [1, 1, 0, 0]
    assert bench_serve.shared(8, 4) == [2, 2, 2, 2]
    assert bench_serve.shared(80, 8, 4) == [12, 12, 12, 12, 8, 8, 8, 8]
    assert bench_serve.shared(81, 8, 4) == [12, 12, 12, 12, 12, 8, 8, 8]


def test_a_killed_load_process_raises_an_error():
    class Silent(queue.Queue):
        def get(self, **_):
            raise queue.Empty

    with pytest.raises(RuntimeError, match="killed by signal 9"):
        bench_serve.next_of(Silent(), [argparse.Namespace(exitcode=None), argparse.Namespace(exitcode=-9)])


def test_a_second_start_needs_a_first_start(monkeypatch, tmp_path, capsys):
    words = [f"--tokenizer={tmp_path}", f"--kernels={tmp_path}", f"--out={tmp_path}/o", f"--only={start.SECOND}"]
    monkeypatch.setattr(sys, "argv", ["start.py", *words])
    with pytest.raises(SystemExit):
        start.main()
    assert "needs --only kernels, which fills its cache" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("words", ["x", "x=", "x=vlm --max-num-seqs=9"])
def test_also_without_a_valid_command_gives_one_line_and_exit_code_2(throughputs, capsys, words):
    with pytest.raises(SystemExit) as ended:
        throughputs(f"--also={words}")
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith(f"error: --also {words}: after NAME= comes one of plan, vllm, forked\n")


def test_a_busy_gpu_is_refused_simulated(fake):
    result.idle(0)
    fake._gpu(2)["mem_v2"]["used"] = 5 << 30
    with pytest.raises(SystemExit, match=r"GPU 2 holds 5120 MiB already"):
        result.idle(0)


def test_a_measurement_without_gpus_ignores_a_busy_gpu_simulated(fake, tmp_path):
    fake._gpu(2)["mem_v2"]["used"] = 5 << 30
    result.Result(tmp_path / "r.json", "scheduling", gpus=False)
    assert (tmp_path / "r.json").exists()
