"""Checks that a streamed completion is complete. vLLM sends [DONE] also after an error, so [DONE] alone proves nothing."""

import json

USAGE = {"stream_options": {"include_usage": True}}
"""Part of the request's body. Without it, a stream does not contain its number of tokens."""


def cut(lines, tokens):
    """Return why the stream is incomplete, or None if it has all tokens, a finish_reason, no error, and [DONE] at its end.

    ``lines``: the lines of the event stream, text or bytes. ``tokens``: the number of tokens that the request asked
    for, with ``ignore_eos`` and ``USAGE``.
    """
    events = [line.removeprefix("data: ") for raw in lines if (line := text_of(raw)).startswith("data: ")]
    if not events or events[-1] != "[DONE]":
        return f"no [DONE] after {len(events)} events"
    chunks = [json.loads(event) for event in events[:-1]]
    if errors := [chunk["error"] for chunk in chunks if "error" in chunk]:
        return f"an error: {errors[0]}"
    reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
    if reasons != ["length"]:
        return f"finish_reason {reasons}"
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks if chunk.get("usage")]
    return None if counts[-1:] == [tokens] else f"{counts[-1:]} of {tokens} tokens"


def text_of(line):
    """Return a line as text, without surrounding space."""
    return (line.decode() if isinstance(line, bytes) else line).strip()
