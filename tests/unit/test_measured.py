"""The planner's physics against what vLLM measured on real GPUs, row by row."""

import json
from pathlib import Path

import pytest

from vllm_launch.gpus import Gpu
from vllm_launch.kv import kv_cache
from vllm_launch.memory import Run, fullest, kv_bytes, of_ranks
from vllm_launch.model import read_model
from vllm_launch.parallel import Layout

GIB = 1 << 30
H200 = Gpu(
    index=0,
    uuid="GPU-0",
    name="NVIDIA H200",
    memory_total=150109880320,  # cudaMemGetInfo's total
    memory_free=150109880320,
    compute_capability=(9, 0),
)
FILES = sorted((Path(__file__).parents[1] / "data/measured").glob("*.json"))
ROWS = {
    f"{file.stem}-{row.get('row', row['model'])}": row
    for file in FILES
    for row in json.loads(file.read_text())["measurements"]
}


def planned(row, folder):
    (folder / "config.json").write_text(json.dumps(row["config"]))
    model, args = read_model(str(folder)), dict(row["args"])
    layout = Layout(tensor=args.pop("tensor_parallel_size"), pipeline=args.pop("pipeline_parallel_size", 1))
    utilization = args.pop("gpu_memory_utilization")
    run = Run(**args)
    ranks = of_ranks(model, run, layout, H200)
    room = [kv_bytes(rank, H200, utilization) for rank in ranks]
    return fullest(ranks), kv_cache(model, run, layout, room, H200)


@pytest.mark.parametrize("name", ROWS)
def test_kv_tokens_are_within_two_per_cent_of_what_vllm_found(name, tmp_path):
    _, cache = planned(ROWS[name], tmp_path)
    assert cache.tokens == pytest.approx(ROWS[name]["kv_cache_tokens"], rel=0.02)


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if "weights_gib" in row])
def test_weights_are_within_one_per_cent_of_what_vllm_loaded(name, tmp_path):
    memory, _ = planned(ROWS[name], tmp_path)
    assert memory.weights / GIB == pytest.approx(ROWS[name]["weights_gib"], rel=0.01)


def test_there_are_rows_of_every_kind_of_cache():
    assert len(ROWS) >= 12
    shapes = {row["config"]["model_type"] for row in ROWS.values()}
    assert shapes >= {"llama", "qwen2", "qwen3_moe", "gpt_oss", "deepseek_v2", "gemma3_text", "granitemoehybrid"}
