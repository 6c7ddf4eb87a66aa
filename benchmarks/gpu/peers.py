#!/usr/bin/env python3
"""vLLM by this launcher's plan beside transformers' ``generate``, on the same GPU and the same shape, in one run.

``python benchmarks/gpu/peers.py --tokenizer FOLDER --out FILE`` needs vLLM, transformers and an idle GPU. 512 tokens
in, 256 out, greedy, bfloat16, random weights. transformers runs one fixed batch to its end, SDPA attention, static
shapes where it has them by itself; vLLM is asked through its API by as many clients at once. tok/s are output tokens
by the time from the first request to the last token.
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
MOST = 1024
"""Requests at once that vLLM alone is given beyond those: its default for max_num_seqs on such GPUs."""
PROMPT, OUTPUT = 512, 256


def transformers_rows(model: Path, told: Any) -> None:
    """In a process of its own, so that its memory goes with it: (batch, tok/s or the reason why not), then None."""
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
                words: dict[str, Any] = {
                    "attention_mask": torch.ones_like(prompts),
                    "do_sample": False,
                    "pad_token_id": 0,
                }
                network.generate(prompts, min_new_tokens=4, max_new_tokens=4, **words)
                torch.cuda.synchronize()
                began = time.perf_counter()
                network.generate(prompts, min_new_tokens=OUTPUT, max_new_tokens=OUTPUT, **words)
                torch.cuda.synchronize()
                told.put((batch, round(batch * OUTPUT / (time.perf_counter() - began), 1)))
            except torch.cuda.OutOfMemoryError:
                told.put((batch, "out of memory"))
            gc.collect()
            torch.cuda.empty_cache()
    told.put(None)


def of_transformers(model: Path) -> Iterator[tuple[int, float | str]]:
    """(batch, tok/s or the reason why not), as they come."""
    spawn = multiprocessing.get_context("spawn")
    told = spawn.Queue()
    process = spawn.Process(target=transformers_rows, args=(model, told))
    process.start()
    yield from iter(lambda: told.get(timeout=300), None)
    process.join()


def of_vllm(model: Path, log: Path) -> Iterator[tuple[int, float]]:
    """(batch, tok/s), as they come; the first of two measurements warms up."""
    workload = bench_serve.WORKLOADS["512/256"]
    with bench.start_server(bench.launcher_command(model, []), log, env=bench.environment()):
        for batch in (*BATCHES, MOST):
            clients = min(batch, bench_serve.CLIENTS_PER_GPU)
            of_batch = bench_serve.Workload((*workload.flags, f"--max-concurrency={batch // clients}"), 0, ())
            for seed, requests in ((batch, batch), (batch + 1, batch * 2)):
                row = bench_serve.measure(
                    model, [bench.PORT], of_batch, requests=requests, rate=float("inf"), clients=clients, seed=seed
                )
            yield batch, row["output_tok_s"]


def main() -> int:
    options = bench.parser(__doc__).parse_args()
    result = Result(options.out, "peers")
    peer, ours = dict[int, float | str](), dict[int, float]()
    try:
        with tempfile.TemporaryDirectory() as name:
            model = bench.model_folder(options.shape, options.tokenizer, Path(name))
            for batch, tokens in of_transformers(model):
                peer[batch] = tokens
            for batch, mine in of_vllm(model, options.out.parent / "logs" / "peers.log"):
                ours[batch] = mine
    finally:  # what was measured is written, whatever ended it
        numbers = {batch: tokens for batch, tokens in peer.items() if isinstance(tokens, float)}
        for batch in (*BATCHES, MOST):
            result.add(batch=batch, transformers_tok_s=peer.get(batch), vllm_tok_s=ours.get(batch),
                       ratio=ratio(ours.get(batch), numbers.get(batch)))  # fmt: skip
        most, best = max(ours.values(), default=None), max(numbers.values(), default=None)
        result.add(batch="best", transformers_tok_s=best, vllm_tok_s=most, ratio=ratio(most, best))
    return 0


def ratio(mine: float | None, peer: float | None) -> float | None:
    return round(mine / peer, 2) if mine and peer else None


if __name__ == "__main__":
    bench.run(main)
