"""Compare the computed sizes with vLLM's measurements on real GPUs, row by row."""

import statistics
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "benchmarks/gpu"))
from predicted import measured, predicted  # noqa: E402 - the same function as in the measurements

GIB = 1 << 30
ROWS = measured()


def error(row):
    """Return the relative error of the KV tokens, as a share of vLLM's."""
    return predicted(row)[1].tokens / row["kv_cache_tokens"] - 1


@pytest.mark.parametrize("name", ROWS)
def test_kv_tokens_are_within_two_per_cent_of_vllms(name):
    assert abs(error(ROWS[name])) <= 0.02


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if "ranks" in row])
def test_weights_non_torch_and_activations_are_within_a_quarter_of_a_gib(name):
    ranks_per_stage = len(ROWS[name]["ranks"]) // len(predicted(ROWS[name])[0])
    for number, memory in enumerate(predicted(ROWS[name])[0]):
        measured_rank = ROWS[name]["ranks"][number * ranks_per_stage]
        measured_bytes = measured_rank["total_consumed_bytes"] + measured_rank["activation_peak_bytes"]
        assert memory.weights + memory.non_torch + memory.activation_peak == pytest.approx(measured_bytes, abs=GIB / 4)


def test_kv_tokens_are_within_two_thousandths_on_average():
    assert statistics.mean(abs(error(row)) for row in ROWS.values()) <= 0.002


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if "weights_gib" in row])
def test_weights_are_within_one_per_cent_of_vllms(name):
    ranks, _ = predicted(ROWS[name])
    assert max(rank.weights for rank in ranks) / GIB == pytest.approx(ROWS[name]["weights_gib"], rel=0.01)


def test_the_rows_cover_every_kind_of_cache():
    assert len(ROWS) >= 19
    shapes = {row["config"]["model_type"] for row in ROWS.values()}
    assert shapes >= {"llama", "qwen2", "qwen3_moe", "gpt_oss", "deepseek_v2", "gemma3_text", "granitemoehybrid"}
