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
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import bench
import throughput

BATCHES = (1, 8, 32, 128, 256, 512)
PROMPT, OUTPUT = 512, 256


def transformers_rows(model: Path, told: Any) -> None:
    """In a process of its own, so that its memory is gone afterwards: (batch, tok/s or the reason why not)."""
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
                told.put((batch, batch * OUTPUT / (time.perf_counter() - began)))
            except torch.cuda.OutOfMemoryError as error:
                told.put((batch, str(error)[:100]))
            gc.collect()
            torch.cuda.empty_cache()
    told.put(None)


def main() -> int:
    given = bench.parser(__doc__).parse_args()
    result = bench.Result(given.out, "peers", given.caches)
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        model = bench.model_folder(given.shape, given.tokenizer, Path(name))
        told = spawn.Queue()
        process = spawn.Process(target=transformers_rows, args=(model, told))
        process.start()
        theirs = dict(iter(lambda: told.get(timeout=300), None))
        process.join()
        log = given.out.parent / "logs" / "peers.log"
        workload = throughput.WORKLOADS["512/256"]
        ours = {}
        with bench.served(bench.planned(model, ["--launch-nvlink-multicast=off"]), log, env=bench.environment()):
            for batch in (*BATCHES, 1024):
                clients = min(batch, throughput.CLIENTS_PER_GPU)
                common = {"rate": float("inf"), "clients": clients}
                flags = (*workload.flags, f"--max-concurrency={batch // clients}")
                of_batch = throughput.Workload(flags, 0, ())
                throughput.measured(model, [bench.PORT], of_batch, requests=batch, seed=batch, **common)
                rounds = 2 if batch >= 8 else 1  # noqa: PLR2004
                row = throughput.measured(
                    model, [bench.PORT], of_batch, requests=batch * rounds, seed=batch + 1, **common
                )
                ours[batch] = row["output_tok_s"]
    for batch, ours_s in ours.items():
        peer = theirs.get(batch)
        ratio = round(ours_s / peer, 2) if isinstance(peer, float) else None
        shown = round(peer, 1) if isinstance(peer, float) else peer
        result.add(batch=batch, transformers_tok_s=shown, vllm_tok_s=ours_s, ratio=ratio)
    best = max(peer for peer in theirs.values() if isinstance(peer, float))
    result.told["best"] = {
        "transformers": round(best, 1),
        "vllm": max(ours.values()),
        "ratio": round(max(ours.values()) / best, 2),
    }
    result.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
