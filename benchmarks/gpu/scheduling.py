#!/usr/bin/env python3
"""Count the tokens that vLLM recomputes after preemptions, for several watermarks, with its scheduler and no GPU.

``python benchmarks/gpu/scheduling.py --out FILE`` needs the pinned vLLM for any hardware. The scheduler, the KV cache
blocks and the prefix cache are vLLM's own code. Only the GPU is simulated: an H100 with Llama-3-8B in bfloat16. The
duration of a step follows from its arithmetic and its memory reads (``step_seconds``). Preemptions and tokens are
therefore those of vLLM without asynchronous scheduling. Of the times, only ratios are meaningful. ``recomputed``:
tokens computed beyond the tokens that the requests need, as a share of these. ``ratio``: output tokens per second,
divided by those without a watermark.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import bench
import msgspec
from result import Result
from vllm.engine.arg_utils import EngineArgs  # noqa: TID251 - this runs vLLM's scheduler
from vllm.sampling_params import SamplingParams  # noqa: TID251
from vllm.utils.hashing import sha256  # noqa: TID251
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash  # noqa: TID251
from vllm.v1.core.sched.scheduler import Scheduler  # noqa: TID251
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec  # noqa: TID251
from vllm.v1.outputs import ModelRunnerOutput  # noqa: TID251
from vllm.v1.request import Request  # noqa: TID251
from vllm.v1.structured_output import StructuredOutputManager  # noqa: TID251

BLOCK = 16
"""Tokens per KV cache block: vLLM's default on GPUs."""
LARGE, HALF, SMALL, LEAST = 484_192, 146_464, 40_000, 20_000
"""Tokens of the KV cache: of the plan for Llama-3-8B on an H100, of 0.45 of that GPU (throughput.py --in-turns), and of
two small caches."""
BATCH = {"max_num_batched_tokens": 8192, "max_num_seqs": 1024}
"""VLLM's defaults on that GPU."""
WATERMARKS = (0.0, 0.01, 0.02, 0.05, 0.1)


class SimulatedRequest(msgspec.Struct, frozen=True):
    """One request: its arrival in seconds, and its prompt and output tokens."""

    at: float
    prompt: int
    output: int


def at_once(count: int, prompt: int, output: int) -> list[SimulatedRequest]:
    """Return equal requests that arrive at the same time."""
    return [SimulatedRequest(0.0, prompt, output) for _ in range(count)]


def spread(count: int, rate: float, lengths: Callable[[random.Random], tuple[int, int]]) -> list[SimulatedRequest]:
    """Return requests that arrive as a Poisson process with ``rate`` per second. ``lengths`` draws their tokens."""
    rng = random.Random(1)
    times = itertools.accumulate(rng.expovariate(rate) for _ in range(count))
    return [SimulatedRequest(at, *lengths(rng)) for at in times]


def chat(rng: random.Random) -> tuple[int, int]:
    """Draw prompt and output tokens of a chat request."""
    return min(6000, 1 + int(rng.expovariate(1 / 600))), min(2000, 1 + int(rng.expovariate(1 / 300)))


def reasoning(rng: random.Random) -> tuple[int, int]:
    """Draw prompt and output tokens of a reasoning request."""
    return 200, min(7000, 1 + int(rng.expovariate(1 / 1500)))


LOADS: dict[str, tuple[int, Callable[[], list[SimulatedRequest]]]] = {
    "512/256, all at once": (LARGE, lambda: at_once(1843, 512, 256)),
    "4000/500, all at once": (LARGE, lambda: at_once(240, 4000, 500)),
    "512/256, all at once, as in turns": (HALF, lambda: at_once(920, 512, 256)),
    "4000/500, all at once, as in turns": (HALF, lambda: at_once(120, 4000, 500)),
    "512/256, 45 a second": (LARGE, lambda: spread(3000, 45, lambda _: (512, 256))),
    "chat, 40 a second": (LARGE, lambda: spread(2500, 40, chat)),
    "reasoning, 20 a second": (LARGE, lambda: spread(1500, 20, reasoning)),
    "chat, 15 a second": (SMALL, lambda: spread(800, 15, chat)),
    "chat, 9 a second": (LEAST, lambda: spread(500, 9, chat)),
}
"""Name: (KV tokens, requests). The rates are above what the GPU can serve, because only then vLLM preempts requests.
The lengths in "chat" (600 prompt and 300 output tokens) and the answers in "reasoning" (1,500 tokens after prompts of
200) are means of exponential distributions."""


