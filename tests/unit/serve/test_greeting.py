"""The greeting with a simulated client. test_serving.py tests it over HTTP."""

from __future__ import annotations

import asyncio

import pytest

from vllm_health import smoke
from vllm_launch.serve.greeting import greet


def greet_simulated_server(key: str) -> tuple[list[str], str]:
    lines: list[str] = []
    parts: list[str] = []
    urls = "http://127.0.0.1:8000", "http://[fe80::1]:8001"
    asyncio.run(greet(*urls, model="m", api_key=key, say=lines.append, say_part=parts.append))
    return lines, "".join(parts)


@pytest.mark.parametrize(("key", "header"), [("", False), ("s3cret", True)])
def test_the_answer_is_streamed_and_no_line_contains_the_key_simulated(monkeypatch, key, header):
    def answer(base_url, api_key, model, _, write):
        assert (base_url, api_key, model) == ("http://127.0.0.1:8000/v1", key, "m")
        write("Hi\n")
        write("\x1b[2J")
        return smoke.Timing(0.25, 1.5, 2)

    monkeypatch.setattr(smoke, "stream_answer", answer)
    lines, text = greet_simulated_server(key)
    assert text == "Hi\n\N{REPLACEMENT CHARACTER}[2J"
    assert lines[:2] == ['asking "Hello! Who are you?"', "answered: 2 chunks in 1.50 s, TTFT 0.25 s"]
    assert lines[2].endswith("health http://[fe80::1]:8001/readyz")
    assert ("Bearer YOUR_KEY" in lines[3], "s3cret" in "".join(lines)) == (header, False)


def test_a_failed_question_is_one_line_and_the_urls_still_follow_simulated(monkeypatch):
    def refuse(*_):
        raise RuntimeError("two\nlines " + "x" * 400)

    monkeypatch.setattr(smoke, "stream_answer", refuse)
    lines, text = greet_simulated_server("")
    assert (text, len(lines)) == ("", 5)
    assert lines[1] == f"the test prompt got no answer: two lines {'x' * 290}"
