"""The planner's physics for one row of measurements: the same call for those who measure and those who test."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_launch.machine.gpus import Gpu
from vllm_launch.model.read import read_model
from vllm_launch.sizing.kv import KvCache, kv_cache
from vllm_launch.sizing.memory import Memory, kv_bytes, memory_by_rank
from vllm_launch.sizing.parallel import Layout
from vllm_launch.sizing.placement import Placement
from vllm_launch.sizing.run_config import RunConfig

MEASURED = Path(__file__).parents[2] / "tests/data/measured"
H200_BYTES = 150109880320
"""cudaMemGetInfo's total of an H200; rows that name no other are of one."""


def measured() -> dict[str, dict[str, Any]]:
    """Every row that the planner is held against, by file and name: what memory.py writes, or its rows alone."""
    found = {}
    for path in sorted(MEASURED.glob("*.json")):
        told = json.loads(path.read_text())
        for row in told.get("rows") or told["measurements"]:
            found[f"{path.stem}-{row.get('row', row['model'])}"] = row
    return found


def predicted(row: Mapping[str, Any]) -> tuple[tuple[Memory, ...], KvCache]:
    """Each pipeline rank's memory and the cache for ``row["config"]`` and ``row["args"]``, vLLM's own names."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(row["config"]))
        model = read_model(folder)
    total = row.get("total_bytes", H200_BYTES)
    name = row.get("gpu", "NVIDIA H200")
    gpu = Gpu(
        index=0, uuid="GPU-0", name=name, memory_total=total, memory_free=total,
        compute_capability=tuple(row.get("compute_capability", (9, 0))),
    )  # fmt: skip
    args = dict(row["args"])
    layout = Layout(tensor=args.pop("tensor_parallel_size", 1), pipeline=args.pop("pipeline_parallel_size", 1))
    utilization = args.pop("gpu_memory_utilization")
    run = RunConfig(**{"dtype": model.dtype} | args)
    ranks = memory_by_rank(Placement(model, run, layout, gpu))
    return ranks, kv_cache(
        Placement(model, run, layout, gpu), [kv_bytes(rank, run, gpu, utilization) for rank in ranks]
    )
