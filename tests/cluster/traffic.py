"""Sends traffic to a Service until stdin ends: ``traffic.py URL KEY STREAMS TOKENS``.

Runs STREAMS long streams at a time, each on its own connection, and starts a new one when one ends. Sends a short
request twice a second, in turn on a new connection and on a kept one. When stdin ends, cancels the running streams and
does not count them as cut, so stdin must end after the event under test. Prints a line when all streams have begun, and
at the end the results as JSON.
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
results = {"streams": 0, "cut": [], "requests": 0, "failed": [], "shortest_s": 1e9, "begun": 0}
all_begun = asyncio.Event()
LONG = {"model": "tiny", "prompt": "hi", "max_tokens": tokens, "ignore_eos": True, "stream": True} | USAGE
SHORT = {"model": "tiny", "prompt": "hi", "max_tokens": 1}


async def stream(session, *, first):
    began, lines = time.monotonic(), []
    try:
        async with session.post(f"{url}/v1/completions", json=LONG) as answer:
            if answer.status != 200:
                results["failed"].append(f"stream: {answer.status}")
                await asyncio.sleep(1)
                return
            async for line in answer.content:
                results["begun"] += not lines and line.startswith(b"data: ")
                if results["begun"] == streams:
                    all_begun.set()
                lines += [line] * line.startswith(b"data: ")
    except (aiohttp.ClientError, OSError) as error:
        results["cut" if lines else "failed"].append(f"stream after {len(lines)} pieces: {error!r}")
        await asyncio.sleep(1)
        return
    if reason := cut(lines, tokens):
        results["cut"].append(f"stream of {len(lines)} pieces and {time.monotonic() - began:.1f} s: {reason}")
    results["streams"] += 1
    if first:  # a later stream may be alone on a new pod, and faster
        results["shortest_s"] = min(results["shortest_s"], round(time.monotonic() - began, 1))


async def keep_streaming(session):
    for number in itertools.count():
        await stream(session, first=number == 0)


async def short(session, connection):
    results["requests"] += 1
    try:
        async with session.post(f"{url}/v1/completions", json=SHORT) as answer:
            text = await answer.text()
            if answer.status != 200:
                results["failed"].append(f"{connection}: {answer.status} {text[:200]}")
    except (aiohttp.ClientError, OSError) as error:
        results["failed"].append(f"{connection}: {error!r}")


async def main():
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    no_timeout = aiohttp.ClientTimeout(total=None)
    bearer = {"Authorization": f"Bearer {key}"}
    new_session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=True), timeout=no_timeout, headers=bearer
    )
    kept_session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1), timeout=no_timeout, headers=bearer)
    async with new_session, kept_session:
        stream_tasks = [asyncio.create_task(keep_streaming(new_session)) for _ in range(streams)]
        requests = []
        await all_begun.wait()
        print("all streams run", flush=True)
        stdin = asyncio.create_task(reader.read())
        for session, connection in itertools.cycle(
            [(new_session, "new connection"), (kept_session, "kept connection")]
        ):
            if stdin.done():
                break
            requests.append(asyncio.create_task(short(session, connection)))
            await asyncio.sleep(0.5)
        for task in stream_tasks:
            task.cancel()
        await asyncio.gather(*requests)
    results["failed"], results["failures"] = results["failed"][:5], len(results["failed"])
    results["cut"], results["cuts"] = results["cut"][:5], len(results["cut"])
    print(json.dumps(results))


asyncio.run(main())
