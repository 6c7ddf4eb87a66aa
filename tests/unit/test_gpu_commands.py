"""The commands of benchmarks/gpu without a GPU: what they do if servers, NVML or the load tool work, and if they fail."""

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
def inspect_gpus(fake, monkeypatch, capsys):
    """Return a function that runs smoke.py's NVML steps and returns their printed lines, by step name."""
    monkeypatch.setattr(smoke, "failed", [])

    assert not fake.opened

    def run():
        smoke.inspect_gpus()
        return {line[5:38].strip(): line for line in capsys.readouterr().out.splitlines()}

    return run


def test_smoke_prints_an_ok_line_per_nvml_step_simulated(inspect_gpus):
    lines = inspect_gpus()
    assert list(lines) == ["GPUs (NVML)", "GPU fault reporting", "memory used by others"]
    assert all(line.startswith("ok   ") for line in lines.values())
    assert "3: NVIDIA H200, 139.8 GiB" in lines["GPUs (NVML)"]
    assert smoke.failed == []


def test_smoke_fails_a_lost_gpu_and_runs_the_other_steps_simulated(inspect_gpus, fake):
    fake.broken["handle", 1] = LOST
    lines = inspect_gpus()
    assert lines["GPUs (NVML)"].startswith("FAIL ")
    assert "lost" in lines["GPUs (NVML)"]
    assert len(lines) == 3
    assert smoke.failed[0] == "GPUs (NVML)"


def test_smoke_prints_the_memory_that_others_use_simulated(inspect_gpus, fake):
    fake._gpu(2)["mem_v2"]["used"] = 1200 << 20  # without the driver's own 615 MiB
    line = inspect_gpus()["memory used by others"]
    assert line.startswith("ok   ")  # the plan uses the free memory
    assert "; GPU 2: 1200 MiB; " in line


def test_smoke_fails_if_a_gpu_still_has_memory_in_use_after_a_drain_simulated(fake):
    before = dict.fromkeys(range(4), 100)
    smoke.wait_until_freed(before, seconds=0)
    fake._gpu(3)["mem_v2"]["used"] = 300 << 20  # a driver may keep some in use
    smoke.wait_until_freed(before, seconds=0)
    fake._gpu(3)["mem_v2"]["used"] = 400 << 20
    with pytest.raises(RuntimeError, match="GPU 3 still has 400 MiB in use, 100 MiB before the start"):
        smoke.wait_until_freed(before, seconds=0)


def test_smoke_without_a_gpu_prints_one_line_and_exits_with_2(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/gpu/smoke.py")], check=False, capture_output=True, text=True,
        cwd=tmp_path, env={"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{ROOT}/scripts:{ROOT}/healthcheck"},
    )  # fmt: skip
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("test-gpu: libnvidia-ml.so.1 is missing")


def test_gpu_load_is_the_median_of_nvmls_samples_simulated(fake, monkeypatch):
    assert not fake.opened
    utilizations = iter([0.1, *[0.9] * 1000])
    monkeypatch.setattr(
        nvml.Nvml, "load", lambda *_: gpu_facts.Load(utilization=next(utilizations), power=600.4, temperature=None)
    )
    with bench.sample_gpu_load([0, 1], every_s=0.001) as load:
        time.sleep(0.1)
        assert load == {}
    assert load == {"gpu_busy": 0.9, "watts": 600}


def test_gpu_load_is_empty_without_nvml_samples_simulated(fake):
    fake.broken["handle", 0] = LOST
    with bench.sample_gpu_load([0], every_s=0.001) as load:
        time.sleep(0.05)
    assert load == {}
    with bench.sample_gpu_load([]) as load:
        pass
    assert load == {}


def test_a_server_that_ends_raises_its_last_error_and_leaves_no_process(tmp_path):
    words = ["bash", "-c", "sleep 300 & echo ValueError: no room; exit 1"]
    with pytest.raises(bench.ServerFailedError, match="no room"), bench.start_server(words, tmp_path / "log", port=1):
        pass


