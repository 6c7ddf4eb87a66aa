"""The commands of benchmarks/gpu as far as they need no GPU: what they call works, and what they do where it does not."""

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
def told(fake, monkeypatch, capsys):
    """Lines that the smoke test's look prints, by what they are about."""
    monkeypatch.setattr(smoke, "failed", [])

    assert not fake.opened

    def look():
        smoke.inspect_gpus()
        return {line[5:38].strip(): line for line in capsys.readouterr().out.splitlines()}

    return look


def test_a_machine_that_is_well_is_told_line_by_line_simulated(told):
    lines = told()
    assert list(lines) == ["GPUs (NVML)", "faults can be seen", "memory that others hold"]
    assert all(line.startswith("ok   ") for line in lines.values())
    assert "3: NVIDIA H200, 139.8 GiB" in lines["GPUs (NVML)"]
    assert smoke.failed == []


def test_a_lost_gpu_fails_and_the_rest_is_tried_simulated(told, fake):
    fake.broken["handle", 1] = LOST
    lines = told()
    assert lines["GPUs (NVML)"].startswith("FAIL ")
    assert "lost" in lines["GPUs (NVML)"]
    assert len(lines) == 3
    assert smoke.failed[0] == "GPUs (NVML)"


def test_a_gpu_that_others_use_is_told_simulated(told, fake):
    fake._gpu(2)["mem_v2"]["used"] = 1200 << 20  # the driver's own 615 MiB are not among them
    line = told()["memory that others hold"]
    assert line.startswith("ok   ")  # the plan takes what is left
    assert "; GPU 2: 1200 MiB; " in line


def test_a_gpu_that_still_holds_memory_after_a_drain_is_a_failure_simulated(fake):
    before = dict.fromkeys(range(4), 100)
    smoke.wait_until_freed(before, seconds=0)
    fake._gpu(3)["mem_v2"]["used"] = 300 << 20  # a driver keeps some
    smoke.wait_until_freed(before, seconds=0)
    fake._gpu(3)["mem_v2"]["used"] = 400 << 20
    with pytest.raises(RuntimeError, match="GPU 3 still holds 400 MiB, 100 before"):
        smoke.wait_until_freed(before, seconds=0)


def test_without_a_gpu_it_is_one_line_and_exit_2(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/gpu/smoke.py")], check=False, capture_output=True, text=True,
        cwd=tmp_path, env={"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{ROOT}/scripts:{ROOT}/healthcheck"},
    )  # fmt: skip
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("test-gpu: libnvidia-ml.so.1 is not here")


def test_a_load_is_told_by_the_medians_of_what_nvml_saw_simulated(fake, monkeypatch):
    assert not fake.opened
    seen = iter([0.1, *[0.9] * 1000])
    monkeypatch.setattr(
        nvml.Nvml, "load", lambda *_: gpu_facts.Load(utilization=next(seen), power=600.4, temperature=None)
    )
    with bench.sample_gpu_load([0, 1], every_s=0.001) as told:
        time.sleep(0.1)
        assert told == {}
    assert told == {"gpu_busy": 0.9, "watts": 600}


def test_a_load_that_nvml_does_not_see_is_told_without_it_simulated(fake):
    fake.broken["handle", 0] = LOST
    with bench.sample_gpu_load([0], every_s=0.001) as told:
        time.sleep(0.05)
    assert told == {}
    with bench.sample_gpu_load([]) as told:
        pass
    assert told == {}


def test_a_server_that_ends_is_told_with_its_last_words_and_nothing_of_it_is_left(tmp_path):
    words = ["bash", "-c", "sleep 300 & echo ValueError: no room; exit 1"]
    with pytest.raises(bench.ServerFailedError, match="no room"), bench.start_server(words, tmp_path / "log", port=1):
        pass


def test_a_command_that_a_server_fails_is_one_line_and_exit_1_and_says_where_the_log_is(tmp_path, monkeypatch):
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
def test_the_edge_is_the_highest_that_survived_simulated(tmp_path, monkeypatch, plan, *, hand, tried, highest):
    asked = []

    def measure_utilization(command, log, _options):
        at = next((float(word.partition("=")[2]) for word in command if "gpu-memory-utilization" in word), None)
        log.parent.mkdir(exist_ok=True)
        log.write_text("--gpu-memory-utilization=" + ("0.91" if plan else "0.93"))
        asked.extend([at] if at else [])
        return {"survived": hand if at else plan}

    monkeypatch.setattr(edge, "measure_utilization", measure_utilization)
    (tmp_path / "tokenizer").mkdir()
    words = [f"--tokenizer={tmp_path}/tokenizer", f"--out={tmp_path}/out.json", "--tries=2"]
    monkeypatch.setattr(sys, "argv", ["edge.py", *words])
    assert edge.main() == int(not plan)
    assert asked == tried
    assert json.loads((tmp_path / "out.json").read_text())["highest_that_survived"] == highest


