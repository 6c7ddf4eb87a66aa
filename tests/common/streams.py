"""Whether a streamed completion is whole. vLLM sends [DONE] after an error too, so [DONE] alone proves nothing."""

import json

USAGE = {"stream_options": {"include_usage": True}}
"""For the request's body: without it a stream does not say how many tokens it had."""


def cut(lines, tokens):
    """Return why the stream is cut, or None if it is whole: all tokens, a finish_reason, no error, [DONE] at its end.

    ``lines``: the event stream's lines, text or bytes. ``tokens``: how many the request asks for, with ``ignore_eos``
    and ``USAGE``.
    """
    events = [line.removeprefix("data: ") for raw in lines if (line := text_of(raw)).startswith("data: ")]
    if not events or events[-1] != "[DONE]":
        return f"no [DONE] after {len(events)} events"
    chunks = [json.loads(event) for event in events[:-1]]
    if errors := [chunk["error"] for chunk in chunks if "error" in chunk]:
        return f"an error: {errors[0]}"
    ends = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
    if ends != ["length"]:
        return f"finish_reason {ends}"
    got = [chunk["usage"]["completion_tokens"] for chunk in chunks if chunk.get("usage")]
    return None if got[-1:] == [tokens] else f"{got[-1:]} of {tokens} tokens"


def text_of(line):
    """Return a line as text, without its end."""
    return (line.decode() if isinstance(line, bytes) else line).strip()
