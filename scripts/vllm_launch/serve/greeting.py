"""Prints the greeting on a terminal: one streamed answer, the URLs, a curl command. Sends HTTP from a thread."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

from vllm_health import smoke

QUESTION = "Hello! Who are you?"


async def greet(
    url: str, health_url: str, *, model: str, api_key: str, say: Callable[[str], None], say_part: Callable[[str], None]
) -> None:
    """Ask ``model`` a question, print its answer while it streams, then print the URLs.

    ``url``: the API's. ``health_url``: the health port's. Both have no slash at the end. ``api_key``: "" if the API
    needs none. ``say`` prints a line, ``say_part`` a part of a line. Never raises an error of the server.
    """
    say(f'asking "{QUESTION}"')
    try:
        timing = await asyncio.to_thread(
            smoke.stream_answer, f"{url}/v1", api_key, model, QUESTION, lambda text: say_part(printable(text))
        )
    except Exception as error:  # noqa: BLE001 - no failure of the greeting may end serving
        say(f"the test prompt got no answer: {' '.join(str(error).split())[:300]}")
    else:
        say(f"answered: {timing.chunks} chunks in {timing.total_s:.2f} s, TTFT {timing.first_s:.2f} s")
    say(f"API {url}/v1   docs {url}/docs   metrics {url}/metrics   health {health_url}/readyz")
    bearer = " -H 'Authorization: Bearer YOUR_KEY'" if api_key else ""
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello!"}]})
    say(f"curl {url}/v1/chat/completions -H 'Content-Type: application/json'{bearer} -d '{body}'")
    say("Ctrl-C drains: vLLM finishes open streams and refuses new requests")


def printable(text: str) -> str:
    """Return ``text`` without control characters, so that a model's answer cannot move the terminal's cursor."""
    return "".join(char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in text)
