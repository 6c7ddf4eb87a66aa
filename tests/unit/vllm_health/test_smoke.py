"""The greeting through the real ``openai`` client, against a stand-in for vLLM's API that streams its answers."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import openai
import pytest

from vllm_health import smoke
from vllm_health.smoke import stream_answer


class Api:
    """The stand-in's answers, and the requests that it got: (path, key, body)."""

    def __init__(self) -> None:
        self.texts = ["Hel", "", "lo"]
        self.reasoning = ""
        self.status = {"/v1/chat/completions": 200, "/v1/completions": 200}
        self.requests: list[tuple[str, str, dict[str, Any]]] = []
        self.url = ""

    def chunks(self, path: str) -> Iterator[dict[str, Any]]:
        yield {"choices": []}  # usage and the like
        if self.reasoning:
            choice = {"index": 0, "delta": {"reasoning": self.reasoning}}
            yield {"id": "1", "created": 0, "model": "m", "object": "x", "choices": [choice]}
        for text in self.texts:
            choice = {"index": 0, "delta": {"content": text}} if "chat" in path else {"index": 0, "text": text}
            yield {"id": "1", "created": 0, "model": "m", "object": "x", "choices": [choice]}


def handler(api: Api) -> Callable[..., http.server.BaseHTTPRequestHandler]:
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            api.requests.append((self.path, self.headers["authorization"], body))
            self.send_response(api.status[self.path])
            ok = api.status[self.path] == 200
            self.send_header("content-type", "text/event-stream" if ok else "application/json")
            self.end_headers()
            if ok:
                for chunk in api.chunks(self.path):
                    self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
                self.wfile.write(b"data: [DONE]\n\n")
            else:
                self.wfile.write(b'{"error": {"message": "no such thing"}}')

        def log_message(self, *_: Any) -> None:
            pass

    return Answer


@pytest.fixture
def api() -> Iterator[Api]:
    stand_in = Api()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler(stand_in)) as server:
        stand_in.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield stand_in
        server.shutdown()
        thread.join()


def ask(api: Api, key: str = "k") -> tuple[str, Any]:
    texts: list[str] = []
    timing = stream_answer(api.url, key, "m", "Who?", texts.append, max_tokens=7)
    return "|".join(texts), timing


def test_an_answer_is_written_chunk_by_chunk_and_timed(api: Api) -> None:
    text, timing = ask(api)
    assert (text, timing.chunks) == ("Hel|lo", 2)
    assert 0 < timing.first_s <= timing.total_s
    ((path, key, body),) = api.requests
    assert (path, key) == ("/v1/chat/completions", "Bearer k")
    assert body["messages"] == [{"role": "user", "content": "Who?"}]
    assert (body["model"], body["max_tokens"], body["stream"]) == ("m", 7, True)


def test_the_reasoning_before_an_answer_is_text_too(api: Api) -> None:
    api.reasoning = "Hm."
    text, timing = ask(api)
    assert (text, timing.chunks) == ("Hm.|Hel|lo", 3)


@pytest.mark.parametrize("reasoning", ["Hm.", None])
def test_a_structured_answer_that_did_not_begin_is_not_tested_only_if_the_model_still_thinks(
    reasoning: str | None,
) -> None:
    message = SimpleNamespace(content=None, reasoning=reasoning)
    choice = SimpleNamespace(finish_reason="length", message=message)
    if reasoning is None:
        smoke._expect_answered(choice)
        return
    with pytest.raises(smoke._NotTested, match="still thinking after 256 tokens"):
        smoke._expect_answered(choice)


def test_a_model_without_a_chat_template_gets_the_question_as_a_prompt(api: Api) -> None:
    api.status["/v1/chat/completions"] = 400
    assert ask(api)[0] == "Hel|lo"
    assert [path for path, _, _ in api.requests] == ["/v1/chat/completions", "/v1/completions"]
    assert api.requests[1][2]["prompt"] == "Who?"


def test_an_empty_answer_has_no_chunks(api: Api) -> None:
    api.texts = [""]
    text, timing = ask(api, key="")
    assert (text, timing.chunks, timing.first_s) == ("", 0, 0.0)


def test_a_refused_request_is_an_error_and_is_not_repeated(api: Api) -> None:
    api.status["/v1/chat/completions"] = 401
    with pytest.raises(openai.AuthenticationError, match="no such thing"):
        ask(api)
    assert len(api.requests) == 1
