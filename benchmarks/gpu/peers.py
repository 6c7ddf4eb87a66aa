#!/usr/bin/env python3
"""Compare vLLM with the launcher's plan and transformers' ``generate``, on the same GPU and model shape, in one run.

``python benchmarks/gpu/peers.py --tokenizer FOLDER --out FILE`` needs vLLM, transformers and an idle GPU. Prompts have
512 tokens, answers 256; greedy, bfloat16, random weights. transformers runs one fixed batch to its end, with SDPA
attention and its default shapes. vLLM gets as many concurrent requests through its API. tok/s are output tokens divided
by the seconds from the first request to the last token.
"""

from __future__ import annotations

import gc
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bench
import bench_serve
from result import Result

BATCHES = (1, 8, 32, 128, 256, 512)
MAX_BATCH = 1024
"""Concurrent requests of one more measurement, for vLLM only: its default for max_num_seqs on such GPUs."""
PROMPT, OUTPUT = 512, 256


def run_transformers(model: Path, results: Any) -> None:
    """Put (batch, tok/s or the error) of each batch into ``results``, then None. Runs in a process of its own.

    The end of the process frees its memory.
    """
    import torch  # noqa: PLC0415, TID251 - the peer
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415

    torch.manual_seed(0)
    with torch.device("cuda"):
        network = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model), dtype=torch.bfloat16).eval()
    vocabulary = network.config.vocab_size
    with torch.inference_mode():
        for batch in BATCHES:
            try:
                prompts = torch.randint(5, vocabulary, (batch, PROMPT), device="cuda")
                arguments: dict[str, Any] = {
                    "attention_mask": torch.ones_like(prompts),
                    "do_sample": False,
                    "pad_token_id": 0,
                }
                network.generate(prompts, min_new_tokens=4, max_new_tokens=4, **arguments)
                torch.cuda.synchronize()
                began = time.perf_counter()
                network.generate(prompts, min_new_tokens=OUTPUT, max_new_tokens=OUTPUT, **arguments)
                torch.cuda.synchronize()
                results.put((batch, round(batch * OUTPUT / (time.perf_counter() - began), 1)))
            except torch.cuda.OutOfMemoryError:
                results.put((batch, "out of memory"))
            gc.collect()
            torch.cuda.empty_cache()
    results.put(None)


def measure_transformers(model: Path) -> Iterator[tuple[int, float | str]]:
    """Yield (batch, tok/s or the error) as soon as each is measured."""
    spawn = multiprocessing.get_context("spawn")
    results = spawn.Queue()
    process = spawn.Process(target=run_transformers, args=(model, results))
    process.start()
    yield from iter(lambda: results.get(timeout=300), None)
    process.join()


def measure_vllm(model: Path, log: Path) -> Iterator[tuple[int, float]]:
    """Yield (batch, tok/s) as soon as each is measured. The first of two measurements per batch is the warm-up."""
    workload = bench_serve.WORKLOADS["512/256"]
    with bench.start_server(bench.launcher_command(model, []), log, env=bench.environment()):
        for batch in (*BATCHES, MAX_BATCH):
            clients = min(batch, bench_serve.CLIENTS_PER_GPU)
            batch_load = bench_serve.Workload((*workload.flags, f"--max-concurrency={batch // clients}"), 0, ())
            for seed, requests in ((batch, batch), (batch + 1, batch * 2)):
                row = bench_serve.measure(
                    model, [bench.PORT], batch_load, requests=requests, rate=float("inf"), clients=clients, seed=seed
                )
            yield batch, row["output_tok_s"]


def main() -> int:
    options = bench.parser(__doc__).parse_args()
    result = Result(options.out, "peers")
    peer, ours = dict[int, float | str](), dict[int, float]()
    try:
        with tempfile.TemporaryDirectory() as name:
            model = bench.model_folder(options.shape, options.tokenizer, Path(name))
            for batch, tokens in measure_transformers(model):
                peer[batch] = tokens
            for batch, tok_s in measure_vllm(model, options.out.parent / "logs" / "peers.log"):
                ours[batch] = tok_s
    finally:  # write the measured values after an error too
        numbers = {batch: tokens for batch, tokens in peer.items() if isinstance(tokens, float)}
        for batch in (*BATCHES, MAX_BATCH):
            result.add(batch=batch, transformers_tok_s=peer.get(batch), vllm_tok_s=ours.get(batch),
                       ratio=ratio(ours.get(batch), numbers.get(batch)))  # fmt: skip
        best_ours, best_peer = max(ours.values(), default=None), max(numbers.values(), default=None)
        result.add(batch="best", transformers_tok_s=best_peer, vllm_tok_s=best_ours, ratio=ratio(best_ours, best_peer))
    return 0


def ratio(ours: float | None, peer: float | None) -> float | None:
    return round(ours / peer, 2) if ours and peer else None


if __name__ == "__main__":
    bench.run(main)
