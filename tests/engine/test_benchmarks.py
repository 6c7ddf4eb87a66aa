"""The load of benchmarks/gpu, vLLM's own load tool, against the real engine."""

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

pytestmark = pytest.mark.filterwarnings("default")  # torch and vLLM warn about themselves
SHORT = bench_serve.Workload(
    ("--dataset-name=random", "--random-input-len=16", "--random-output-len=8"), requests=0, rates=()
)


def test_two_load_processes_measure_one_server(serving, tiny_model, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", serving.key)  # vLLM's load tool reads the key from here
    found = bench_serve.measure(
        Path(tiny_model), [serving.port], SHORT, requests=8, rate=float("inf"), clients=2, seed=1, name="tiny"
    )
    assert (found["completed"], found["failed"]) == (8, 0)
    assert found["input_tokens"] >= 8 * 16  # with this tokenizer not every prompt length is possible
    assert found["rate"] is None
    assert 0 < found["ttft_ms"]["p50"] <= found["ttft_ms"]["p99"]
    assert 0 < found["itl_ms"]["p50"] <= found["itl_ms"]["p99"]
    assert found["output_tok_s"] > 0


def test_every_request_of_a_row_is_sent_with_shared_prefixes_too(serving, tiny_model, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", serving.key)
    prefixes = bench_serve.Workload(
        ("--dataset-name=prefix_repetition", "--prefix-repetition-prefix-len=16", "--prefix-repetition-suffix-len=8",
         "--prefix-repetition-num-prefixes=4", "--prefix-repetition-output-len=4"),
        requests=0, rates=(), multiple=bench_serve.WORKLOADS["shared prefixes"].multiple,
    )  # fmt: skip
    found = bench_serve.measure(
        Path(tiny_model), [serving.port], prefixes, requests=6, rate=float("inf"), clients=1, seed=1, name="tiny"
    )
    assert found["requests"] == found["completed"] == 8


def test_a_failed_load_leaves_no_load_process(serving, tiny_model, monkeypatch):
    def killed(*_):
        raise RuntimeError("a load process was killed by signal 9")

    monkeypatch.setattr(bench_serve, "next_result", killed)
    with pytest.raises(RuntimeError, match="signal 9"):
        bench_serve.measure(Path(tiny_model), [serving.port], SHORT, requests=8, rate=0.1, clients=2, seed=1)
    assert not multiprocessing.active_children()


def test_the_server_answers_the_whole_worst_load(serving, tiny_model, monkeypatch):
    monkeypatch.setattr(edge, "STREAMS", 9)
    monkeypatch.setattr(edge, "LONG_BEFORE", 2)
    monkeypatch.setattr(edge, "BURST", 6)
    vocabulary = json.loads((Path(tiny_model) / "config.json").read_text())["vocab_size"]
    load = edge.Load(serving.port, vocabulary, 100, model="tiny", key=serving.key)

    async def until_enough_are_answered():
        running = asyncio.create_task(load.run(3600))
        while load.counts["done"] < 2 + 6 + 9 and not (load.counts["failed"] or load.counts["late"]):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        running.cancel()

    asyncio.run(until_enough_are_answered())
    assert (load.counts["failed"], load.counts["late"], load.counts["why"]) == (0, 0, [])
    assert 1 <= load.counts["most_running"] <= 8  # this server's max_num_seqs


def test_preemptions_and_utilization_come_from_the_servers_metrics(serving):
    assert bench.preemptions(serving.port) >= 0  # both raise if the pinned vLLM has no such metric
    assert 0.5 < bench.utilization(serving.port) <= 1


def test_a_server_that_answers_no_request_is_an_error(serving, tiny_model, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    with pytest.raises(RuntimeError, match=r"no request got an answer: .*Unauthorized"):
        bench_serve.measure(
            Path(tiny_model), [serving.port], SHORT, requests=2, rate=float("inf"), clients=1, seed=2, name="tiny"
        )


def test_in_turns_alternates_the_servers_and_adds_rows_of_medians(serving, tiny_model, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", serving.key)
    monkeypatch.setitem(bench_serve.WORKLOADS, "512/256", SHORT)
    loads, measure_tiny = [], functools.partial(bench_serve.measure, name="tiny")

    def measure(model, ports, workload, **arguments):
        loads.append((ports[0], arguments["rate"], arguments["seed"]))
        return measure_tiny(model, [serving.port], workload, **arguments)

    def start_servers(name, *_, port_offset, **__):  # the same server under two names
        return throughput.Server([port_offset], [os.getsid(0)], [], {"configuration": name, "gpus": 1})

    monkeypatch.setattr(bench_serve, "measure", measure)
    monkeypatch.setattr(throughput, "start_servers", start_servers)
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
    assert [port for port, _, _ in loads[2:]] == [0, 1, 1, 0, 0, 1]  # the first two are the warm-up
    assert len({seed for _, _, seed in loads[2:]}) == 6  # no prompt twice


def test_page_faults_are_those_of_a_servers_processes():
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
        assert bench.page_faults(-1) == 0  # no session has this id
        process.stdin.close()


def test_median_returns_medians_and_sums_the_failures():
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
    assert "gpu_busy" not in result  # no row has it


LOADS = ["4000/500, all at once", "4000/500, all at once, as in turns"]


@pytest.fixture(scope="module")
def scheduled(tmp_path_factory):
    """Return the rows of scheduling.py for LOADS. One process computes them all, because importing vLLM takes 20 s."""
    out = tmp_path_factory.mktemp("scheduling") / "out.json"
    subprocess.run(
        [sys.executable, ROOT / "benchmarks/gpu/scheduling.py", *(f"--load={load}" for load in LOADS), f"--out={out}"],
        env=os.environ | {"VLLM_TARGET_DEVICE": "cpu"},
        check=True,
    )
    return json.loads(out.read_text())["rows"]


@pytest.mark.parametrize("load", LOADS)
def test_vllms_scheduler_gives_the_published_rows(scheduled, load):
    published = json.loads((ROOT / "benchmarks/gpu/results/scheduling.json").read_text())["rows"]
    rows = [row for row in scheduled if row["load"] == load]
    assert rows == [row for row in published if row["load"] == load]
    assert [row["watermark"] for row in rows] == sorted({0.0, fit.WATERMARK} | {row["watermark"] for row in rows})
    plain, planned = (next(row for row in rows if row["watermark"] == share) for share in (0.0, fit.WATERMARK))
    assert planned["preempted"] < plain["preempted"]
    assert planned["ratio"] > 1