def step_seconds(tokens: int, attended: int) -> float:
    """Return the seconds of a step that computes ``tokens`` and whose attention reads the cache of ``attended`` tokens.

    Terms: 2 ms on the host. 16 GFLOP per token at 650 TFLOP/s, or 16 GB of weights at 3 TB/s if that takes longer. 128
    KiB of cache per token. Assumptions for an H100: a large copy reaches 3 TB/s, and a large matrix product a fifth
    more than 650 TFLOP/s.
    """
    return 0.002 + max(tokens * 16e9 / 650e12, 16e9 / 3e12) + attended * 131072 / 3e12


def scheduler(kv_tokens: int, watermark: float) -> Scheduler:
    """Return vLLM's scheduler with a KV cache of ``kv_tokens``."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(bench.SHAPES["llama3-8b"]))
        args = EngineArgs(
            model=folder, skip_tokenizer_init=True, watermark=watermark, async_scheduling=False, block_size=BLOCK,
            enable_prefix_caching=True, **BATCH,
        )  # fmt: skip
        config = args.create_engine_config()
    config.cache_config.num_gpu_blocks = kv_tokens // BLOCK
    layer = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=config.model_config.dtype)
    cache = KVCacheConfig(kv_tokens // BLOCK, [], [KVCacheGroupSpec(["layer"], layer)])
    return Scheduler(config, cache, StructuredOutputManager(config), block_size=BLOCK)


def simulate(load: Sequence[SimulatedRequest], kv_tokens: int, watermark: float) -> dict[str, Any]:
    """Answer all of ``load``, and return the row. Times are those of the simulated GPU."""
    init_none_hash(sha256)
    hasher, rng = get_request_block_hasher(BLOCK, sha256), random.Random(2)
    waiting = [
        (
            request.at,
            Request(
                str(number), rng.choices(range(100_000), k=request.prompt),
                SamplingParams(max_tokens=request.output, ignore_eos=True), None, block_hasher=hasher,
            ),
        )
        for number, request in enumerate(load)
    ][::-1]  # fmt: skip
    vllm = scheduler(kv_tokens, watermark)
    now, computed, preempted = 0.0, 0, 0
    while waiting or vllm.has_unfinished_requests():
        if not vllm.has_unfinished_requests():
            now = max(now, waiting[-1][0])
        while waiting and waiting[-1][0] <= now:
            vllm.add_request(waiting.pop()[1])
        step = vllm.schedule()
        requests = [vllm.requests[name] for name in step.num_scheduled_tokens]
        now += step_seconds(step.total_num_scheduled_tokens, sum(request.num_computed_tokens for request in requests))
        computed += step.total_num_scheduled_tokens
        preempted += len(step.preempted_req_ids or ())
        names = list(step.num_scheduled_tokens)
        # A request whose tokens are all computed samples its next token.
        sampled = [[7] if request.num_computed_tokens >= request.num_tokens else [] for request in requests]
        vllm.update_from_output(
            step, ModelRunnerOutput(names, {name: at for at, name in enumerate(names)}, sampled_token_ids=sampled)
        )
    needed = sum(request.prompt + request.output - 1 for request in load)
    return {
        "preempted": preempted,
        "recomputed": round(computed / needed - 1, 4),
        "seconds": round(now, 1),
        "output_tok_s": round(sum(request.output for request in load) / now, 1),
    }


def main() -> int:
    parser = bench.parser(__doc__, shape=None)
    parser.add_argument("--load", action="append", choices=list(LOADS), help="simulate only this load; may be repeated")
    options: argparse.Namespace = parser.parse_args()
    result = Result(options.out, "scheduling", gpus=False)
    for name in options.load or LOADS:
        (kv_tokens, make_load), base = LOADS[name], None
        load = make_load()
        for watermark in WATERMARKS:
            row = simulate(load, kv_tokens, watermark)
            base = base or row["output_tok_s"]
            result.add(load=name, kv_tokens=kv_tokens, requests=len(load), watermark=watermark, **row,
                       ratio=round(row["output_tok_s"] / base, 3))  # fmt: skip
    return 0


if __name__ == "__main__":
    bench.run(main)
