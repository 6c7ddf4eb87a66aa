"""One answer from the server through the ``openai`` client, streamed: proof that a start ended well. Speaks HTTP."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import msgspec


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