def test_a_command_whose_server_ends_exits_with_one_line_that_names_the_log(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmarks/gpu/x.py"])
    log = tmp_path / "log"

    def command():
        with bench.start_server(["bash", "-c", "echo ValueError: no room; echo bye; exit 3"], log, port=1):
            return 0

    with pytest.raises(SystemExit) as ended:
        bench.run(command)
    assert ended.value.code == f"x.py: {log}: exit code 3: ValueError: no room"  # on stderr, and exit 1
    with pytest.raises(SystemExit) as ended:
        bench.run(lambda: 0)
    assert ended.value.code == 0


@pytest.mark.parametrize(
    ("plan", "hand", "tried", "highest"),
    [
        (True, True, [0.9545, 0.9768], 0.9768),
        (False, False, [0.925, 0.9225], None),
        (False, True, [0.925, 0.9275], 0.9275),
    ],
    ids=["all survive", "none survives", "the plan's dies"],
)
def test_the_edge_is_the_highest_utilization_that_survived_simulated(
    tmp_path, monkeypatch, plan, *, hand, tried, highest
):
    measured = []

    def measure_utilization(command, log, _options):
        utilization = next(
            (float(word.partition("=")[2]) for word in command if "gpu-memory-utilization" in word), None
        )
        log.parent.mkdir(exist_ok=True)
        log.write_text("--gpu-memory-utilization=" + ("0.91" if plan else "0.93"))
        measured.extend([utilization] if utilization else [])
        return {"survived": hand if utilization else plan}

    monkeypatch.setattr(edge, "measure_utilization", measure_utilization)
    (tmp_path / "tokenizer").mkdir()
    words = [f"--tokenizer={tmp_path}/tokenizer", f"--out={tmp_path}/out.json", "--tries=2"]
    monkeypatch.setattr(sys, "argv", ["edge.py", *words])
    assert edge.main() == int(not plan)
    assert measured == tried
    assert json.loads((tmp_path / "out.json").read_text())["highest_that_survived"] == highest


def test_a_port_that_another_program_serves_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "healthy", lambda _: True)
    with (
        pytest.raises(bench.ServerFailedError, match="another program already answers"),
        bench.start_server(["true"], tmp_path / "log", port=1),
    ):
        pass


def test_a_result_contains_no_absolute_path_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmarks/gpu/x.py", "--out", str(tmp_path / "r.json"), "--share", "0.5 of"])
    edges = result.Result(tmp_path / "r.json", "edge")
    edges.add(survived=True)
    written = json.loads((tmp_path / "r.json").read_text())
    assert written["provenance"]["command"] == "python benchmarks/gpu/x.py --out r.json --share '0.5 of'"
    assert written["rows"] == [{"survived": True}]


def test_provenance_names_the_caches_of_earlier_runs(tmp_path, monkeypatch):
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


def test_compare_returns_predicted_and_measured_terms():
    """vLLM's figures for Llama-3-8B on an H200. Only the context is rounded."""
    gib = 1 << 30
    rank = {
        "weights_bytes": 14.96 * gib, "total_consumed_bytes": 15.76 * gib, "activation_peak_bytes": 1.07 * gib,
        "cuda_graphs_estimate_bytes": 0.92 * gib, "init": {"total_memory": 139.8 * gib, "free_memory": 139.29 * gib},
    }  # fmt: skip
    row = {
        "config": bench.SHAPES["llama3-8b"], "kv_cache_tokens": 908_208, "ranks": [rank],
        "args": {**memory.SERVE, "tensor_parallel_size": 1},
    }  # fmt: skip
    comparison = memory.compare(row)
    assert abs(comparison["kv_error"]) < 0.005
    [terms] = comparison["parts_gib"]
    for term, near in {"weights": 0.05, "non_torch": 0.05, "cuda_graphs": 0.15, "context": 0.05}.items():
        planned, real = terms[term]
        assert planned == pytest.approx(real, abs=near), term
    assert memory.summary([row | comparison, {"error": "no"}]) == {
        "rows": 1, "mean_absolute_error": abs(comparison["kv_error"]), "worst": abs(comparison["kv_error"]),
    }  # fmt: skip


def test_parse_log_reads_both_graph_captures_of_a_real_log():
    (log,) = (ROOT / "tests/data/logs").glob("vllm-*-h100-start.log")
    figures = memory.parse_log(log.read_text())
    assert (figures["graphs_seen_gib"], figures["graph_capture_gib"], figures["graph_pool_gib"]) == (
        "0.61",
        "0.45",
        "0.45",
    )
    assert (figures["attention_backend"], figures["compile_s"], figures["compile_cache_hit"]) == (
        "FLASH_ATTN",
        "23.67",
        False,
    )


