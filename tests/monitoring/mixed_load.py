"""Send a realistic load to one vLLM for some seconds, and print the number of each outcome as JSON.

usage: mixed_load.py URL MODEL SECONDS CONCURRENCY MAX_MODEL_LEN [KEY]

Kinds of requests: short chats, long prompts, a shared system prompt, clients that disconnect ("left"), responses
without streaming ("whole"), and a wrong model name ("wrong"). The order is the same in each run.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections import Counter
from pathlib import Path

import aiohttp

sys.path.append(str(Path(__file__).parents[1] / "common"))
from streams import USAGE, cut

KINDS = {"short": 8, "long": 2, "shared": 4, "left": 2, "whole": 3, "wrong": 1}
"""Relative frequency of each kind of request."""


async def main() -> None:
    url, model, seconds, concurrency, max_model_len, *key = sys.argv[1:]
    outcomes: Counter[str] = Counter()
    headers = {"Authorization": f"Bearer {key[0]}"} if key else {}
    deadline = asyncio.get_running_loop().time() + float(seconds)
    async with aiohttp.ClientSession(url, headers=headers, timeout=aiohttp.ClientTimeout(total=600)) as session:

        async def client(number: int) -> None:
            generator = random.Random(number)
            while asyncio.get_running_loop().time() < deadline:
                (kind,) = generator.choices(list(KINDS), list(KINDS.values()))
                try:
                    outcomes[await ask(session, model, int(max_model_len), kind, generator)] += 1
                except (aiohttp.ClientError, TimeoutError):
                    outcomes[f"{kind} failed"] += 1
                    await asyncio.sleep(0.2)

        await asyncio.gather(*(client(number) for number in range(int(concurrency))))
    print(json.dumps(outcomes))


def words(generator, tokens) -> str:
    """Return a text of ``tokens`` tokens for a byte-level tokenizer, one byte each."""
    return "".join(generator.choices("abcdefghijklmnopqrstuvwxyz ", k=max(tokens, 1)))


async def ask(session, model, max_model_len, kind, generator) -> str:
    """Send one request and return its outcome."""
    size = {"long": 0.6, "shared": 0.05}.get(kind, 0.1)
    output_tokens = int(max_model_len * (0.1 if kind == "long" else 0.2) * generator.uniform(0.2, 1))
    prompt = words(generator, int(max_model_len * size * generator.uniform(0.3, 1)))
    if kind == "shared":
        prompt = words(random.Random(0), int(max_model_len * 0.4)) + prompt
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": output_tokens,
        "ignore_eos": True,
        "stream": kind != "whole",
    }
    body |= USAGE if body["stream"] else {}
    if kind == "wrong":
        body["model"] = "no-such-model"
    async with session.post("/v1/completions", json=body) as response:
        begun = ""
        if kind == "left":
            async for line in response.content:
                if generator.random() < 0.1:
                    return "left"
                begun += line.decode()  # a client may also read a short answer to its end
        text = begun + await response.text()
        if response.status >= 500:
            await asyncio.sleep(0.2)  # like a client that retries
    if kind == "wrong":
        return f"wrong: {response.status}"
    complete = cut(text.splitlines(), output_tokens) is None if body["stream"] else '"choices"' in text
    return f"{kind}: {'whole' if response.status == 200 and complete else f'cut, {response.status}'}"


asyncio.run(main())
