"""Clients of a Service until stdin ends: ``traffic.py URL KEY STREAMS TOKENS``.

STREAMS long streams at a time, each with a connection of its own, asked for again when it has ended; and twice a second
a short request, in turn on a new connection and on one that is kept. Ends with stdin, and with it the streams that are
under way then: whatever could cut them should have come by. Prints one line when all streams have begun, and what became of all as JSON in the last.
"""

import asyncio
import itertools
import json
import sys
import time
from pathlib import Path

import aiohttp

sys.path.append(str(Path(__file__).parents[1] / "common"))
from streams import USAGE, cut

url, key, streams, tokens = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
became = {"streams": 0, "cut": [], "requests": 0, "failed": [], "shortest_s": 1e9, "begun": 0}
all_begun = asyncio.Event()
LONG = {"model": "tiny", "prompt": "hi", "max_tokens": tokens, "ignore_eos": True, "stream": True} | USAGE
SHORT = {"model": "tiny", "prompt": "hi", "max_tokens": 1}


async def stream(session, *, first):
    began, lines = time.monotonic(), []
    try:
        async with session.post(f"{url}/v1/completions", json=LONG) as answer:
            if answer.status != 200:
                became["failed"].append(f"stream: {answer.status}")
                await asyncio.sleep(1)
                return
            async for line in answer.content:
                became["begun"] += not lines and line.startswith(b"data: ")
                if became["begun"] == streams:
                    all_begun.set()
                lines += [line] * line.startswith(b"data: ")
    except (aiohttp.ClientError, OSError) as error:
        became["cut" if lines else "failed"].append(f"stream after {len(lines)} pieces: {error!r}")
        await asyncio.sleep(1)
        return
    if why := cut(lines, tokens):
        became["cut"].append(f"stream of {len(lines)} pieces and {time.monotonic() - began:.1f} s: {why}")
    became["streams"] += 1
    if first:  # those that all run when it begins; a later one may have a new pod to itself, and be quick
        became["shortest_s"] = min(became["shortest_s"], round(time.monotonic() - began, 1))


async def keep_streaming(session):
    for number in itertools.count():
        await stream(session, first=number == 0)


async def short(session, how):
    became["requests"] += 1
    try:
        async with session.post(f"{url}/v1/completions", json=SHORT) as answer:
            text = await answer.text()
            if answer.status != 200:
                became["failed"].append(f"{how}: {answer.status} {text[:200]}")
    except (aiohttp.ClientError, OSError) as error:
        became["failed"].append(f"{how}: {error!r}")


async def main():
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    forever = aiohttp.ClientTimeout(total=None)
    bearer = {"Authorization": f"Bearer {key}"}
    new = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=True), timeout=forever, headers=bearer
    )
    kept = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1), timeout=forever, headers=bearer)
    async with new, kept:
        long = [asyncio.create_task(keep_streaming(new)) for _ in range(streams)]
        running = []
        await all_begun.wait()
        print("all streams run", flush=True)
        stdin = asyncio.create_task(reader.read())
        for session, how in itertools.cycle([(new, "new connection"), (kept, "kept connection")]):
            if stdin.done():
                break
            running.append(asyncio.create_task(short(session, how)))
            await asyncio.sleep(0.5)
        for task in long:
            task.cancel()
        await asyncio.gather(*running)
    became["failed"], became["failures"] = became["failed"][:5], len(became["failed"])
    became["cut"], became["cuts"] = became["cut"][:5], len(became["cut"])
    print(json.dumps(became))


asyncio.run(main())
