#!/usr/bin/env python3
"""Measures where vLLM's GPU memory goes, for model shapes with dummy weights: what the planner must predict.

Needs one idle NVIDIA GPU, vLLM and nothing from the network: ``python benchmarks/gpu/memory.py --out rows.json``.
Every row is an engine of its own in a process of its own, one after another, because vLLM measures free memory of the
whole GPU. Exact bytes come from vLLM's own profiling result (vllm/v1/worker/gpu_worker.py:determine_available_memory).
Figures named ``_gib`` are GiB, ``_bytes`` bytes, ``_s`` seconds.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "shapes.json").read_text())

SERVE = {"max_model_len": 8192, "max_num_batched_tokens": 8192, "max_num_seqs": 1024, "gpu_memory_utilization": 0.92}
"""What ``vllm serve`` takes by itself on a GPU of 70 to 160 GiB (vllm/engine/arg_utils.py:get_batch_defaults)."""

EAGER = {"enforce_eager": True}

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
    "mixtral-8x7b-eager": ("mixtral-8x7b", EAGER),
    "qwen2.5-0.5b": ("qwen2.5-0.5b", {}),
    "gpt-oss-20b-eager": ("gpt-oss-20b", EAGER),
    "llama3-8b-long-batch": ("llama3-8b", {"max_num_batched_tokens": 16384, "max_num_seqs": 256}),
    "gemma2-9b-eager": ("gemma2-9b", EAGER),
    "llama3-8b-warm": ("llama3-8b", {}),
}
"""Name: (shape, what differs from ``SERVE``). The most telling first."""

LOAD_PROMPT_TOKENS, LOAD_OUTPUT_TOKENS = 48, 8

LOGGED = {
    "attention_backend": r"Using (?:AttentionBackendEnum\.)?([A-Z][A-Z0-9_]+) (?:attention backend|backend\.)",
    "moe_backend": r"Using '?([\w ]+?)'? \w+ MoE backend",
    "graph_capture_gib": r"Graph capturing finished in .* took (-?[\d.]+) GiB",
    "compile_s": r"torch\.compile took ([\d.]+) s",
    "actual": r"(Actual usage is .*)",
    "kv_bytes_left": r"`--kv-cache-memory=(-?\d+)` \([^)]*\) to fully",
    "compile_cache_hit": r"(Directly load (?:AOT|the compiled))",
}
"""What only vLLM's log says. ``graph_capture_gib`` also counts what warm-up left in the allocator."""


