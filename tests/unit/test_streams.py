"""tests/common/streams.py: when a stream counts as complete."""

from __future__ import annotations

import json

import pytest
from streams import cut


def chunk(text="x", end=None, **more):
    return "data: " + json.dumps({"choices": [{"index": 0, "text": text, "finish_reason": end}], **more})


USAGE = "data: " + json.dumps({"choices": [], "usage": {"completion_tokens": 3}})
ERROR = 'data: {"error": {"message": "EngineCore died", "code": 500}}'
COMPLETE = [chunk(), "", chunk(), chunk(end="length"), USAGE, "data: [DONE]", ""]


def test_a_stream_with_all_tokens_is_complete_as_text_and_as_bytes():
    assert cut(COMPLETE, 3) is None
    assert cut([f"{line}\n".encode() for line in COMPLETE], 3) is None


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ([], "no [DONE] after 0 events"),
        (COMPLETE[:-2], "no [DONE] after 4 events"),
        ([chunk(), ERROR, "data: [DONE]"], "an error: {'message': 'EngineCore died', 'code': 500}"),
        ([chunk(), USAGE, "data: [DONE]"], "finish_reason []"),
        ([chunk(end="abort"), USAGE, "data: [DONE]"], "finish_reason ['abort']"),
        ([chunk(end="length"), "data: [DONE]"], "[] of 3 tokens"),
        ([chunk(end="length"), USAGE.replace("3", "2"), "data: [DONE]"], "[2] of 3 tokens"),
    ],
)
def test_an_incomplete_stream_is_cut_even_if_it_ends_with_done(lines, reason):
    assert cut(lines, 3) == reason
