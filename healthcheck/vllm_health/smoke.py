"""Tests a server through the ``openai`` client, which users use too. Sends HTTP requests."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

import msgspec

if TYPE_CHECKING:
    import openai


class Timing(msgspec.Struct, frozen=True):
    """Seconds to the first chunk with text of a streamed answer, seconds in total, and the number of such chunks."""

    first_s: float
    total_s: float
    chunks: int


def stream_answer(
    base_url: str, api_key: str, model: str, question: str, write: Callable[[str], None], *, max_tokens: int = 48
) -> Timing:
    """Ask ``question``, pass the text of each chunk to ``write`` as it arrives, and return the timing.

    The text of a model that thinks begins with its reasoning, which the client's types do not have.
    Blocks until the answer ends. Each wait for the server lasts at most 60 s. If the model has no chat template, sends
    the question as a prompt to /v1/completions. Raises ``openai.OpenAIError`` if the server does not answer.
    """
    import openai  # noqa: PLC0415 - the import takes a second of CPU time

    def texts(client: openai.OpenAI) -> Iterator[str]:
        try:
            chat = client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": question}], max_tokens=max_tokens, stream=True
            )
        except openai.BadRequestError:
            completion = client.completions.create(model=model, prompt=question, max_tokens=max_tokens, stream=True)
            yield from (chunk.choices[0].text for chunk in completion if chunk.choices)
            return
        for delta in (chunk.choices[0].delta for chunk in chat if chunk.choices):
            yield getattr(delta, "reasoning", None) or delta.content or ""

    start, first, count = time.monotonic(), 0.0, 0
    with openai.OpenAI(base_url=base_url, api_key=api_key or "none", timeout=60.0, max_retries=0) as client:
        for text in texts(client):
            if text:
                first = first or time.monotonic() - start
                count += 1
                write(text)
    return Timing(first, time.monotonic() - start, count)


# ---- the smoke test

_QUESTION: Final[Any] = [{"role": "user", "content": "Say hello."}]
_CITY: Final = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Lima", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
_WHOLE: Final = {"stop", "length"}
"""Finish reasons of a whole answer. vLLM ends a stream with "abort" or "error" if its engine fails, and then [DONE]."""
_JSON_MAX_TOKENS: Final = 256
"""Upper limit for the tokens of a JSON answer. The grammar allows white space, and small models write much of it."""
_TOOL: Final[Any] = {
    "type": "function",
    "function": {"name": "weather", "description": "The weather in a city.", "parameters": _CITY, "strict": True},
}


class _Failure(Exception):  # noqa: N818 - an outcome
    """Why a response is invalid."""


class _NotTested(Exception):  # noqa: N818 - an outcome
    """Why a response neither shows that a feature works nor that it fails."""


_INVALID: Final = (_Failure, ValueError, LookupError, TypeError, AttributeError)
"""Exceptions for an invalid response. The client checks neither that an answer is JSON nor which fields it has."""


def run(url: str, api_key: str | None, model: str | None, show: Callable[[str], object]) -> int:
    """Test each feature that clients use. Return 0 if every enabled feature works, else 1.

    ``show`` gets one line per feature. ``url`` is without /v1. If the model does not generate text, only embeddings
    are tested.
    """
    import openai  # noqa: PLC0415 - slow to import

    def write(line: str) -> None:  # a server can repeat the key in its error
        show(line.replace(api_key, "[the API key]") if api_key else line)

    failed = 0
    with openai.OpenAI(base_url=f"{url}/v1", api_key=api_key or "none", timeout=60.0, max_retries=0) as client:
        try:
            names = [listed.id for listed in client.models.list()]
            _expect(model or names, "the server lists no model")
            model = model or names[0]
        except openai.APIConnectionError as error:
            write(f"FAIL  models: {url} cannot be reached ({_line(error.__cause__ or error)})")
            return 1
        except (openai.OpenAIError, *_INVALID) as error:
            write(f"FAIL  models: {_line(error)}")
            return 1
        write(f"ok    models: {', '.join(names)}")
        for name, check in _checks(client, model):
            began = time.monotonic()
            try:
                result = check(client, model)
            except _NotTested as reason:
                write(f"off   {name}: {reason}")
            except (openai.OpenAIError, *_INVALID) as error:
                off = isinstance(error, openai.BadRequestError) and "requires --" in str(error)
                write(f"{'off ' if off else 'FAIL'}  {name}: {_line(error)}")
                failed += not off
            else:
                write(f"ok    {name}: {result} ({time.monotonic() - began:.2f} s)")
    return int(failed > 0)


Check = Callable[["openai.OpenAI", str], str]


def _checks(client: openai.OpenAI, model: str) -> list[tuple[str, Check]]:
    import openai  # noqa: PLC0415 - slow to import

    try:
        client.completions.create(model=model, prompt="Hello", max_tokens=1)
    except openai.NotFoundError as error:
        if "model" not in str(error):  # the route is missing, not the model, so this model does not generate text
            return [("embedding", _embedding)]
    except (openai.OpenAIError, *_INVALID):
        pass  # the checks report it
    return [
        ("completion", _completion),
        ("chat", _chat),
        ("stream", _stream),
        ("tool call", _tool_call),
        ("structured output", _structured),
    ]


def _line(error: BaseException) -> str:
    """Return what is wrong with the server or its answer, as one line for the user."""
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return "the answer is not JSON"
    if isinstance(error, LookupError | TypeError | AttributeError):
        return "the answer does not have the fields of OpenAI's API"
    text = " ".join(str(error).split())[:300]
    return re.sub(r"^\[Errno -?\d+\] ", "", text) or "no answer"


def _expect(condition: object, failure: str) -> None:
    if not condition:
        raise _Failure(failure)


def _embedding(client: openai.OpenAI, model: str) -> str:
    vectors = client.embeddings.create(model=model, input="Hello").data
    _expect(len(vectors) == 1, f"the answer has {len(vectors)} vectors, not 1")
    _expect(any(vectors[0].embedding), "the vector is empty or all zeros")
    return f"{len(vectors[0].embedding)} dimensions"


def _first_choice(answer: Any) -> Any:
    _expect(answer.choices, "the field `choices` of the answer is missing or empty")
    return answer.choices[0]


_NO_USAGE: Final = "the field `usage` of the answer is missing or counts 0 tokens"


def _completion(client: openai.OpenAI, model: str) -> str:
    answer = client.completions.create(model=model, prompt="Hello", max_tokens=8)
    _expect(answer.usage and answer.usage.completion_tokens, _NO_USAGE)
    return f"{answer.usage.completion_tokens if answer.usage else 0} tokens"


def _chat(client: openai.OpenAI, model: str) -> str:
    answer = client.chat.completions.create(model=model, messages=_QUESTION, max_tokens=8)
    usage = answer.usage
    _expect(usage and usage.prompt_tokens and usage.completion_tokens, _NO_USAGE)
    finish_reason = _first_choice(answer).finish_reason
    _expect(finish_reason in _WHOLE, f"finish_reason is {finish_reason!r}, not 'stop' or 'length'")
    return f"{usage.prompt_tokens} prompt and {usage.completion_tokens} output tokens" if usage else ""


def _stream(client: openai.OpenAI, model: str) -> str:
    chunks = list(
        client.chat.completions.create(
            model=model, messages=_QUESTION, max_tokens=16, stream=True, stream_options={"include_usage": True}
        )
    )
    ends = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    _expect(len(ends) == 1, f"the stream has {len(ends)} finish reasons, not 1")
    _expect(ends[0] in _WHOLE, f"the stream was cut: its finish_reason is {ends[0]!r}, not 'stop' or 'length'")
    _expect(chunks[-1].usage, "the last chunk has no field `usage`")
    return f"{len(chunks)} chunks"


def _tool_call(client: openai.OpenAI, model: str) -> str:
    answer = client.chat.completions.create(
        model=model,
        messages=_QUESTION,
        max_tokens=_JSON_MAX_TOKENS,
        temperature=0,
        tools=[_TOOL],
        tool_choice={"type": "function", "function": {"name": "weather"}},
    )
    _expect_answered(_first_choice(answer))
    calls = _first_choice(answer).message.tool_calls or []
    _expect(len(calls) == 1 and calls[0].function.name == "weather", "the answer is not one call of the tool 'weather'")
    return f"weather({_parse_city(calls[0].function.arguments)})"


def _structured(client: openai.OpenAI, model: str) -> str:
    response_format: Any = {"type": "json_schema", "json_schema": {"name": "city", "schema": _CITY, "strict": True}}
    answer = client.chat.completions.create(
        model=model, messages=_QUESTION, max_tokens=_JSON_MAX_TOKENS, response_format=response_format, temperature=0
    )
    _expect_answered(_first_choice(answer))
    return _parse_city(_first_choice(answer).message.content or "")


def _expect_answered(choice: Any) -> None:
    """Raise _NotTested if the tokens ended while the model was thinking. vLLM follows a schema only in the answer."""
    message = choice.message
    if choice.finish_reason == "length" and getattr(message, "reasoning", None) and not message.content:
        raise _NotTested(f"not tested, because the model was still thinking after {_JSON_MAX_TOKENS} tokens")


def _parse_city(text: str) -> str:
    try:
        value = json.loads(text)
    except ValueError:
        raise _Failure(f"{text[:80]!r} is not JSON") from None
    valid = isinstance(value, dict) and value.get("city") in {"Lima", "Oslo"}
    _expect(valid, f"{text[:80]!r} does not match the requested JSON schema")
    return str(value["city"])
