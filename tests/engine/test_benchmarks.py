"""The load of benchmarks/gpu, which is vLLM's own tool, on the real engine."""

import asyncio
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks/gpu"))
import bench  # noqa: E402
import edge  # noqa: E402
import throughput  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")  # torch and vLLM warn about themselves
SHORT = throughput.Workload(
    ("--dataset-name=random", "--random-input-len=16", "--random-output-len=8"), requests=0, rates=()
)


def test_processes_that_begin_together_measure_one_server(serving, tiny_model, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", serving.key)  # as vLLM's tool takes it
    found = throughput.measured(
        Path(tiny_model), [serving.port], SHORT, requests=8, rate=float("inf"), clients=2, seed=1, name="tiny"
    )
    assert (found["completed"], found["failed"]) == (8, 0)
    assert found["input_tokens"] >= 8 * 16  # of single bytes not every length can be made
    assert found["rate"] is None
    assert 0 < found["ttft_ms"]["p50"] <= found["ttft_ms"]["p99"]
    assert 0 < found["itl_ms"]["p50"] <= found["itl_ms"]["p99"]
    assert found["output_tok_s"] > 0


def test_the_worst_load_is_answered_whole(serving, tiny_model, monkeypatch):
    monkeypatch.setattr(edge, "STREAMS", 9)
    monkeypatch.setattr(edge, "LONG_BEFORE", 2)
    monkeypatch.setattr(edge, "BURST", 6)
    vocabulary = json.loads((Path(tiny_model) / "config.json").read_text())["vocab_size"]
    load = edge.Load(serving.port, vocabulary, 100, model="tiny", key=serving.key)
    told = asyncio.run(load.run(1))
    assert (told["failed"], told["late"], told["why"]) == (0, 0, [])
    assert told["done"] >= 2 + 6 + 9
    assert 1 <= told["most_running"] <= 8  # as many as this server takes


def test_preemptions_are_read_of_every_engine(serving):
    assert bench.preemptions(serving.port) >= 0  # it raises where the pinned vLLM has no such metric


def test_a_server_that_answers_nothing_is_no_measurement(serving, tiny_model, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    with pytest.raises(RuntimeError, match=r"no request was answered: .*Unauthorized"):
        throughput.measured(
            Path(tiny_model), [serving.port], SHORT, requests=2, rate=float("inf"), clients=1, seed=2, name="tiny"
        )
