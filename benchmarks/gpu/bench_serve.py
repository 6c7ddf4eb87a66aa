"""Load on a server: vLLM's own ``vllm bench serve``, from several processes that begin together.

A single load process is slower than two GPUs. The weights are dummies, so ``ignore_eos`` is set and every answer has
its full length.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import multiprocessing
import os
import queue
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec


class Workload(msgspec.Struct, frozen=True):
    """A kind of requests, and how many of them to send per GPU.

    ``requests``: number per GPU at saturation. ``rates``: requests per second and GPU. ``multiple``: each load process
    sends a multiple of this number, because the load tool leaves out the remainder.
    """

    flags: tuple[str, ...]
    requests: int
    rates: tuple[float, ...]
    multiple: int = 1


PREFIXES = 4
"""Prefixes per load process in the workload "shared prefixes"."""

WORKLOADS = {
    "512/256": Workload(
        ("--dataset-name=random", "--random-input-len=512", "--random-output-len=256"), 3072, (4, 12, 20)
    ),
    "4000/500": Workload(
        ("--dataset-name=random", "--random-input-len=4000", "--random-output-len=500"), 400, (0.5, 1.5, 3)
    ),
    "shared prefixes": Workload(
        ("--dataset-name=prefix_repetition", "--prefix-repetition-prefix-len=2048",
         "--prefix-repetition-suffix-len=256", f"--prefix-repetition-num-prefixes={PREFIXES}",
         "--prefix-repetition-output-len=256"), 2048, (4, 12, 20), multiple=PREFIXES,
    ),
}  # fmt: skip
"""The name gives the input and output tokens of a request. In "shared prefixes" a prompt has one of PREFIXES prefixes
of 2,048 tokens and 256 tokens of its own. Its answer has 256 tokens."""

CLIENTS_PER_GPU = 4
"""Load processes per GPU."""


def load_process(args: argparse.Namespace, barrier: Any, results: Any) -> None:
    """Run vLLM's benchmark, which waits for ``barrier`` before its first request. Put its result into ``results``."""
    sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - open until this process ends
    from vllm.benchmarks import serve  # noqa: PLC0415, TID251 - the load tool is vLLM's

    benchmark = serve.benchmark

    @functools.wraps(benchmark)
    async def wait_and_benchmark(*args: Any, **kwargs: Any) -> Any:
        barrier.wait(600)
        return await benchmark(*args, **kwargs)

    serve.benchmark = wait_and_benchmark
    try:
        result = asyncio.run(serve.main_async(args))
        results.put(
            {
                key: result[key]
                for key in (
                    "duration",
                    "completed",
                    "total_input_tokens",
                    "total_output_tokens",
                    "ttfts",
                    "itls",
                    "errors",
                )
            }
        )
    except BaseException as error:
        barrier.abort()
        results.put({"error": repr(error)})
        raise


def measure(
    model: Path,
    ports: Sequence[int],
    workload: Workload,
    *,
    requests: int,
    rate: float,
    clients: int,
    seed: int,
    name: str = "shape",
) -> dict[str, Any]:
    """Load the servers on ``ports`` from ``clients`` processes, and return the result of all of them as one row.

    ``name``: the served model's name. ``model``: the folder with its tokenizer. Every ``len(ports)``-th process uses
    the same server. ``rate``: requests per second of all processes together. Infinite: all requests at once.

    Raises:
        RuntimeError: the load tool failed, or no request got an answer.
    """
    from vllm.benchmarks import serve  # noqa: PLC0415, TID251 - as above
    from vllm.utils.argparse_utils import FlexibleArgumentParser  # noqa: PLC0415, TID251 - as above

    parser = FlexibleArgumentParser()
    serve.add_cli_args(parser)
    fork = multiprocessing.get_context("fork")
    shares = [share for share in split_requests(requests, clients, workload.multiple) if share]
    sent = sum(shares)
    barrier, results = fork.Barrier(len(shares)), fork.Queue()
    processes = []
    for number, share in enumerate(shares):
        args = parser.parse_args(
            [f"--base-url=http://127.0.0.1:{ports[number % len(ports)]}", f"--model={name}", f"--tokenizer={model}",
             *workload.flags, f"--num-prompts={share}", f"--request-rate={rate * share / sent}",
             f"--seed={seed * 1000 + number}", "--ignore-eos", "--save-detailed", "--disable-tqdm",
             "--temperature=0", "--percentile-metrics=ttft,itl"]
        )  # fmt: skip
        processes.append(fork.Process(target=load_process, args=(args, barrier, results)))
        processes[-1].start()
    try:
        parts = [next_result(results, processes) for _ in processes]
    except BaseException:  # otherwise the other processes continue
        for process in processes:
            process.kill()
        raise
    finally:
        for process in processes:
            process.join()
    if failures := [part["error"] for part in parts if "error" in part]:
        raise RuntimeError(failures[0])
    errors = [error for part in parts for error in part["errors"] if error]
    if not any(part["completed"] for part in parts):
        raise RuntimeError(f"no request got an answer: {errors[0] if errors else 'the load tool gives no reason'}")
    seconds = max(part["duration"] for part in parts)
    ttfts = [ttft for part in parts for ttft in part["ttfts"] if ttft]
    itls = [itl for part in parts for gaps in part["itls"] for itl in gaps]
    return {
        "requests": sent,
        "rate": None if rate == float("inf") else rate,
        "completed": sum(part["completed"] for part in parts),
        "failed": len(errors),
        "seconds": round(seconds, 1),
        "input_tokens": sum(part["total_input_tokens"] for part in parts),
        "output_tok_s": round(sum(part["total_output_tokens"] for part in parts) / seconds, 1),
        "ttft_ms": percentiles(ttfts),
        "itl_ms": percentiles(itls),
    }


def split_requests(requests: int, clients: int, multiple: int = 1) -> list[int]:
    """Return how many requests each of ``clients`` sends: as equal as possible, each a multiple of ``multiple``.

    The sum is ``requests``, rounded up to the next multiple.
    """
    each, more = divmod(-(-requests // multiple), clients)
    return [(each + (number < more)) * multiple for number in range(clients)]


def next_result(results: Any, processes: Sequence[Any]) -> dict[str, Any]:
    """Return the result of the next load process that ends.

    Raises:
        RuntimeError: a load process was killed and gives no result.
    """
    while True:
        try:
            return dict(results.get(timeout=5))
        except queue.Empty:
            if killed := [process.exitcode for process in processes if (process.exitcode or 0) < 0]:
                raise RuntimeError(f"a load process was killed by signal {-killed[0]}") from None


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Return the percentiles 50 and 99 in milliseconds. Empty without values: an answer of one token has no ITL."""
    import numpy as np  # noqa: PLC0415 - vLLM has it

    if not seconds:
        return {}
    return {f"p{cut}": round(float(np.percentile(seconds, cut)) * 1000, 2) for cut in (50, 99)}
