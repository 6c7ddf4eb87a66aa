#!/usr/bin/env python3
"""Measure the terms of vLLM's GPU memory for model shapes with dummy weights, and compare them with the planner's.

``python benchmarks/gpu/memory.py --out FILE`` needs idle NVIDIA GPUs and vLLM, and no network. Each row starts an
engine in processes of its own, one after another, because vLLM measures the free memory of the whole GPU. ``ranks`` are
each worker's terms from vLLM's profiling (``terms.Terms``). ``parts_gib`` compares them with the planner's.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import bench
import msgspec
from predicted import predicted
from result import Result, wait_until_idle

from vllm_health import nvml
from vllm_launch.engine import multicast

SERVE = {"max_model_len": 8192, "max_num_batched_tokens": 8192, "max_num_seqs": 1024, "gpu_memory_utilization": 0.92}
"""Defaults of ``vllm serve`` on a GPU of 70 to 160 GiB. Source: vllm/engine/arg_utils.py:get_batch_defaults."""

EAGER = {"enforce_eager": True}
TP2, PP2 = {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}
PLAN = {"estimate_cudagraphs": False}
"""The launcher's setting VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS=0, under its name in ``RunConfig``."""

ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3-8b": ("llama3-8b", {}),
    "llama3-8b-eager": ("llama3-8b", EAGER),
    "llama3-8b-fp8-kv": ("llama3-8b", {"kv_cache_dtype": "fp8"}),
    "llama3-8b-small-batch": (
        "llama3-8b",
        {"gpu_memory_utilization": 0.97, "max_num_batched_tokens": 2048, "max_num_seqs": 256},
    ),
    "deepseek-v2-lite": ("deepseek-v2-lite", {}),
    "gemma3-12b": ("gemma3-12b", {}),
    "llama3-8b-awq": ("llama3-8b-awq", {}),
    "llama3-8b-fp8": ("llama3-8b-fp8", {}),
    "llama3-8b-fp8-on-load": ("llama3-8b", {"quantization": "fp8", **EAGER}),
    "qwen2.5-7b": ("qwen2.5-7b", {}),
    "qwen3-30b-a3b-eager": ("qwen3-30b-a3b", EAGER),
    "granite4-h-tiny": ("granite4-h-tiny", {}),
    "qwen3-32b": ("qwen3-32b", {}),
    "qwen3-32b-not-guessed": ("qwen3-32b", PLAN),
    "llama3-8b-not-guessed": ("llama3-8b", PLAN),
    "mixtral-8x7b-eager": ("mixtral-8x7b", EAGER),
    "qwen2.5-0.5b": ("qwen2.5-0.5b", {}),
    "gpt-oss-20b-eager": ("gpt-oss-20b", EAGER),
    "llama3-8b-long-batch": ("llama3-8b", {"max_num_batched_tokens": 16384, "max_num_seqs": 256}),
    "gemma2-9b-eager": ("gemma2-9b", EAGER),
    "llama3-8b-tp2": ("llama3-8b", TP2),
    "llama3-8b-pp2": ("llama3-8b", PP2),
    "qwen3-32b-tp2-eager": ("qwen3-32b", TP2 | EAGER),
    "qwen3-30b-a3b-tp2-eager": ("qwen3-30b-a3b", TP2 | EAGER),
    "deepseek-v2-lite-tp2-eager": ("deepseek-v2-lite", TP2 | EAGER),
    "gemma3-12b-tp2-eager": ("gemma3-12b", TP2 | EAGER),
    "gpt-oss-20b-tp2-eager": ("gpt-oss-20b", TP2 | EAGER),
    "llama3-70b-tp2": ("llama3-70b", TP2),
    "qwen3-32b-tp2": ("qwen3-32b", TP2),
    "qwen3-30b-a3b": ("qwen3-30b-a3b", {}),
    "gpt-oss-20b": ("gpt-oss-20b", {}),
    "qwen3-32b-pp2-eager": ("qwen3-32b", PP2 | EAGER),
    "mixtral-8x7b-tp2-eager": ("mixtral-8x7b", TP2 | EAGER),
    "llama3-8b-fp8-tp2-eager": ("llama3-8b-fp8", TP2 | EAGER),
}
"""Name: (shape, differences from ``SERVE``). The most useful rows come first."""

