"""The planner's prediction for one measured row. The measuring commands and the tests make the same call."""

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
"""Total memory of an H200 in bytes (cudaMemGetInfo). Rows without ``total_bytes`` come from an H200."""


def measured() -> dict[str, dict[str, Any]]:
    """Return all rows to compare the planner with, by file and row name.

    A file is a result of memory.py, or has only ``measurements``.
    """
    rows = {}
    for path in sorted(MEASURED.glob("*.json")):
        content = json.loads(path.read_text())
        for row in content.get("rows") or content["measurements"]:
            rows[f"{path.stem}-{row.get('row', row['model'])}"] = row
    return rows


EAGER: Mapping[str, Any] = {"compiled": False, "cudagraph_mode": "NONE", "fuse_allreduce_rms": False}
"""Fields of ``RunConfig`` with vLLM's --enforce-eager."""


def predicted(row: Mapping[str, Any]) -> tuple[tuple[Memory, ...], KvCache]:
    """Return the memory of each pipeline rank and the KV cache, for ``row["config"]`` and vLLM's ``row["args"]``."""
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
    eager = EAGER if args.pop("enforce_eager", False) else {}
    run = RunConfig(**{"dtype": model.dtype} | args | eager)
    ranks = memory_by_rank(Placement(model, run, layout, gpu))
    return ranks, kv_cache(
        Placement(model, run, layout, gpu), [kv_bytes(rank, run, gpu, utilization) for rank in ranks]
    )