class Listener(logging.Handler):
    """Keeps vLLM's log as text, and the profiling result that it logs as an object, with its bytes unrounded."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []
        self.profile: Any = None

    def emit(self, record: logging.LogRecord) -> None:
        """As logging.Handler.emit."""
        if type(record.msg).__name__ == "MemoryProfilingResult":
            self.profile = record.msg
        self.lines.append(record.getMessage())


def gib(size: float | None) -> float | None:
    return None if size is None else round(size / 2**30, 4)


def measure(name: str, out: Path, log: Path) -> None:
    """Runs in a process of its own: starts the engine of row ``name`` and writes the row to ``out``."""
    with log.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    listener = Listener()
    import vllm.logger  # noqa: PLC0415, TID251, F401  it sets the handlers of its logger anew

    logging.getLogger("vllm").addHandler(listener)
    shape, knobs = ROWS[name]
    row: dict[str, Any] = {"row": name, "model": shape, "args": {**SERVE, "tensor_parallel_size": 1, **knobs}}
    try:
        start(row, listener, SHAPES[shape])
    except BaseException as error:  # noqa: BLE001  whatever ended this engine, the next row starts
        row["error"] = f"{type(error).__name__}: {error}"[:2000]
    row.update(logged(listener.lines))
    if "init" in row and row.get("kv_bytes_left"):
        # gpu_worker.py:compile_or_warm_up_model: what it suggests, taken apart again; 150 MiB is its own margin.
        used = row["total_consumed_bytes"] + row["peak_activation_bytes"]
        left = int(row.pop("kv_bytes_left"))
        row["cuda_graphs_bytes"] = row["init"]["free_memory"] - used - 150 * 2**20 - left
        row["cuda_graphs_actual_gib"] = gib(row["cuda_graphs_bytes"])
    row["config"] = SHAPES[shape]
    out.write_text(json.dumps(row, default=str))
    os._exit(0)  # an engine's own tear-down takes seconds and proves nothing here


def start(row: dict[str, Any], listener: Listener, config: dict[str, Any]) -> None:
    import torch  # noqa: PLC0415, TID251  the engine is what is measured
    import vllm  # noqa: PLC0415, TID251  as above

    row.update(vllm=vllm.__version__, torch=torch.__version__)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        began = time.monotonic()
        llm = vllm.LLM(folder, load_format="dummy", skip_tokenizer_init=True, **row["args"])
        row["ready_s"] = round(time.monotonic() - began, 1)
    core: Any = llm.llm_engine.engine_core.engine_core  # in this process: VLLM_ENABLE_V1_MULTIPROCESSING=0
    cache = core.vllm_config.cache_config
    row["kv_cache_tokens"] = cache.kv_cache_size_tokens
    row["block_size"] = cache.block_size
    row["num_gpu_blocks"] = cache.num_gpu_blocks
    describe(row, core.vllm_config, core.scheduler.kv_cache_config)
    if torch.cuda.is_available():
        row["gpu"] = torch.cuda.get_device_name()
        terms(row, core.model_executor.driver_worker.worker, listener.profile)
        row["after_start"] = now(torch)
        try:
            row["after_load"] = load(llm, vllm, torch, row["args"]["max_num_seqs"], config["vocab_size"])
        except Exception as error:  # noqa: BLE001  the row's figures are complete without it
            row["after_load"] = {"error": f"{type(error).__name__}: {error}"[:500]}


def describe(row: dict[str, Any], vllm_config: Any, kv_cache: Any) -> None:
    compilation = vllm_config.compilation_config
    row["cudagraph_mode"] = str(compilation.cudagraph_mode)
    row["cudagraph_capture_sizes"] = len(compilation.cudagraph_capture_sizes or [])
    row["max_cudagraph_capture_size"] = compilation.max_cudagraph_capture_size
    row["kv_cache_bytes"] = sum(tensor.size for tensor in kv_cache.kv_cache_tensors)
    row["kv_cache_groups"] = [
        {
            "layers": len(group.layer_names),
            "kind": type(group.kv_cache_spec).__name__,
            "block_size": group.kv_cache_spec.block_size,
            "page_bytes": group.kv_cache_spec.page_size_bytes,
        }
        for group in kv_cache.kv_cache_groups
    ]


def terms(row: dict[str, Any], worker: Any, profile: Any) -> None:
    """What determine_available_memory subtracts from what was requested, in bytes."""
    row["model_runner"] = "V2" if worker.use_v2_model_runner else "V1"
    row["init_snapshot"] = str(worker.init_snapshot)
    for when, snapshot in (
        ("init", worker.init_snapshot),
        ("before_profile", profile.before_profile),
        ("after_profile", profile.after_profile),
    ):
        row[when] = {key: value for key, value in vars(snapshot).items() if type(value) is int}
    row["requested_bytes"] = int(worker.requested_memory)
    row["weights_bytes"] = int(profile.weights_memory)
    row["total_consumed_bytes"] = int(profile.total_consumed)
    row["transient_peak_bytes"] = int(profile.transient_peak_headroom)
    row["torch_peak_increase_bytes"] = int(profile.torch_peak_increase)
    row["non_torch_increase_bytes"] = int(profile.non_torch_increase)
    row["non_kv_bytes"] = int(profile.non_kv_cache_memory)
    row["peak_activation_bytes"] = int(worker.peak_activation_memory)
    row["cuda_graphs_estimate_bytes"] = int(worker.cudagraph_memory_estimate)
    row["available_kv_bytes"] = int(worker.available_kv_cache_memory_bytes)
    row["parameters_bytes"] = sum(p.numel() * p.element_size() for p in worker.model_runner.model.parameters())
    row["buffers_bytes"] = sum(b.numel() * b.element_size() for b in worker.model_runner.model.buffers())
    for term in ("weights", "total_consumed", "torch_peak_increase", "non_kv", "cuda_graphs_estimate", "available_kv"):
        row[f"{term}_gib"] = gib(row[f"{term}_bytes"])


def now(torch: Any) -> dict[str, int]:
    free, total = torch.cuda.mem_get_info()
    return {
        "free_memory": free,
        "total_memory": total,
        "torch_allocated": torch.cuda.memory_allocated(),
        "torch_memory": torch.cuda.memory_reserved(),
    }


def load(llm: Any, vllm: Any, torch: Any, requests: int, vocabulary: int) -> dict[str, int]:
    """Memory after as many requests at once as are allowed, sampled the expensive way: beyond what vLLM profiled."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sampling = vllm.SamplingParams(
        max_tokens=LOAD_OUTPUT_TOKENS, top_p=0.9, top_k=50, logprobs=5, ignore_eos=True, detokenize=False
    )
    places = range(LOAD_PROMPT_TOKENS)
    prompts = [
        {"prompt_token_ids": [(request * 7919 + place * 31) % (vocabulary - 10) + 5 for place in places]}
        for request in range(requests)
    ]
    llm.generate(prompts, sampling, use_tqdm=False)
    return {**now(torch), "torch_peak_increase": torch.cuda.max_memory_allocated() - before}