LOGGED = {
    "attention_backend": r"Using (?:AttentionBackendEnum\.)?([A-Z][A-Z0-9_]+) (?:attention backend|backend\.)",
    "moe_backend": r"Using '?([\w ]+?)'? \w+ MoE backend",
    "graphs_seen_gib": r"(?s)\A.*?Graph capturing finished in [^\n]* took (-?[\d.]+) GiB",
    "graph_capture_gib": r"Graph capturing finished in .* took (-?[\d.]+) GiB",
    "graph_pool_gib": r"CUDA graph pool memory: (-?[\d.]+) GiB \(actual\)",
    "compile_s": r"torch\.compile took ([\d.]+) s",
    "compile_cache_hit": r"(Directly load (?:AOT|the compiled))",
    "all_reduce": r"Using (\[.*?\]) all-reduce backends",
}
"""Figures that are only in vLLM's log: field of a row, and its pattern. ``graphs_seen_gib`` comes from the capture with
which vLLM estimates. ``graph_capture_gib`` comes from the real capture, and includes memory that warm-up left in the
allocator."""


def gpu_count(args: Mapping[str, Any]) -> int:
    """Return the number of GPUs that an engine with ``args`` uses."""
    return int(args.get("tensor_parallel_size", 1) * args.get("pipeline_parallel_size", 1))


def measure(name: str, out: Path, log: Path) -> None:
    """Start the engine of row ``name`` and write the row to ``out``. Runs in a process of its own."""
    with log.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    shape, changes = ROWS[name]
    config = bench.SHAPES[shape]
    row: dict[str, Any] = {"row": name, "model": shape, "args": {**SERVE, "tensor_parallel_size": 1, **changes}}
    try:
        start_engine(row, config)
    except BaseException as error:  # noqa: BLE001  the next row must start after any error
        row["error"] = f"{type(error).__name__}: {error}"[:2000]
    row["config"] = config
    out.write_text(json.dumps(row, default=str))
    os._exit(0)  # skips the engine's tear-down, which takes seconds


def start_engine(row: dict[str, Any], config: dict[str, Any]) -> None:
    """Start the engine of ``row`` with the model ``config``, and add the measured values to ``row``."""
    import vllm  # noqa: PLC0415, TID251  this measures the engine

    # The hosts are shared, so NVLink multicast is off (docs/performance.md).
    no_multicast = {"compilation_config": multicast.without_fusion(None)} if gpu_count(row["args"]) > 1 else {}
    args = dict(row["args"])
    os.environ["VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS"] = str(int(args.pop("estimate_cudagraphs", True)))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        began = time.monotonic()
        llm = vllm.LLM(
            folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            worker_extension_cls="terms.Terms",
            **args,
            **no_multicast,
        )
        row["ready_s"] = round(time.monotonic() - began, 1)
    if no_multicast and row["args"].get("tensor_parallel_size", 1) > 1:
        row["args"]["fuse_allreduce_rms"] = False  # a field of the planner's RunConfig, for ``predicted``
    core: Any = llm.llm_engine.engine_core.engine_core  # in this process: VLLM_ENABLE_V1_MULTIPROCESSING=0
    cache = core.vllm_config.cache_config
    row["kv_cache_tokens"] = cache.kv_cache_size_tokens
    row["block_size"] = cache.block_size
    row["num_gpu_blocks"] = cache.num_gpu_blocks
    compilation = core.vllm_config.compilation_config
    row["cudagraph_mode"] = str(compilation.cudagraph_mode)
    row["cudagraph_capture_sizes"] = len(compilation.cudagraph_capture_sizes or [])
    row["ranks"] = llm.collective_rpc("memory_terms")
    row["after_start"] = llm.collective_rpc("memory_now")
    row["total_bytes"] = row["ranks"][0]["init"]["total_memory"]


