#!/usr/bin/env python3
"""How much of what vLLM computes it computes twice, and what a watermark saves: vLLM's own scheduler without a GPU.

``python benchmarks/gpu/scheduling.py --out FILE`` needs the pinned vLLM for any hardware. The scheduler, the blocks of
the KV cache and its prefix cache are vLLM's; simulated is the GPU alone, an H100 with Llama-3-8B in bfloat16, whose
steps last as long as their arithmetic and their reads (``step_seconds``). So preemptions and tokens are what vLLM would
do, without asynchronous scheduling, and of times only ratios mean anything. ``recomputed`` are tokens computed beyond
those that the requests need, as a share of these; ``ratio`` is of output tokens a second, to no watermark.
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
from vllm.engine.arg_utils import EngineArgs  # noqa: TID251 - vLLM's scheduler is what is asked about, here and below
from vllm.sampling_params import SamplingParams  # noqa: TID251
from vllm.utils.hashing import sha256  # noqa: TID251
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash  # noqa: TID251
from vllm.v1.core.sched.scheduler import Scheduler  # noqa: TID251
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec  # noqa: TID251
from vllm.v1.outputs import ModelRunnerOutput  # noqa: TID251
from vllm.v1.request import Request  # noqa: TID251
from vllm.v1.structured_output import StructuredOutputManager  # noqa: TID251

BLOCK = 16
"""Tokens of a block, as vLLM has it on GPUs."""
LARGE, HALF, SMALL, LEAST = 484_192, 146_464, 40_000, 20_000
"""Tokens of the KV cache: of the plan for Llama-3-8B on an H100, of 0.45 of that GPU (throughput.py --in-turns), and
where there is little."""
BATCH = {"max_num_batched_tokens": 8192, "max_num_seqs": 1024}
"""VLLM's defaults there."""
WATERMARKS = (0.0, 0.01, 0.02, 0.05, 0.1)


class Asked(msgspec.Struct, frozen=True):
    """A request: when it comes, in seconds, and its tokens."""

    at: float
    prompt: int
    output: int


def at_once(count: int, prompt: int, output: int) -> list[Asked]:
    return [Asked(0.0, prompt, output) for _ in range(count)]


def spread(count: int, rate: float, lengths: Callable[[random.Random], tuple[int, int]]) -> list[Asked]:
    """``rate`` a second by chance (a Poisson process)."""
    chance = random.Random(1)
    times = itertools.accumulate(chance.expovariate(rate) for _ in range(count))
    return [Asked(at, *lengths(chance)) for at in times]


def chat(chance: random.Random) -> tuple[int, int]:
    return min(6000, 1 + int(chance.expovariate(1 / 600))), min(2000, 1 + int(chance.expovariate(1 / 300)))


def reasoning(chance: random.Random) -> tuple[int, int]:
    return 200, min(7000, 1 + int(chance.expovariate(1 / 1500)))


LOADS: dict[str, tuple[int, Callable[[], list[Asked]]]] = {
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
"""KV tokens, and requests: more than the GPU can serve, or nothing would be preempted. Lengths of "chat" (600 and 300
tokens) and of answers in "reasoning" (1,500 after 200) are means of exponential distributions."""


def step_seconds(tokens: int, attended: int) -> float:
    """Of a step that computes ``tokens`` and whose attention reads the cache of ``attended``.

    2 ms of the host's; 16 GFLOP a token at 650 TFLOP/s, or 16 GB of weights at 3 TB/s if that takes longer; 128 KiB of
    cache a token. Assumed for an H100: a large copy gives 3 TB/s, a large matrix product a fifth more than 650 TFLOP/s.
    """
    return 0.002 + max(tokens * 16e9 / 650e12, 16e9 / 3e12) + attended * 131072 / 3e12


def scheduler(kv_tokens: int, watermark: float) -> Scheduler:
    """VLLM's, over a KV cache of ``kv_tokens``."""
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


def served(load: Sequence[Asked], kv_tokens: int, watermark: float) -> dict[str, Any]:
    """What it takes to answer all of ``load``; times are the simulated GPU's."""
    init_none_hash(sha256)
    hasher, chance = get_request_block_hasher(BLOCK, sha256), random.Random(2)
    waiting = [
        (
            one.at,
            Request(
                str(number), chance.choices(range(100_000), k=one.prompt),
                SamplingParams(max_tokens=one.output, ignore_eos=True), None, block_hasher=hasher,
            ),
        )
        for number, one in enumerate(load)
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
        now += step_seconds(step.total_num_scheduled_tokens, sum(one.num_computed_tokens for one in requests))
        computed += step.total_num_scheduled_tokens
        preempted += len(step.preempted_req_ids or ())
        names = list(step.num_scheduled_tokens)
        # A token comes of a request whose last known one has been computed.
        sampled = [[7] if one.num_computed_tokens >= one.num_tokens else [] for one in requests]
        vllm.update_from_output(
            step, ModelRunnerOutput(names, {name: at for at, name in enumerate(names)}, sampled_token_ids=sampled)
        )
    needed = sum(one.prompt + one.output - 1 for one in load)
    return {
        "preempted": preempted,
        "recomputed": round(computed / needed - 1, 4),
        "seconds": round(now, 1),
        "output_tok_s": round(sum(one.output for one in load) / now, 1),
    }


def main() -> int:
    parser = bench.parser(__doc__, shape=None)
    parser.add_argument("--load", action="append", choices=list(LOADS), help="only this one; may be repeated")
    options: argparse.Namespace = parser.parse_args()
    result = Result(options.out, "scheduling", gpus=False)
    for name in options.load or LOADS:
        (kv_tokens, make), plain = LOADS[name], None
        load = make()
        for watermark in WATERMARKS:
            row = served(load, kv_tokens, watermark)
            plain = plain or row["output_tok_s"]
            result.add(load=name, kv_tokens=kv_tokens, requests=len(load), watermark=watermark, **row,
                       ratio=round(row["output_tok_s"] / plain, 3))  # fmt: skip
    return 0


if __name__ == "__main__":
    bench.run(main)
