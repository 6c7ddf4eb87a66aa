#!/usr/bin/env python3
"""Find the highest gpu-memory-utilization that survives the worst load that the API allows, and the memory it needs.

``python benchmarks/gpu/edge.py --tokenizer FOLDER --out FILE`` needs vLLM and an idle GPU. It measures the launcher's
plan first, ``--plans`` times, each time with a new server. The exit code is 1 unless all of them survived. Then it
measures vLLM's own server at other utilisations, by bisection between the highest that survived and the lowest that
failed. The load starts with ``BURST`` prompts of 32 tokens at once, behind a few long ones. Then come as many streams
as ``max_num_seqs`` allows: prompts of 16 to 6,000 tokens, temperature 0.8, top-p 0.9, top-k, penalties, logprobs, and
prompt logprobs for every eighth. Sizes are bytes. ``beyond`` is the rise of PyTorch's allocations under load,
``least_free`` the lowest free memory of the device.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import random
import re
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any, Self

import aiohttp
import bench
from result import Result

from vllm_health import nvml, scrape

STREAMS = 1024
"""Concurrent streams: vLLM's default for max_num_seqs on such GPUs."""
LONG_EVERY, PROMPT_LOGPROBS_EVERY = 16, 8
"""Every 16th stream has a long prompt. Every 8th asks for prompt logprobs, so half of these have long prompts. The
other prompts are short, so that nearly all streams decode while vLLM reads the long ones."""

LONG_BEFORE, BURST = 16, 992
"""Number of long prompts, and of short prompts that wait while vLLM reads the long ones. vLLM then reads the short ones
in one batch beside long contexts. There FlashAttention 3 needs the most memory
(vllm_launch/sizing/memory.py:_attention). 992 is the largest number for which it splits its work."""

TIMEOUT_S = 300
"""Seconds after which a request counts as late."""
MAX_ERRORS = 5
"""Largest number of errors that a row contains."""
FLOOR = 0.92
"""vLLM's default utilisation: the lower end of the bisection as long as nothing has survived."""


def request_body(seed: int, rng: random.Random, vocabulary: int, longest: int) -> dict[str, Any]:
    """Return one request of stream ``seed``.

    It asks for few logprobs: more would cost the API server time but no GPU memory. No request is greedy or has a seed:
    one of those in a batch moves the whole batch to a sampler that needs less memory
    (v1/worker/gpu/sample/sampler.py:sample).
    """
    length = longest if not seed % LONG_EVERY else rng.choice((16, min(200, longest)))
    body = {
        "stream": True, "ignore_eos": True, "max_tokens": rng.randrange(200, 400),
        "prompt": [rng.randrange(5, vocabulary) for _ in range(length)], "temperature": 0.8, "top_p": 0.9,
        "top_k": 50, "presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1, "logprobs": 2,
    }  # fmt: skip
    if not seed % PROMPT_LOGPROBS_EVERY:
        body |= {"stream": False, "prompt_logprobs": 1, "max_tokens": 8}
    return body


class Load:
    """The worst load that the API allows, and its results in ``counts``.

    ``late``: answers that took longer than ``TIMEOUT_S``, which does not mean that the engine ran out of memory.
    ``most_running``: largest number of running requests.
    """

    def __init__(self, port: int, vocabulary: int, longest: int, *, model: str = "shape", key: str = "") -> None:
        self.url, self.port, self.model = f"http://127.0.0.1:{port}", port, model
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.vocabulary, self.longest = vocabulary, longest
        self.counts: dict[str, Any] = {"done": 0, "late": 0, "failed": 0, "why": [], "most_running": 0}

    async def run(self, seconds: float) -> dict[str, Any]:
        """Send the burst, then ``STREAMS`` concurrent streams for ``seconds``, then cut them. Return ``counts``."""
        # A connection serves one request: vLLM closes an idle connection after 5 s, perhaps while a request arrives.
        connector, timeout = aiohttp.TCPConnector(limit=0, force_close=True), aiohttp.ClientTimeout(total=TIMEOUT_S)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=self.headers) as session:
            sampler = asyncio.create_task(self._sample_running(session))
            await self._burst(session)
            streams = [asyncio.create_task(self._stream(session, seed)) for seed in range(STREAMS)]
            await asyncio.sleep(seconds)
            for task in (sampler, *streams):
                task.cancel()
            await asyncio.gather(sampler, *streams, return_exceptions=True)
        return self.counts

    async def _burst(self, session: aiohttp.ClientSession) -> None:
        plain = {"stream": True, "ignore_eos": True}
        async with asyncio.TaskGroup() as group:
            for number in range(LONG_BEFORE + BURST):
                long = number < LONG_BEFORE
                length, output = (self.longest, 200) if long else (32, 2)
                prompt = [random.randrange(5, self.vocabulary) for _ in range(length)]
                group.create_task(self._ask(session, plain | {"prompt": prompt, "max_tokens": output}))
                if number == LONG_BEFORE - 1:
                    await asyncio.sleep(0.2)  # the long prompts must arrive first

    async def _stream(self, session: aiohttp.ClientSession, seed: int) -> None:
        rng = random.Random(seed)
        while await self._ask(session, request_body(seed, rng, self.vocabulary, self.longest)):
            pass

    async def _ask(self, session: aiohttp.ClientSession, body: dict[str, Any]) -> bool:
        """Send one request and count its result. Return whether the server can take another."""
        try:
            async with session.post(f"{self.url}/v1/completions", json={"model": self.model, **body}) as answer:
                text = await answer.read()
        except TimeoutError:
            self.counts["late"] += 1
            return True
        except (aiohttp.ClientError, OSError) as error:
            self._failed(repr(error))
            return bench.healthy(self.port)
        # vLLM sends [DONE] after an error too. In generated text the quotes of "error" would be escaped.
        ended = b"[DONE]" in text[-20:] and b'"finish_reason":"abort"' not in text.replace(b" ", b"")
        if answer.status == 200 and b'"error":' not in text and (ended or not body["stream"]):  # noqa: PLR2004
            self.counts["done"] += 1
        else:
            self._failed(text[-200:].decode(errors="replace"))
        return True

    def _failed(self, error: str) -> None:
        self.counts["failed"] += 1
        self.counts["why"] = [*self.counts["why"], error][:MAX_ERRORS]

    async def _sample_running(self, session: aiohttp.ClientSession) -> None:
        while True:
            answer = await scrape.get_metrics(session, f"{self.url}/metrics", 10)
            engines = scrape.read(answer.body).engines.values() if answer.ok else ()
            running = sum(round(engine.running) for engine in engines)
            self.counts["most_running"] = max(self.counts["most_running"], running)
            await asyncio.sleep(0.5)