def compare(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return each pipeline rank's predicted and measured terms in GiB, and the error of the KV tokens as a share.

    The measured CUDA graphs are vLLM's estimate, or the real size if vLLM was told not to count them.
    """
    ranks, cache = predicted(row)
    counted = row["args"].get("estimate_cudagraphs", True)
    workers_per_rank = len(row["ranks"]) // len(ranks)
    terms = []
    for number, memory in enumerate(ranks):
        real = row["ranks"][number * workers_per_rank]
        pairs = {
            "weights": (memory.weights, real["weights_bytes"]),
            "non_torch": (memory.non_torch, real["total_consumed_bytes"] - real["weights_bytes"]),
            "activation_peak": (memory.activation_peak, real["activation_peak_bytes"]),
            "cuda_graphs": (
                memory.cuda_graphs,
                real["cuda_graphs_estimate_bytes"] if counted else float(row["graph_pool_gib"]) * 2**30,
            ),
            "context": (memory.context, real["init"]["total_memory"] - real["init"]["free_memory"]),
        }
        terms.append({term: [round(size / 2**30, 3) for size in pair] for term, pair in pairs.items()})
    return {
        "predicted_tokens": cache.tokens,
        "kv_error": round(cache.tokens / row["kv_cache_tokens"] - 1, 5),
        "parts_gib": terms,
    }


def parse_log(text: str) -> dict[str, Any]:
    """Return the figures of ``LOGGED`` that a log contains, as vLLM wrote them. The last match counts."""
    figures: dict[str, Any] = {}
    for field, pattern in LOGGED.items():
        if matches := re.findall(pattern, text):
            figures[field] = matches[-1]
    figures["compile_cache_hit"] = "compile_cache_hit" in figures
    return figures


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the number of compared rows, and their mean and worst error of KV tokens as a share."""
    errors = [abs(row["kv_error"]) for row in rows if "kv_error" in row]
    if not errors:
        return {}
    return {"rows": len(errors), "mean_absolute_error": sum(errors) / len(errors), "worst": max(errors)}


def main() -> int:
    parser = bench.parser(__doc__, shape=None)
    parser.add_argument("--only", action="append", choices=list(ROWS), help="measure only this row; may be repeated")
    parser.add_argument("--timeout", type=float, default=240, help="seconds that one row may take")
    parser.add_argument("--stop-after", type=float, default=float("inf"), help="seconds after which no new row starts")
    options: argparse.Namespace = parser.parse_args()
    os.environ |= bench.environment() | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    os.environ["PYTHONPATH"] = f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"
    with nvml.open_nvml() as opened:
        gpus = opened.count()
        hardware = {"gpu": opened.name(0), "compute_capability": opened.device(0).compute_capability}
    forkserver = multiprocessing.get_context("forkserver")  # imports vLLM once, uses no GPU, forks a process per row
    forkserver.set_forkserver_preload(
        ["vllm", "vllm.entrypoints.llm", "vllm.v1.engine.core", "vllm.v1.worker.gpu_worker"]
    )
    began, result = time.monotonic(), Result(options.out, "memory")
    logs = options.out.parent / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    for name in options.only or [name for name, (_, args) in ROWS.items() if gpu_count(args) <= gpus]:
        if time.monotonic() - began > options.stop_after:
            break
        wait_until_idle()
        row_file, log = logs / f"{name}.json", logs / f"{name}.log"
        process = forkserver.Process(target=measure, args=(name, row_file, log))
        process.start()
        process.join(options.timeout)
        alive = process.is_alive()
        process.kill()
        process.join()
        if row_file.exists():
            row = json.loads(row_file.read_text())
            row_file.unlink()
        else:
            error = f"not finished within {options.timeout} s" if alive else f"exit code {process.exitcode}"
            row = {"row": name, "model": ROWS[name][0], "error": error}
        row |= hardware | parse_log(log.read_text(errors="replace"))
        if "kv_cache_tokens" in row:
            try:
                row |= compare(row)
            except Exception as failure:  # noqa: BLE001  keep the measured values
                row["not_predicted"] = repr(failure)
        result.add(**msgspec.to_builtins(row))
    result.content["summary"] = summary(result.content["rows"])
    result.write()
    print(json.dumps(result.content["summary"]))
    return int(not result.content["rows"] or any("error" in row for row in result.content["rows"]))


if __name__ == "__main__":
    bench.run(main)