def test_percentiles_are_milliseconds_of_any_number_of_values():
    assert bench_serve.percentiles([0.002]) == {"p50": 2.0, "p99": 2.0}
    assert bench_serve.percentiles([0.001, 0.003]) == {"p50": 2.0, "p99": 2.98}
    assert bench_serve.percentiles([]) == {}


# ---- throughput, with servers and load simulated


@pytest.fixture
def throughputs(tmp_path, monkeypatch):
    """Return a function that runs throughput.py with ``words``.

    It returns the exit code, the rows, and one line for each started server and each load.
    """
    calls = tmp_path / "calls"

    def record(line):
        with calls.open("a") as file:
            file.write(f"{line}\n")

    @contextlib.contextmanager
    def start_process(command, *_, port, env):
        record(f"{port} on GPU {env.get('CUDA_VISIBLE_DEVICES')}: {' '.join(command)}")
        yield argparse.Namespace(pid=port)

    def measure(_model, ports, _workload, *, rate, requests, **_):
        if ports == [dies] and rate == 4:
            raise RuntimeError("it died")
        record(rate)
        row = {"requests": requests, "rate": rate, "failed": 0, "completed": 1}
        return row | {"ttft_ms": {"p50": 1.0}, "itl_ms": {"p50": 1.0}}

    dies = None
    monkeypatch.setattr(bench, "start_process", start_process)
    monkeypatch.setattr(bench, "wait_for", lambda *_: None)
    monkeypatch.setattr(bench, "kv_cache_tokens", lambda port: [port])
    monkeypatch.setattr(bench, "utilization", lambda _: 0.9)
    monkeypatch.setattr(bench, "page_faults", lambda _: 0)
    monkeypatch.setattr(bench, "preemptions", lambda _: len(calls.read_text()))  # a number that grows
    monkeypatch.setattr(bench_serve, "measure", measure)
    monkeypatch.setattr(bench, "SHAPES", {"llama3-8b": {}})
    (tmp_path / "tokenizer").mkdir()

    def run(*words, one_that_dies=None):
        nonlocal dies
        dies = one_that_dies
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


BESIDE = ("--configuration=vllm-defaults", "--configuration=plan", "--at-once", "--rate=4", "--rate=12")


def test_configurations_at_once_have_their_own_gpus_and_are_measured_together_simulated(throughputs):
    code, rows, calls = throughputs(*BESIDE)
    assert code == 0
    assert sorted((row["configuration"], row["kv_tokens"][0], row["rate"]) for row in rows) == [
        ("plan", 8100, 4.0), ("plan", 8100, 12.0), ("vllm-defaults", 8000, 4.0), ("vllm-defaults", 8000, 12.0),
    ]  # fmt: skip
    assert sorted(call.partition(":")[0] for call in calls[:2]) == ["8000 on GPU 0", "8100 on GPU 1"]
    assert calls[2:] == ["inf", "inf", "4.0", "4.0", "12.0", "12.0"]


def test_a_configuration_that_dies_ends_the_others_and_all_rows_have_an_error_simulated(throughputs):
    code, rows, _ = throughputs(*BESIDE, one_that_dies=8100)
    assert code == 1
    assert {row["configuration"]: row["error"] for row in rows if "error" in row}.keys() == {"plan", "vllm-defaults"}
    assert not [row for row in rows if row.get("rate") == 12]


@pytest.mark.usefixtures("fake")
def test_all_servers_in_turns_get_the_flags_simulated(throughputs):
    code, rows, calls = throughputs(
        "--configuration=two-servers", "--configuration=plan-2", "--in-turns=2", "--rate=4", "--seconds=3",
        "--gpu-memory-utilization=0.45",
    )  # fmt: skip
    assert code == 0
    servers = [call for call in calls if " on GPU " in call]
    places = [call.partition(":")[0] for call in servers]
    assert places == ["8000 on GPU 0", "8010 on GPU 1", "8100 on GPU 0,1"]
    assert all(call.endswith(" --gpu-memory-utilization=0.45") for call in servers)
    assert [(row["configuration"], row["turns"], row["requests"]) for row in rows] == [
        ("two-servers", 2, 12), ("plan-2", 2, 12),
    ]  # fmt: skip


