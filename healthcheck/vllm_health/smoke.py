"""Is the server of use to a client? Tried through the ``openai`` client, as users come to it. Speaks HTTP."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

import msgspec

if TYPE_CHECKING:
    import openai


class Timing(msgspec.Struct, frozen=True):
    """Seconds to the first piece and to the last one, and how many pieces came."""

    first_s: float
    total_s: float
    pieces: int


def stream_answer(
    base_url: str, api_key: str, model: str, question: str, write: Callable[[str], None], *, max_tokens: int = 48
) -> Timing:
    """Ask ``question`` and hand each piece of the answer to ``write`` as it comes. Blocks, for a minute at most.

    Raises ``openai.OpenAIError`` when the server gives no answer. A model without a chat template is given the question
    as a text to continue.
    """
    import openai  # noqa: PLC0415 - a second of CPU time that only a greeting pays

    def pieces(client: openai.OpenAI) -> Iterator[str]:
        try:
            chat = client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": question}], max_tokens=max_tokens, stream=True
            )
        except openai.BadRequestError:
            text = client.completions.create(model=model, prompt=question, max_tokens=max_tokens, stream=True)
            yield from (chunk.choices[0].text for chunk in text if chunk.choices)
            return
        yield from (chunk.choices[0].delta.content or "" for chunk in chat if chunk.choices)

    start, first, count = time.monotonic(), 0.0, 0
    with openai.OpenAI(base_url=base_url, api_key=api_key or "none", timeout=60.0, max_retries=0) as client:
        for piece in pieces(client):
            if piece:
                first = first or time.monotonic() - start
                count += 1
                write(piece)
    return Timing(first, time.monotonic() - start, count)


# ---- the smoke test

_QUESTION: Final[Any] = [{"role": "user", "content": "Say hello."}]
_CITY: Final = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Lima", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
_ROOM: Final = 256
"""Tokens for an answer that is to be JSON: a grammar allows white space, and small models use it."""
_TOOL: Final[Any] = {
    "type": "function",
    "function": {"name": "weather", "description": "The weather in a city.", "parameters": _CITY, "strict": True},
}


class _Failure(Exception):  # noqa: N818 - an outcome
    """Why a response is invalid."""


def run(url: str, api_key: str | None, model: str | None, write: Callable[[str], object]) -> int:
    """Try what clients use, a line each through ``write``; 0 if all that is switched on works, else 1.

    ``url`` is without /v1. A model that generates nothing is tried as one for embeddings.
    """
    import openai  # noqa: PLC0415 - as above

    failed = 0
    with openai.OpenAI(base_url=f"{url}/v1", api_key=api_key or "none", timeout=60.0, max_retries=0) as client:
        try:
            names = [one.id for one in client.models.list()]
            model = model or next(iter(names))
        except openai.APIConnectionError as error:
            write(f"FAIL  models: {url} cannot be reached ({_line(error.__cause__ or error)})")
            return 1
        except (openai.OpenAIError, StopIteration) as error:
            write(f"FAIL  models: {_line(error)}")
            return 1
        write(f"ok    models: {', '.join(names)}")
        for name, check in _checks(client, model):
            began = time.monotonic()
            try:
                told = check(client, model)
            except (openai.OpenAIError, _Failure, ValueError, LookupError) as error:
                off = isinstance(error, openai.BadRequestError) and "requires --" in str(error)
                write(f"{'off ' if off else 'FAIL'}  {name}: {_line(error)}")
                failed += not off
            else:
                write(f"ok    {name}: {told} ({time.monotonic() - began:.2f} s)")
    return int(failed > 0)


Check = Callable[["openai.OpenAI", str], str]


def _checks(client: openai.OpenAI, model: str) -> list[tuple[str, Check]]:
    import openai  # noqa: PLC0415 - as above

    try:
        client.completions.create(model=model, prompt="Hello", max_tokens=1)
    except openai.NotFoundError as error:
        if "model" not in str(error):  # the route is what is not found: nothing is generated here
            return [("embedding", _embedding)]
    except openai.OpenAIError:
        pass  # the checks will tell
    return [
        ("completion", _completion),
        ("chat", _chat),
        ("stream", _stream),
        ("tool call", _tool_call),
        ("structured output", _structured),
    ]


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _expect(good: object, otherwise: str) -> None:
    if not good:
        raise _Failure(otherwise)


def _embedding(client: openai.OpenAI, model: str) -> str:
    (found,) = client.embeddings.create(model=model, input="Hello").data
    _expect(any(found.embedding), "the vector is empty or all zeros")
    return f"{len(found.embedding)} numbers"


def _completion(client: openai.OpenAI, model: str) -> str:
    done = client.completions.create(model=model, prompt="Hello", max_tokens=8)
    _expect(done.usage and done.usage.completion_tokens, "usage counts no token")
    return f"{done.usage.completion_tokens if done.usage else 0} tokens"


def _chat(client: openai.OpenAI, model: str) -> str:
    done = client.chat.completions.create(model=model, messages=_QUESTION, max_tokens=8)
    used = done.usage
    _expect(used and used.prompt_tokens and used.completion_tokens, "usage counts no token")
    _expect(done.choices[0].finish_reason in {"stop", "length"}, f"it ended by {done.choices[0].finish_reason!r}")
    return f"{used.prompt_tokens} + {used.completion_tokens} tokens" if used else ""


def _stream(client: openai.OpenAI, model: str) -> str:
    chunks = list(
        client.chat.completions.create(
            model=model, messages=_QUESTION, max_tokens=16, stream=True, stream_options={"include_usage": True}
        )
    )
    ends = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    _expect(len(ends) == 1, f"it ended {len(ends)} times")
    _expect(chunks[-1].usage, "the last piece carries no usage")
    return f"{len(chunks)} pieces"


def _tool_call(client: openai.OpenAI, model: str) -> str:
    done = client.chat.completions.create(
        model=model,
        messages=_QUESTION,
        max_tokens=_ROOM,
        temperature=0,
        tools=[_TOOL],
        tool_choice={"type": "function", "function": {"name": "weather"}},
    )
    calls: Any = done.choices[0].message.tool_calls or []
    _expect(len(calls) == 1 and calls[0].function.name == "weather", "it called no tool, or another")
    return f"weather({_city(calls[0].function.arguments)})"


def _structured(client: openai.OpenAI, model: str) -> str:
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "city", "schema": _CITY, "strict": True}}
    done = client.chat.completions.create(
        model=model, messages=_QUESTION, max_tokens=_ROOM, response_format=wanted, temperature=0
    )
    return _city(done.choices[0].message.content or "")


def _city(text: str) -> str:
    found = json.loads(text)
    _expect(isinstance(found, dict) and found.get("city") in {"Lima", "Oslo"}, f"{text[:80]!r} is not what was asked")
    return str(found["city"])
