"""What tests take for a whole stream."""

from __future__ import annotations

import json

import pytest
from streams import cut


def chunk(text="x", end=None, **more):
    return "data: " + json.dumps({"choices": [{"index": 0, "text": text, "finish_reason": end}], **more})


USAGE = "data: " + json.dumps({"choices": [], "usage": {"completion_tokens": 3}})
ERROR = 'data: {"error": {"message": "EngineCore died", "code": 500}}'
WHOLE = [chunk(), "", chunk(), chunk(end="length"), USAGE, "data: [DONE]", ""]


def test_a_stream_with_all_its_tokens_is_whole_as_text_and_as_bytes():
    assert cut(WHOLE, 3) is None
    assert cut([f"{line}\n".encode() for line in WHOLE], 3) is None


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ([], "no [DONE] after 0 events"),
        (WHOLE[:-2], "no [DONE] after 4 events"),
        ([chunk(), ERROR, "data: [DONE]"], "an error: {'message': 'EngineCore died', 'code': 500}"),
        ([chunk(), USAGE, "data: [DONE]"], "finish_reason []"),
        ([chunk(end="abort"), USAGE, "data: [DONE]"], "finish_reason ['abort']"),
        ([chunk(end="length"), "data: [DONE]"], "[] of 3 tokens"),
        ([chunk(end="length"), USAGE.replace("3", "2"), "data: [DONE]"], "[2] of 3 tokens"),
    ],
)
def test_a_stream_is_cut_whatever_its_last_line_says(lines, why):
    assert cut(lines, 3) == why
