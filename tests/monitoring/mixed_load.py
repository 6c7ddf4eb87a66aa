"""Load as users make it, against one vLLM, for some seconds: what became of it as JSON on stdout.

usage: mixed_load.py URL MODEL SECONDS AT_A_TIME LONGEST [KEY]

AT_A_TIME requests run at a time; LONGEST is the model's length in tokens. Short chats, long prompts, a shared system prompt,
clients that leave in the middle, some that ask for what is not there. The order is the same each time.
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


async def main() -> None:
    url, model, seconds, at_a_time, longest, *key = sys.argv[1:]
    became: Counter[str] = Counter()
    headers = {"Authorization": f"Bearer {key[0]}"} if key else {}
    deadline = asyncio.get_running_loop().time() + float(seconds)
    async with aiohttp.ClientSession(url, headers=headers, timeout=aiohttp.ClientTimeout(total=300)) as session:

        async def client(number: int) -> None:
            chance = random.Random(number)
            while asyncio.get_running_loop().time() < deadline:
                (kind,) = chance.choices(list(KINDS), list(KINDS.values()))
                try:
                    became[await ask(session, model, int(longest), kind, chance)] += 1
                except (aiohttp.ClientError, TimeoutError):
                    became[f"{kind} failed"] += 1
                    await asyncio.sleep(0.2)

        await asyncio.gather(*(client(number) for number in range(int(at_a_time))))
    print(json.dumps(became))


def words(chance, tokens) -> str:
    """About so many tokens of a byte-level tokenizer: a byte each."""
    return "".join(chance.choices("abcdefghijklmnopqrstuvwxyz ", k=max(tokens, 1)))


async def ask(session, model, longest, kind, chance) -> str:
    """One request; what became of it."""
    size = {"long": 0.6, "shared": 0.05}.get(kind, 0.1)
    answer = int(longest * (0.1 if kind == "long" else 0.2) * chance.uniform(0.2, 1))
    prompt = words(chance, int(longest * size * chance.uniform(0.3, 1)))
    if kind == "shared":
        prompt = words(random.Random(0), int(longest * 0.4)) + prompt
    body = {"model": model, "prompt": prompt, "max_tokens": answer, "ignore_eos": True, "stream": kind != "whole"}
    body |= USAGE if body["stream"] else {}
    if kind == "wrong":
        body["model"] = "no-such-model"
    async with session.post("/v1/completions", json=body) as response:
        if kind == "left":
            async for _ in response.content:
                if chance.random() < 0.1:
                    return "left"
        text = await response.text()
        if response.status >= 500:
            await asyncio.sleep(0.2)  # as a client that tries again would
    if kind == "wrong":
        return f"wrong: {response.status}"
    whole = cut(text.splitlines(), answer) is None if body["stream"] else '"choices"' in text
    return f"{kind}: {'whole' if response.status == 200 and whole else f'cut, {response.status}'}"


asyncio.run(main())
