import contextlib
import http.client
import itertools
import json
import signal
import threading
import time

import openai
import pytest
from serving import ended, loaded
from streams import USAGE, cut

from vllm_launch.machine.cpu import read_cpu
from vllm_launch.settings.settings import Drain

pytestmark = pytest.mark.timeout(600)
STREAM = {"model": "tiny", "prompt": "hi", "max_tokens": 200, "ignore_eos": True, "stream": True} | USAGE


def client(serving):
    return openai.OpenAI(base_url=f"{serving.url}/v1", api_key=serving.key, max_retries=0)


def test_a_chat_completion_has_all_tokens(serving):
    with client(serving) as api:
        chat = api.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "Hello"}], max_tokens=5, extra_body={"ignore_eos": True}
        )
    assert chat.usage.completion_tokens == 5


def test_a_completion_has_all_tokens(serving):
    with client(serving) as api:
        done = api.completions.create(model="tiny", prompt="Hello", max_tokens=5, extra_body={"ignore_eos": True})
    assert done.usage.completion_tokens == 5


def test_a_stream_has_many_events_and_ends_with_done(serving):
    _, _, body = serving.ask("/v1/completions", STREAM)
    assert body.count("data: ") >= 50
    assert cut(body.splitlines(), STREAM["max_tokens"]) is None


@pytest.mark.parametrize("path", ["/tokenize", "/invocations", "/v1/models", "/version", "/openapi.json", "//tokenize"])
@pytest.mark.parametrize("key", [None, "unknown"])
def test_no_route_answers_without_a_known_key(serving, path, key):
    status, headers, body = serving.ask(path, key=key)
    assert status == 401
    assert headers["WWW-Authenticate"] == "Bearer"
    assert json.loads(body)["error"]["code"] == 401


@pytest.mark.parametrize("path", ["/health", "/ping", "/metrics"])
def test_health_and_metrics_answer_without_a_key(serving, path):
    assert serving.ask(path, key=None)[0] == 200


def test_every_key_is_accepted(serving):
    assert serving.ask("/v1/models", key="second-key")[0] == 200


def test_the_health_port_reports_a_ready_server(serving):
    assert [serving.health(route)[0] for route in ("/livez", "/readyz", "/startupz")] == [200, 200, 200]


def test_prefills_and_decodes_at_the_same_time_get_complete_responses(serving, capsys):
    """On some CPUs with AMX, vLLM 0.32 crashes within a second of this load if it computes in bfloat16."""
    streams = loaded(serving, 6, tokens=200)
    lengths = itertools.cycle(range(1, 8))
    deadline = time.monotonic() + 15
    with client(serving) as api:
        while time.monotonic() < deadline:
            prompt = "once " * next(lengths)
            done = api.completions.create(model="tiny", prompt=prompt, max_tokens=4, extra_body={"ignore_eos": True})
            assert done.usage.completion_tokens == 4
    counts = ended(streams)
    assert (counts["failed"], counts["why"]) == (0, [])
    assert counts["done"] >= 1
    if not read_cpu().amx:
        with capsys.disabled():
            print("\nNot tested here: CPUs with AMX. This CPU has none.")


def test_ctrl_c_completes_streams_and_rejects_new_requests(serving):
    """Last test of this file: it ends the shared server."""
    answers = []

    def stream():
        answers.append(serving.ask("/v1/completions", STREAM))

    def status_and_close():
        connection = http.client.HTTPConnection("127.0.0.1", serving.port, timeout=60)
        connection.request("GET", "/v1/models", headers={"Authorization": f"Bearer {serving.key}"})
        with contextlib.closing(connection), connection.getresponse() as answer:
            return answer.status, answer.will_close

    assert status_and_close() == (200, False)
    early, late = threading.Thread(target=stream), threading.Thread(target=stream)
    early.start()
    time.sleep(0.2)
    serving.process.send_signal(signal.SIGINT)
    serving.wait_for("not ready any more")
    assert [serving.health(route)[0] for route in ("/readyz", "/livez")] == [503, 200]
    assert status_and_close() == (
        200,
        True,
    )  # so a client with a kept-alive connection connects anew, to another replica
    time.sleep(Drain(serving.drain_seconds).delay - 0.5)
    late.start()  # served, because load balancers may still send requests; vLLM's own drain begins during the response
    retry_after = None
    while serving.process.poll() is None and retry_after is None:
        try:
            status, headers, _ = serving.ask("/v1/models")
        except OSError:
            break
        if status == 503:
            retry_after = headers["Retry-After"]
    early.join(60)
    late.join(60)
    assert serving.end(60) == 0
    assert retry_after == "5"
    assert len(answers) == 2
    for status, _, body in answers:
        assert status == 200
        assert body.count("data: ") >= 50
        assert cut(body.splitlines(), STREAM["max_tokens"]) is None
