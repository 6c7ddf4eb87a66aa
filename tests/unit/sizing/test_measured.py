"""The planner's physics against what vLLM measured on real GPUs, row by row."""

import statistics
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "benchmarks/gpu"))
from predicted import measured, predicted  # noqa: E402 - the same call as that of those who measure

GIB = 1 << 30
ROWS = measured()


def error(row):
    """Of KV tokens, as a share of what vLLM found."""
    return predicted(row)[1].tokens / row["kv_cache_tokens"] - 1


@pytest.mark.parametrize("name", ROWS)
def test_kv_tokens_are_within_two_per_cent_of_what_vllm_found(name):
    assert abs(error(ROWS[name])) <= 0.02


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if "ranks" in row])
def test_all_that_is_no_guess_of_vllms_is_within_a_quarter_of_a_gib(name):
    each = len(ROWS[name]["ranks"]) // len(predicted(ROWS[name])[0])
    for number, memory in enumerate(predicted(ROWS[name])[0]):
        real = ROWS[name]["ranks"][number * each]
        taken = real["total_consumed_bytes"] + real["activation_peak_bytes"]
        assert memory.weights + memory.non_torch + memory.activation_peak == pytest.approx(taken, abs=GIB / 4)


def test_kv_tokens_are_within_two_thousandths_on_average():
    assert statistics.mean(abs(error(row)) for row in ROWS.values()) <= 0.002


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if "weights_gib" in row])
def test_weights_are_within_one_per_cent_of_what_vllm_loaded(name):
    ranks, _ = predicted(ROWS[name])
    assert max(rank.weights for rank in ranks) / GIB == pytest.approx(ROWS[name]["weights_gib"], rel=0.01)


def test_there_are_rows_of_every_kind_of_cache():
    assert len(ROWS) >= 19
    shapes = {row["config"]["model_type"] for row in ROWS.values()}
    assert shapes >= {"llama", "qwen2", "qwen3_moe", "gpt_oss", "deepseek_v2", "gemma3_text", "granitemoehybrid"}