@pytest.mark.usefixtures("fake")
def test_also_starts_the_command_that_it_names_simulated(throughputs):
    code, rows, calls = throughputs("--also=a=plan --max-num-seqs=9", "--also=b=vllm", "--also=c=forked", "--rate=4")
    assert (code, [row["configuration"] for row in rows]) == (0, ["a", "b", "c"])
    a, b, c = (call.partition(": ")[2] for call in calls if " on GPU " in call)
    assert " -m vllm_launch serve " in a
    assert a.endswith(" --max-num-seqs=9")
    assert " -m vllm.entrypoints.openai.api_server " in b
    assert c.startswith("env VLLM_WORKER_MULTIPROC_METHOD=fork ")
    assert " -m vllm.entrypoints.cli.main serve " in c


@pytest.mark.parametrize("words", ["=plan", "plan=vllm"])
def test_also_refuses_an_empty_or_used_name(throughputs, capsys, words):
    with pytest.raises(SystemExit):
        throughputs("--configuration=plan", f"--also={words}")
    assert capsys.readouterr().err.endswith(
        f"error: --also {words}: the name is empty or already used: choose another\n"
    )


@pytest.mark.usefixtures("fake")
def test_at_once_refuses_more_gpus_than_the_machine_has_simulated(throughputs, capsys, tmp_path):
    with pytest.raises(SystemExit):
        throughputs("--configuration=plan-4", "--configuration=plan", "--at-once")
    assert "plan-4, plan need 5 GPUs together, and this machine has 4: choose fewer" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()  # so an earlier result file is not overwritten


def test_a_server_that_dies_in_turns_gives_an_error_row_simulated(throughputs):
    code, rows, _ = throughputs("--configuration=plan", "--in-turns=2", "--rate=4", one_that_dies=8000)
    assert (code, [row["error"] for row in rows]) == (1, ["it died"])


def test_split_requests_assigns_every_request():
    assert bench_serve.split_requests(6, 4) == [2, 2, 1, 1]
    assert bench_serve.split_requests(2, 4) == [1, 1, 0, 0]
    assert bench_serve.split_requests(8, 4) == [2, 2, 2, 2]
    assert bench_serve.split_requests(80, 8, 4) == [12, 12, 12, 12, 8, 8, 8, 8]
    assert bench_serve.split_requests(81, 8, 4) == [12, 12, 12, 12, 12, 8, 8, 8]


def test_a_killed_load_process_raises_an_error():
    class Silent(queue.Queue):
        def get(self, **_):
            raise queue.Empty

    with pytest.raises(RuntimeError, match="killed by signal 9"):
        bench_serve.next_result(Silent(), [argparse.Namespace(exitcode=None), argparse.Namespace(exitcode=-9)])


def test_a_second_start_needs_the_first_start(monkeypatch, tmp_path, capsys):
    words = [f"--tokenizer={tmp_path}", f"--kernels={tmp_path}", f"--out={tmp_path}/o", f"--only={start.SECOND}"]
    monkeypatch.setattr(sys, "argv", ["start.py", *words])
    with pytest.raises(SystemExit):
        start.main()
    assert "needs --only kernels, which fills its cache" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("words", ["x", "x=", "x=vlm --max-num-seqs=9"])
def test_also_without_a_known_command_is_one_line_and_exit_2(throughputs, capsys, words):
    with pytest.raises(SystemExit) as ended:
        throughputs(f"--also={words}")
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith(f"error: --also {words}: after NAME= comes one of plan, vllm, forked\n")


def test_a_measurement_refuses_a_gpu_in_use_simulated(fake):
    result.wait_until_idle(0)
    fake._gpu(2)["mem_v2"]["used"] = 5 << 30
    with pytest.raises(SystemExit, match=r"GPU 2 has 5120 MiB in use"):
        result.wait_until_idle(0)


def test_a_measurement_without_gpus_ignores_a_busy_gpu_simulated(fake, tmp_path):
    fake._gpu(2)["mem_v2"]["used"] = 5 << 30
    result.Result(tmp_path / "r.json", "scheduling", gpus=False)
    assert (tmp_path / "r.json").exists()
