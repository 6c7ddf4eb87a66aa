"""The greeting on a terminal: one streamed answer, the URLs, a curl to copy. Speaks HTTP in a thread."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

from vllm_health import smoke

QUESTION = "Hello! Who are you?"


async def greet(
    url: str, health_url: str, *, model: str, api_key: str, say: Callable[[str], None], say_part: Callable[[str], None]
) -> None:
    """Ask ``model`` a question and print its answer as it comes, then where everything is.

    ``url`` is the API's, ``health_url`` the health port's, both without a slash at the end. ``api_key`` "": none is
    needed. ``say`` prints a line, ``say_part`` a piece of one. Never raises for what the server does.
    """
    say(f'asking "{QUESTION}"')
    try:
        timing = await asyncio.to_thread(
            smoke.stream_answer, f"{url}/v1", api_key, model, QUESTION, lambda piece: say_part(printable(piece))
        )
    except Exception as error:  # noqa: BLE001 - a greeting that fails is told, whatever it was; serving goes on
        say(f"no answer: {' '.join(str(error).split())[:300]}")
    else:
        rest = f"{timing.pieces} pieces in {timing.total_s:.2f} s, the first after {timing.first_s:.2f} s"
        say(f"answered: {rest}")
    say(f"API {url}/v1   docs {url}/docs   metrics {url}/metrics   health {health_url}/readyz")
    bearer = " -H 'Authorization: Bearer YOUR_KEY'" if api_key else ""
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello!"}]})
    say(f"curl {url}/v1/chat/completions -H 'Content-Type: application/json'{bearer} -d '{body}'")
    say("Ctrl-C drains: streams under way finish, new requests are turned away")


def printable(piece: str) -> str:
    """Return ``piece`` without control characters, so that a model's answer cannot move the terminal's cursor."""
    return "".join(sign if sign.isprintable() or sign == "\n" else "\N{REPLACEMENT CHARACTER}" for sign in piece)
