"""The load on a server: vLLM's own ``vllm bench serve``, from several processes that begin together.

One of them is slower than two GPUs. Weights are dummies, so ``ignore_eos`` is set and every answer has its full length.
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
    """``requests`` for one GPU at saturation; ``rates`` are requests a second for one GPU.

    ``multiple``: of how many requests what a load process sends is, for the load tool leaves out the rest.
    """

    flags: tuple[str, ...]
    requests: int
    rates: tuple[float, ...]
    multiple: int = 1


PREFIXES = 4

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
"""Input and output tokens of a request. "shared prefixes": PREFIXES beginnings of 2,048 tokens for each load process,
256 tokens of its own, 256 out."""

CLIENTS_PER_GPU = 4


def client(args: argparse.Namespace, together: Any, told: Any) -> None:
    """One load process: vLLM's benchmark, held until all are ready to begin."""
    sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - until this process ends
    from vllm.benchmarks import serve  # noqa: PLC0415, TID251 - the load tool is vLLM's

    plain = serve.benchmark

    @functools.wraps(plain)
    async def held(*args: Any, **kwargs: Any) -> Any:
        together.wait(600)
        return await plain(*args, **kwargs)

    serve.benchmark = held
    try:
        found = asyncio.run(serve.main_async(args))
        told.put(
            {
                key: found[key]
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
        together.abort()
        told.put({"error": repr(error)})
        raise


def measured(
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
    """What ``clients`` processes together saw of the model served as ``name``, whose tokenizer is in ``model``.

    Every ``len(ports)``-th asks the same server. ``rate`` is requests a second of all together, infinite: all at once.

    Raises:
        RuntimeError: the load tool failed, or no request was answered.
    """
    from vllm.benchmarks import serve  # noqa: PLC0415, TID251 - as above
    from vllm.utils.argparse_utils import FlexibleArgumentParser  # noqa: PLC0415, TID251 - as above

    options = FlexibleArgumentParser()
    serve.add_cli_args(options)
    fork = multiprocessing.get_context("fork")
    shares = [share for share in shared(requests, clients, workload.multiple) if share]
    sent = sum(shares)
    together, told = fork.Barrier(len(shares)), fork.Queue()
    processes = []
    for number, share in enumerate(shares):
        args = options.parse_args(
            [f"--base-url=http://127.0.0.1:{ports[number % len(ports)]}", f"--model={name}", f"--tokenizer={model}",
             *workload.flags, f"--num-prompts={share}", f"--request-rate={rate * share / sent}",
             f"--seed={seed * 1000 + number}", "--ignore-eos", "--save-detailed", "--disable-tqdm",
             "--temperature=0", "--percentile-metrics=ttft,itl"]
        )  # fmt: skip
        processes.append(fork.Process(target=client, args=(args, together, told)))
        processes[-1].start()
    try:
        parts = [next_of(told, processes) for _ in processes]
    except BaseException:  # or the others would ask on
        for process in processes:
            process.kill()
        raise
    finally:
        for process in processes:
            process.join()
    if wrong := [part["error"] for part in parts if "error" in part]:
        raise RuntimeError(wrong[0])
    errors = [error for part in parts for error in part["errors"] if error]
    if not any(part["completed"] for part in parts):
        raise RuntimeError(f"no request was answered: {errors[0] if errors else 'nobody says why'}")
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


def shared(requests: int, clients: int, multiple: int = 1) -> list[int]:
    """How many each of ``clients`` sends, as evenly as can be in multiples; together the next multiple, if need be."""
    each, more = divmod(-(-requests // multiple), clients)
    return [(each + (number < more)) * multiple for number in range(clients)]


def next_of(told: Any, processes: Sequence[Any]) -> dict[str, Any]:
    """What the next load process says.

    Raises:
        RuntimeError: one was killed, and will say nothing.
    """
    while True:
        try:
            return dict(told.get(timeout=5))
        except queue.Empty:
            if killed := [process.exitcode for process in processes if (process.exitcode or 0) < 0]:
                raise RuntimeError(f"a load process was killed by signal {-killed[0]}") from None


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Milliseconds; nothing of nothing, such as gaps between answers of one token."""
    import numpy as np  # noqa: PLC0415 - vLLM has it

    if not seconds:
        return {}
    return {f"p{cut}": round(float(np.percentile(seconds, cut)) * 1000, 2) for cut in (50, 99)}
