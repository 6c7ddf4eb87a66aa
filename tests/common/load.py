"""Keeps streams running against a server, as a separate process: ``load.py URL KEY STREAMS LEAVE TOKENS``.

Each of the STREAMS clients sends its next request when a response ends. With probability LEAVE, a client disconnects
in the middle of a response. SIGTERM ends the program, which then prints the counts of its requests as JSON.
"""

import asyncio
import json
import random
import signal
import sys

import aiohttp
from streams import USAGE, cut

url, key, streams, leave, tokens = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), int(sys.argv[5])
counts = {"done": 0, "left": 0, "failed": 0, "why": []}


def count_failure(reason):
    counts["failed"] += 1
    counts["why"] = [*counts["why"], reason][-5:]


async def stream(session, chance):
    body = {
        "model": "tiny",
        "prompt": "hi "
        * chance.randrange(1, 30),  # at most 87 tokens: with 400 more they fit into the 512 of the server
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": True,
    } | USAGE
    leaves_after = chance.randrange(1, tokens) if chance.random() < leave else None
    try:
        async with session.post(f"{url}/v1/completions", json=body) as answer:
            lines = []
            async for line in answer.content:
                lines += [line] * line.startswith(b"data: ")
                if leaves_after is not None and len(lines) >= leaves_after:
                    counts["left"] += 1
                    return
        if reason := cut(lines, tokens):
            count_failure(reason)
        else:
            counts["done"] += 1
    except (aiohttp.ClientError, OSError) as error:
        count_failure(repr(error))
        await asyncio.sleep(0.2)


async def main():
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)

    async def client(seed):
        chance = random.Random(seed)
        while True:
            await stream(session, chance)

    headers = {"Authorization": f"Bearer {key}"}
    connector, timeout = aiohttp.TCPConnector(limit=0, force_close=True), aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(headers=headers, connector=connector, timeout=timeout) as session:
        tasks = [asyncio.create_task(client(seed)) for seed in range(streams)]
        await ended.wait()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    print(json.dumps(counts))


asyncio.run(main())
