#!/usr/bin/env python3
"""The highest gpu-memory-utilization that survives the worst load that the API allows, and what that load needs.

``python benchmarks/gpu/edge.py --tokenizer FOLDER --out FILE`` needs vLLM and an idle GPU. First the launcher's own
plan, then vLLM's server at other utilisations, halving between the last that survived and the first that did not. The
load: first ``BURST`` prompts of 32 tokens at once behind a few long ones; then as many streams as ``max_num_seqs``
allows, prompts of 16 to 6,000 tokens, temperature 0.8, top-p 0.9, top-k, penalties, logprobs, and prompt logprobs for
every eighth. Bytes; ``beyond`` is by how much PyTorch's allocations under load rose above what was allocated before,
``least_free`` what the device had left at the worst.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
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
LONG_EVERY, PROMPT_LOGPROBS_EVERY = 16, 8
"""Streams with long prompts, and those that ask for logprobs of their prompt, half of which are long. The others have
short ones, so that nearly all streams decode at once while those are read."""

LONG_BEFORE, BURST = 16, 992
"""Short prompts that wait while long ones are read are then read in one batch, beside contexts that are long by then:
where FlashAttention 3 needs most (vllm_launch/sizing/memory.py:_attention), and as many as it splits anything for."""

PATIENCE_S = 300
MOST_TOLD = 5
FLOOR = 0.92
"""vLLM's default: where halving begins when nothing has survived yet."""


def body(seed: int, chance: random.Random, vocabulary: int, longest: int) -> dict[str, Any]:
    """One request of stream ``seed``.

    Logprobs are few, as more are the API server's work and no GPU memory. None is greedy or has a seed of its own: one
    of those in a batch takes all of it to a sampler that needs less (v1/worker/gpu/sample/sampler.py:sample).
    """
    length = longest if not seed % LONG_EVERY else chance.choice((16, min(200, longest)))
    asked = {
        "stream": True, "ignore_eos": True, "max_tokens": chance.randrange(200, 400),
        "prompt": [chance.randrange(5, vocabulary) for _ in range(length)], "temperature": 0.8, "top_p": 0.9,
        "top_k": 50, "presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1, "logprobs": 2,
    }  # fmt: skip
    if not seed % PROMPT_LOGPROBS_EVERY:
        asked |= {"stream": False, "prompt_logprobs": 1, "max_tokens": 8}
    return asked


class Load:
    """The worst that the API allows, and what became of it: ``told``.

    ``late``: answers that took longer than ``PATIENCE_S``, which is no failure of the engine's memory;
    ``most_running``: requests that the engine had in one batch.
    """

    def __init__(self, port: int, vocabulary: int, longest: int, *, model: str = "shape", key: str = "") -> None:
        self.url, self.port, self.model = f"http://127.0.0.1:{port}", port, model
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.vocabulary, self.longest = vocabulary, longest
        self.told: dict[str, Any] = {"done": 0, "late": 0, "failed": 0, "why": [], "most_running": 0}

    async def run(self, seconds: float) -> dict[str, Any]:
        """The burst, and when it is over ``STREAMS`` streams at a time for ``seconds``."""
        connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=PATIENCE_S)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=self.headers) as session:
            looking = asyncio.create_task(self._look(session))
            await self._burst(session)
            deadline = time.monotonic() + seconds
            await asyncio.gather(*(self._stream(session, seed, deadline) for seed in range(STREAMS)))
            looking.cancel()
        return self.told

    async def _burst(self, session: aiohttp.ClientSession) -> None:
        plain = {"stream": True, "ignore_eos": True}
        async with asyncio.TaskGroup() as together:
            for number in range(LONG_BEFORE + BURST):
                long = number < LONG_BEFORE
                length, output = (self.longest, 200) if long else (32, 2)
                prompt = [random.randrange(5, self.vocabulary) for _ in range(length)]
                together.create_task(self._ask(session, plain | {"prompt": prompt, "max_tokens": output}))
                if number == LONG_BEFORE - 1:
                    await asyncio.sleep(0.2)  # so that these come first

    async def _stream(self, session: aiohttp.ClientSession, seed: int, deadline: float) -> None:
        chance = random.Random(seed)
        while time.monotonic() < deadline:
            if not await self._ask(session, body(seed, chance, self.vocabulary, self.longest)):
                return

    async def _ask(self, session: aiohttp.ClientSession, asked: dict[str, Any]) -> bool:
        """Whether it is worth asking again."""
        try:
            async with session.post(f"{self.url}/v1/completions", json={"model": self.model, **asked}) as answer:
                text = await answer.read()
        except TimeoutError:
            self.told["late"] += 1
            return True
        except (aiohttp.ClientError, OSError) as error:
            self._failed(repr(error))
            return bench.healthy(self.port)
        if answer.status == 200 and (b"[DONE]" in text[-20:] or not asked["stream"]):  # noqa: PLR2004
            self.told["done"] += 1
        else:
            self._failed(text[-200:].decode(errors="replace"))
        return True

    def _failed(self, why: str) -> None:
        self.told["failed"] += 1
        self.told["why"] = [*self.told["why"], why][:MOST_TOLD]

    async def _look(self, session: aiohttp.ClientSession) -> None:
        while True:
            answer = await scrape.get_metrics(session, f"{self.url}/metrics", 10)
            engines = scrape.read(answer.body).engines.values() if answer.ok else ()
            running = sum(round(engine.running) for engine in engines)
            self.told["most_running"] = max(self.told["most_running"], running)
            await asyncio.sleep(0.5)