def test_a_port_that_something_else_serves_is_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "healthy", lambda _: True)
    with (
        pytest.raises(bench.ServerFailedError, match="another program already answers"),
        bench.start_server(["true"], tmp_path / "log", port=1),
    ):
        pass


def test_no_path_of_this_machine_gets_into_a_result(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmarks/gpu/x.py", "--out", str(tmp_path / "r.json"), "--share", "0.5 of"])
    edges = result.Result(tmp_path / "r.json", "edge")
    edges.add(survived=True)
    written = json.loads((tmp_path / "r.json").read_text())
    assert written["provenance"]["command"] == "python benchmarks/gpu/x.py --out r.json --share '0.5 of'"
    assert written["rows"] == [{"survived": True}]


def test_what_earlier_runs_left_in_the_caches_is_looked_up(tmp_path, monkeypatch):
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


def test_a_row_says_each_term_of_the_plan_beside_what_vllm_found():
    """Figures as vLLM gave them for Llama-3-8B on an H200, but for the context, which is rounded."""
    gib = 1 << 30
    rank = {
        "weights_bytes": 14.96 * gib, "total_consumed_bytes": 15.76 * gib, "activation_peak_bytes": 1.07 * gib,
        "cuda_graphs_estimate_bytes": 0.92 * gib, "init": {"total_memory": 139.8 * gib, "free_memory": 139.29 * gib},
    }  # fmt: skip
    row = {
        "config": bench.SHAPES["llama3-8b"], "kv_cache_tokens": 908_208, "ranks": [rank],
        "args": {**memory.SERVE, "tensor_parallel_size": 1},
    }  # fmt: skip
    told = memory.compare(row)
    assert abs(told["kv_error"]) < 0.005
    [terms] = told["parts_gib"]
    for term, near in {"weights": 0.05, "non_torch": 0.05, "cuda_graphs": 0.15, "context": 0.05}.items():
        planned, real = terms[term]
        assert planned == pytest.approx(real, abs=near), term
    assert memory.summary([row | told, {"error": "no"}]) == {
        "rows": 1, "mean_absolute_error": abs(told["kv_error"]), "worst": abs(told["kv_error"]),
    }  # fmt: skip


def test_what_a_real_log_says_of_graphs_is_told_of_both_captures():
    (log,) = (ROOT / "tests/data/logs").glob("vllm-*-h100-start.log")
    told = memory.parse_log(log.read_text())
    assert (told["graphs_seen_gib"], told["graph_capture_gib"], told["graph_pool_gib"]) == ("0.61", "0.45", "0.45")
    assert (told["attention_backend"], told["compile_s"], told["compile_cache_hit"]) == ("FLASH_ATTN", "23.67", False)


def test_percentiles_are_milliseconds_of_however_few():
    assert bench_serve.percentiles([0.002]) == {"p50": 2.0, "p99": 2.0}
    assert bench_serve.percentiles([0.001, 0.003]) == {"p50": 2.0, "p99": 2.98}
    assert bench_serve.percentiles([]) == {}


# ---- throughput, with servers and load simulated


@pytest.fixture
def throughputs(tmp_path, monkeypatch):
    """Runs the command with ``words``; how it ended, its rows, and which servers and loads there were, a line each."""
    calls = tmp_path / "calls"

    def told(line):
        with calls.open("a") as file:
            file.write(f"{line}\n")

    @contextlib.contextmanager
    def start_process(command, *_, port, env):
        told(f"{port} on GPU {env.get('CUDA_VISIBLE_DEVICES')}: {' '.join(command)}")
        yield argparse.Namespace(pid=port)

    def measure(_model, ports, _workload, *, rate, requests, **_):
        if ports == [dies] and rate == 4:
            raise RuntimeError("it died")
        told(rate)
        row = {"requests": requests, "rate": rate, "failed": 0, "completed": 1}
        return row | {"ttft_ms": {"p50": 1.0}, "itl_ms": {"p50": 1.0}}

    dies = None
    monkeypatch.setattr(bench, "start_process", start_process)
    monkeypatch.setattr(bench, "wait_for", lambda *_: None)
    monkeypatch.setattr(bench, "kv_cache_tokens", lambda port: [port])
    monkeypatch.setattr(bench, "utilization", lambda _: 0.9)
    monkeypatch.setattr(bench, "page_faults", lambda _: 0)
    monkeypatch.setattr(bench, "preemptions", lambda _: len(calls.read_text()))  # something that grows
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


def test_configurations_beside_each_other_have_their_own_gpus_and_are_measured_together_simulated(throughputs):
    code, rows, calls = throughputs(*BESIDE)
    assert code == 0
    assert sorted((row["configuration"], row["kv_tokens"][0], row["rate"]) for row in rows) == [
        ("plan", 8100, 4.0), ("plan", 8100, 12.0), ("vllm-defaults", 8000, 4.0), ("vllm-defaults", 8000, 12.0),
    ]  # fmt: skip
    assert sorted(call.partition(":")[0] for call in calls[:2]) == ["8000 on GPU 0", "8100 on GPU 1"]
    assert calls[2:] == ["inf", "inf", "4.0", "4.0", "12.0", "12.0"]


def test_one_that_dies_ends_those_beside_it_and_all_say_so_simulated(throughputs):
    code, rows, _ = throughputs(*BESIDE, one_that_dies=8100)
    assert code == 1
    assert {row["configuration"]: row["error"] for row in rows if "error" in row}.keys() == {"plan", "vllm-defaults"}
    assert not [row for row in rows if row.get("rate") == 12]


@pytest.mark.usefixtures("fake")
def test_servers_of_two_gpus_in_turns_are_all_given_the_flags_simulated(throughputs):
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
def test_another_configuration_is_started_by_the_command_it_names_simulated(throughputs):
    code, rows, calls = throughputs("--also=a=plan --max-num-seqs=9", "--also=b=vllm", "--also=c=forked", "--rate=4")
    assert (code, [row["configuration"] for row in rows]) == (0, ["a", "b", "c"])
    a, b, c = (call.partition(": ")[2] for call in calls if " on GPU " in call)
    assert " -m vllm_launch serve " in a
    assert a.endswith(" --max-num-seqs=9")
    assert " -m vllm.entrypoints.openai.api_server " in b
    assert c.startswith("env VLLM_WORKER_MULTIPROC_METHOD=fork ")
    assert " -m vllm.entrypoints.cli.main serve " in c


@pytest.mark.parametrize("words", ["=plan", "plan=vllm"])
def test_another_configuration_has_a_name_of_its_own(throughputs, capsys, words):
    with pytest.raises(SystemExit):
        throughputs("--configuration=plan", f"--also={words}")
    assert capsys.readouterr().err.endswith(
        f"error: --also {words}: the name is empty or already used: choose another\n"
    )


@pytest.mark.usefixtures("fake")
def test_more_gpus_than_there_are_are_not_asked_for_simulated(throughputs, capsys, tmp_path):
    with pytest.raises(SystemExit):
        throughputs("--configuration=plan-4", "--configuration=plan", "--at-once")
    assert (
        "plan-4, plan need 5 GPUs together, and this machine has 4: choose fewer"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "out.json").exists()  # an earlier result would still be there


def test_a_server_that_dies_in_turns_is_told_and_fails_simulated(throughputs):
    code, rows, _ = throughputs("--configuration=plan", "--in-turns=2", "--rate=4", one_that_dies=8000)
    assert (code, [row["error"] for row in rows]) == (1, ["it died"])


def test_every_request_is_sent_by_somebody():
    assert bench_serve.split_requests(6, 4) == [2, 2, 1, 1]
    assert bench_serve.split_requests(2, 4) == [1, 1, 0, 0]
    assert bench_serve.split_requests(8, 4) == [2, 2, 2, 2]
    assert bench_serve.split_requests(80, 8, 4) == [12, 12, 12, 12, 8, 8, 8, 8]
    assert bench_serve.split_requests(81, 8, 4) == [12, 12, 12, 12, 12, 8, 8, 8]


def test_a_load_process_that_is_killed_is_told():
    class Silent(queue.Queue):
        def get(self, **_):
            raise queue.Empty

    with pytest.raises(RuntimeError, match="killed by signal 9"):
        bench_serve.next_result(Silent(), [argparse.Namespace(exitcode=None), argparse.Namespace(exitcode=-9)])


def test_a_second_start_needs_a_first(monkeypatch, tmp_path, capsys):
    words = [f"--tokenizer={tmp_path}", f"--kernels={tmp_path}", f"--out={tmp_path}/o", f"--only={start.SECOND}"]
    monkeypatch.setattr(sys, "argv", ["start.py", *words])
    with pytest.raises(SystemExit):
        start.main()
    assert "needs --only kernels, which fills its cache" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("words", ["x", "x=", "x=vlm --max-num-seqs=9"])
def test_another_configuration_of_no_command_is_one_line_and_exit_2(throughputs, capsys, words):
    with pytest.raises(SystemExit) as ended:
        throughputs(f"--also={words}")
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith(f"error: --also {words}: after NAME= comes one of plan, vllm, forked\n")


def test_nothing_is_measured_on_a_gpu_that_is_in_use_simulated(fake):
    result.wait_until_idle(0)
    fake._gpu(2)["mem_v2"]["used"] = 5 << 30
    with pytest.raises(SystemExit, match=r"GPU 2 has 5120 MiB in use"):
        result.wait_until_idle(0)


def test_what_needs_no_gpu_is_measured_beside_a_busy_one_simulated(fake, tmp_path):
    fake._gpu(2)["mem_v2"]["used"] = 5 << 30
    result.Result(tmp_path / "r.json", "scheduling", gpus=False)
    assert (tmp_path / "r.json").exists()