def rpc(port: int, method: str, **kwargs: object) -> list[dict[str, int]]:
    """Call a method of ``terms.Terms`` on every worker, and return the results."""
    data = json.dumps({"method": method, "kwargs": kwargs}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/collective_rpc", data, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        results: list[dict[str, int]] = json.load(answer)["results"]
    return results


def first_gpu() -> int:
    """Return NVML's index of the GPU that the server uses: the first in CUDA_VISIBLE_DEVICES, or 0."""
    return int(os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0])


class LeastFreeMemory:
    """Context that samples NVML. ``free``: the least free memory in bytes of ``first_gpu`` while it is open."""

    def __enter__(self) -> Self:
        self.free, self._done = 1 << 62, threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def _sample(self) -> None:
        gpu = first_gpu()
        with contextlib.suppress(nvml.NvmlUnavailable), nvml.open_nvml() as opened:
            while not self._done.wait(0.1):
                if (memory := opened.memory(gpu)) is not None:
                    self.free = min(self.free, memory.free)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def measure_utilization(command: list[str], log: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Start ``command``, run the load, and return the row: whether the server survived, and the memory that it used."""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])  # for terms.Terms
    env = bench.environment() | {"VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": path}  # for /collective_rpc
    shape = bench.SHAPES[options.shape]
    row: dict[str, Any] = {"survived": False}
    try:
        with bench.start_server(command, log, env=env), LeastFreeMemory() as least:
            row["kv_tokens"] = bench.kv_cache_tokens(bench.PORT)
            before = rpc(bench.PORT, "memory_now", forget_peak=True)[0]
            row["before"] = before
            longest = min(6000, shape["max_position_embeddings"] - 256)
            load = Load(bench.PORT, shape["vocab_size"] - 1, longest)
            row["load"] = asyncio.run(load.run(options.seconds))
            row["least_free"] = least.free
            after = rpc(bench.PORT, "memory_now")[0]
            row |= {"after": after, "beyond": after["peak_allocated"] - before["allocated"]}
            row["reserved_rise"] = after["peak_reserved"] - before["reserved"]
            alive = bench.healthy(bench.PORT)
            row["survived"] = alive and bool(row["load"]["done"]) and not row["load"]["failed"]
    except (bench.ServerFailedError, OSError) as error:
        row["error"] = str(error)[-600:]
    text = log.read_text(errors="replace")
    row["out_of_memory"] = "OutOfMemoryError" in text or "out of memory" in text
    return row


def main() -> int:
    parser = bench.parser(__doc__)
    parser.add_argument("--seconds", type=float, default=45, help="seconds of load at each utilisation")
    parser.add_argument(
        "--utilization", type=float, action="append", default=[], help="after the plan, measure only these utilisations"
    )
    parser.add_argument("--stop-after", type=float, default=math.inf, help="seconds after which no new server starts")
    parser.add_argument("--tries", type=int, default=4, help="steps of the bisection")
    parser.add_argument("--plans", type=int, default=1, help="how often to measure the launcher's plan, 0 for never")
    options, flags = parser.parse_known_args()
    result, began = Result(options.out, "edge"), time.monotonic()
    extension = ["--worker-extension-cls=terms.Terms", *flags]
    good = True
    with tempfile.TemporaryDirectory() as name:
        model = bench.model_folder(options.shape, options.tokenizer, Path(name))
        logs = options.out.parent / "logs"
        survived: float | None = None
        lowest_failed = 0.999
        for number in range(options.plans):
            if time.monotonic() - began > options.stop_after:
                break
            log = logs / f"edge-plan-{number}.log"
            row = measure_utilization(bench.launcher_command(model, extension), log, options)
            log_text = log.read_text(errors="replace")
            match = re.search(r"--gpu-memory-utilization=([\d.]+)", log_text)
            utilization = float(match[1]) if match else None
            result.add(utilization=utilization, by="plan", shape=options.shape, flags=flags, **row)
            good = good and row["survived"]
            if good:
                survived = utilization
            elif utilization is not None:
                lowest_failed, survived = utilization, None
        for number in range(len(options.utilization) or options.tries):
            middle = round(((survived or FLOOR) + lowest_failed) / 2, 4)
            utilization = options.utilization[number] if options.utilization else middle
            words = [f"--gpu-memory-utilization={utilization}", *extension]
            row = measure_utilization(bench.vllm_command(model, words), logs / f"edge-{utilization}.log", options)
            result.add(utilization=utilization, by="hand", shape=options.shape, flags=flags, **row)
            if row["survived"]:
                survived = max(utilization, survived or 0)
            else:
                lowest_failed = min(utilization, lowest_failed)
        result.content["highest_that_survived"] = survived
        result.write()
    return int(not good)


if __name__ == "__main__":
    bench.run(main)