def rpc(port: int, method: str, **kwargs: object) -> list[dict[str, int]]:
    """A method of ``terms.Terms`` on every worker."""
    data = json.dumps({"method": method, "kwargs": kwargs}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/collective_rpc", data, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        results: list[dict[str, int]] = json.load(answer)["results"]
    return results


class Least:
    """The least free memory of GPU 0 while it is open, as NVML has it."""

    def __enter__(self) -> Self:
        self.free, self._done = 1 << 62, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        with contextlib.suppress(nvml.NvmlUnavailable), nvml.open_nvml() as opened:
            while not self._done.wait(0.1):
                if (memory := opened.memory(0)) is not None:
                    self.free = min(self.free, memory.free)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def tried(command: list[str], log: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Whether a server of ``command`` survives the load, and what it took."""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])  # for terms.Terms
    env = bench.environment() | {"VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": path}  # for /collective_rpc
    shape = bench.SHAPES[options.shape]
    row: dict[str, Any] = {"survived": False}
    try:
        with bench.start_server(command, log, env=env), Least() as least:
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
            row["survived"] = bool(row["load"]["done"]) and not row["load"]["failed"]
    except (bench.ServerFailedError, OSError) as error:
        row["error"] = str(error)[-600:]
    text = log.read_text(errors="replace")
    row["out_of_memory"] = "OutOfMemoryError" in text or "out of memory" in text
    return row


def main() -> int:
    parser = bench.parser(__doc__)
    parser.add_argument("--seconds", type=float, default=45, help="of load at each utilisation")
    parser.add_argument(
        "--utilization", type=float, action="append", default=[], help="after the plan only these, and no halving"
    )
    parser.add_argument("--tries", type=int, default=4)
    parser.add_argument("--no-plan", action="store_true")
    options, flags = parser.parse_known_args()
    result = Result(options.out, "edge")
    extension = ["--worker-extension-cls=terms.Terms", *flags]
    good = True
    with tempfile.TemporaryDirectory() as name:
        model = bench.model_folder(options.shape, options.tokenizer, Path(name))
        logs = options.out.parent / "logs"
        survived: float | None = None
        dies = 0.999
        if not options.no_plan:
            row = tried(bench.launcher_command(model, extension), logs / "edge-plan.log", options)
            said = (logs / "edge-plan.log").read_text(errors="replace")
            found = re.search(r"--gpu-memory-utilization=([\d.]+)", said)
            at = float(found[1]) if found else None
            result.add(utilization=at, by="plan", shape=options.shape, flags=flags, **row)
            if good := row["survived"]:
                survived = at
            elif at is not None:
                dies = at
        for number in range(len(options.utilization) or options.tries):
            at = options.utilization[number] if options.utilization else round(((survived or FLOOR) + dies) / 2, 4)
            words = [f"--gpu-memory-utilization={at}", *extension]
            row = tried(bench.vllm_command(model, words), logs / f"edge-{at}.log", options)
            result.add(utilization=at, by="hand", shape=options.shape, flags=flags, **row)
            if row["survived"]:
                survived = max(at, survived or 0)
            else:
                dies = min(at, dies)
        result.content["highest_that_survived"] = survived
        result.write()
    return int(not good)


if __name__ == "__main__":
    bench.run(main)
