"""Tests of the load in benchmarks/gpu, which comes from vLLM's own tool, on the real vLLM."""

import argparse
import asyncio
import functools
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks/gpu"))
import bench  # noqa: E402
import bench_serve  # noqa: E402
import edge  # noqa: E402
import throughput  # noqa: E402

from vllm_launch.plan import fit  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")  # torch and vLLM give warnings about their own code
SHORT = bench_serve.Workload(
    ("--dataset-name=random", "--random-input-len=16", "--random-output-len=8"), requests=0, rates=()
)


def test_two_client_processes_measure_one_server(serving, tiny_model, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", serving.key)  # vLLM's tool reads the key from there
    row = bench_serve.measured(
        Path(tiny_model), [serving.port], SHORT, requests=8, rate=float("inf"), clients=2, seed=1, name="tiny"
    )
    assert (row["completed"], row["failed"]) == (8, 0)
    assert row["input_tokens"] >= 8 * 16  # more, because the tool cannot make every length from single-byte tokens
    assert row["rate"] is None
    assert 0 < row["ttft_ms"]["p50"] <= row["ttft_ms"]["p99"]
    assert 0 < row["itl_ms"]["p50"] <= row["itl_ms"]["p99"]
    assert row["output_tok_s"] > 0


def test_a_row_counts_the_requests_that_were_sent_also_for_shared_prefixes(serving, tiny_model, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", serving.key)
    prefixes = bench_serve.Workload(
        ("--dataset-name=prefix_repetition", "--prefix-repetition-prefix-len=16", "--prefix-repetition-suffix-len=8",
         "--prefix-repetition-num-prefixes=4", "--prefix-repetition-output-len=4"),
        requests=0, rates=(), multiple=bench_serve.WORKLOADS["shared prefixes"].multiple,
    )  # fmt: skip
    row = bench_serve.measured(
        Path(tiny_model), [serving.port], prefixes, requests=6, rate=float("inf"), clients=1, seed=1, name="tiny"
    )
    assert row["requests"] == row["completed"] == 8


def test_a_load_that_fails_leaves_no_client_process(serving, tiny_model, monkeypatch):
    def killed(*_):
        raise RuntimeError("a load process was killed by signal 9")

    monkeypatch.setattr(bench_serve, "next_of", killed)
    with pytest.raises(RuntimeError, match="signal 9"):
        bench_serve.measured(Path(tiny_model), [serving.port], SHORT, requests=8, rate=0.1, clients=2, seed=1)
    assert not multiprocessing.active_children()


def test_the_worst_load_gets_complete_responses(serving, tiny_model, monkeypatch):
    monkeypatch.setattr(edge, "STREAMS", 9)
    monkeypatch.setattr(edge, "LONG_BEFORE", 2)
    monkeypatch.setattr(edge, "BURST", 6)
    vocabulary = json.loads((Path(tiny_model) / "config.json").read_text())["vocab_size"]
    load = edge.Load(serving.port, vocabulary, 100, model="tiny", key=serving.key)
    counts = asyncio.run(load.run(1))
    assert (counts["failed"], counts["late"], counts["why"]) == (0, 0, [])
    assert counts["done"] >= 2 + 6 + 9
    assert 1 <= counts["most_running"] <= 8  # max_num_seqs of this server


def test_preemptions_and_utilization_come_from_the_servers_metrics(serving):
    assert bench.preemptions(serving.port) >= 0  # both functions raise if the pinned vLLM lacks the metric
    assert 0.5 < bench.utilization(serving.port) <= 1


def test_a_server_that_rejects_all_requests_is_an_error(serving, tiny_model, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    with pytest.raises(RuntimeError, match=r"no request was answered: .*Unauthorized"):
        bench_serve.measured(
            Path(tiny_model), [serving.port], SHORT, requests=2, rate=float("inf"), clients=1, seed=2, name="tiny"
        )


def test_servers_are_measured_in_turns_and_rows_have_their_medians(serving, tiny_model, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", serving.key)
    monkeypatch.setitem(bench_serve.WORKLOADS, "512/256", SHORT)
    calls, real_measured = [], functools.partial(bench_serve.measured, name="tiny")

    def measured(model, ports, workload, **options):
        calls.append((ports[0], options["rate"], options["seed"]))
        return real_measured(model, [serving.port], workload, **options)

    def started(name, *_, place, **__):  # the same server under two names
        return throughput.Server([place], [os.getsid(0)], [], {"configuration": name, "gpus": 1})

    monkeypatch.setattr(bench_serve, "measured", measured)
    monkeypatch.setattr(throughput, "started", started)
    monkeypatch.setattr(throughput.bench, "preemptions", lambda _: 0)
    options = argparse.Namespace(
        in_turns=3, workload=["512/256"], rate=[8.0], saturation_only=False, share=1, seconds=1
    )
    rows = []
    chosen = dict.fromkeys(("defaults", "plan"), throughput.Configuration())
    throughput.in_turns(chosen, options, Path(tiny_model), lambda **row: rows.append(row), gpus=False)
    assert [(row["configuration"], row["turns"], row["completed"]) for row in rows] == [
        ("defaults", 3, 24), ("plan", 3, 24),
    ]  # fmt: skip
    assert [place for place, _, _ in calls[2:]] == [0, 1, 1, 0, 0, 1]  # the first two calls warm up the servers
    assert len({seed for _, _, seed in calls[2:]}) == 6  # no prompt is sent twice


def test_page_faults_are_summed_over_a_servers_processes():
    pages = 2000
    touch = f"""
import mmap, sys
for _ in sys.stdin:
    memory = mmap.mmap(-1, {pages} * mmap.PAGESIZE, mmap.MAP_PRIVATE)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    for page in range({pages}):
        memory[page * mmap.PAGESIZE] = 1
    print(flush=True)
"""
    child = [sys.executable, "-c", touch]
    server = [sys.executable, "-c", f"import subprocess; subprocess.run({child})"]
    with subprocess.Popen(server, stdin=PIPE, stdout=PIPE, text=True, start_new_session=True, bufsize=1) as process:

        def touched():
            process.stdin.write("again\n")
            process.stdout.readline()
            return bench.page_faults(process.pid)

        first = touched()
        assert pages <= touched() - first < pages * 1.1
        assert bench.page_faults(-1) == 0  # a session that does not exist
        process.stdin.close()


def test_a_row_of_turns_has_medians_and_the_sums_of_counts():
    def row(tokens, itl, preempted):
        return {
            "configuration": "plan", "seconds": 2.0, "output_tok_s": tokens, "ttft_ms": {"p50": itl, "p99": itl},
            "itl_ms": {"p50": itl, "p99": 9.0}, "completed": 5, "failed": 1, "preemptions": preempted, "watts": 100,
            "page_faults": 7 * preempted,
        }  # fmt: skip

    result = throughput.median([row(100.0, 2.0, 1), row(900.0, 9.0, 2), row(200.0, 3.0, 3)])
    assert (result["output_tok_s"], result["itl_ms"], result["ttft_ms"]["p50"]) == (
        200.0,
        {"p50": 3.0, "p99": 9.0},
        3.0,
    )
    assert (result["completed"], result["failed"], result["preemptions"], result["turns"]) == (15, 3, 2, 3)
    assert result["itl_range"] == "2.0-9.0"
    assert (result["watts"], result["page_faults"]) == (100, 14)
    assert "gpu_busy" not in result  # because no row has it


LOADS = ["4000/500, all at once", "4000/500, all at once, as in turns"]


@pytest.fixture(scope="module")
def scheduled(tmp_path_factory):
    """Return the rows of benchmarks/gpu/scheduling.py for LOADS. One process runs all, since importing vLLM takes 20 s."""
    out = tmp_path_factory.mktemp("scheduling") / "out.json"
    subprocess.run(
        [sys.executable, ROOT / "benchmarks/gpu/scheduling.py", *(f"--load={load}" for load in LOADS), f"--out={out}"],
        env=os.environ | {"VLLM_TARGET_DEVICE": "cpu"},
        check=True,
    )
    return json.loads(out.read_text())["rows"]


@pytest.mark.parametrize("load", LOADS)
def test_vllms_scheduler_still_gives_the_published_results(scheduled, load):
    published = json.loads((ROOT / "benchmarks/gpu/results/scheduling.json").read_text())["rows"]
    rows = [row for row in scheduled if row["load"] == load]
    assert rows == [row for row in published if row["load"] == load]
    assert [row["watermark"] for row in rows] == sorted({0.0, fit.WATERMARK} | {row["watermark"] for row in rows})
    default, planned = (next(row for row in rows if row["watermark"] == share) for share in (0.0, fit.WATERMARK))
    assert planned["preempted"] < default["preempted"]
    assert planned["ratio"] > 1