def logged(lines: list[str]) -> dict[str, Any]:
    """The figures of ``LOGGED`` that ``lines`` hold, as vLLM wrote them; the last mention counts."""
    found: dict[str, Any] = {}
    text = "\n".join(lines)
    for field, pattern in LOGGED.items():
        matches = re.findall(pattern, text)
        if matches:
            found[field] = matches[-1]
    found["compile_cache_hit"] = "compile_cache_hit" in found
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file, rewritten after every row")
    parser.add_argument("--only", action="append", choices=list(ROWS), help="this row; may be repeated")
    parser.add_argument(
        "--timeout", type=float, default=300, help="seconds for one row; a first start compiles for 180"
    )
    parser.add_argument("--stop-after", type=float, default=float("inf"), help="seconds after which no row is started")
    arguments = parser.parse_args()
    os.environ.update(VLLM_LOGGING_LEVEL="DEBUG", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    fresh = multiprocessing.get_context("forkserver")  # imports vLLM once, touches no GPU, forks a process per row
    fresh.set_forkserver_preload(["vllm", "vllm.entrypoints.llm", "vllm.v1.engine.core", "vllm.v1.worker.gpu_worker"])
    began, rows = time.monotonic(), []
    logs = arguments.out.parent / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    for name in arguments.only or ROWS:
        if time.monotonic() - began > arguments.stop_after:
            break
        written = logs / f"{name}.json"
        process = fresh.Process(target=measure, args=(name, written, logs / f"{name}.log"))
        process.start()
        process.join(arguments.timeout)
        alive = process.is_alive()
        process.kill()
        process.join()
        if written.exists():
            row = json.loads(written.read_text())
            written.unlink()
        else:
            why = f"no end within {arguments.timeout} s" if alive else f"process ended with {process.exitcode}"
            row = {"row": name, "model": ROWS[name][0], "error": why, "config": SHAPES[ROWS[name][0]]}
        rows.append(row)
        arguments.out.write_text(json.dumps({"measurements": rows}, indent=1) + "\n")
        shown = {key: value for key, value in row.items() if key != "config"}
        print(f"{time.monotonic() - began:6.0f} s", json.dumps(shown), flush=True)
    return 0 if rows and not any("error" in row for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
