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


def test_chat_answers(serving):
    with client(serving) as api:
        chat = api.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "Hello"}], max_tokens=5, extra_body={"ignore_eos": True}
        )
    assert chat.usage.completion_tokens == 5


def test_completion_answers(serving):
    with client(serving) as api:
        done = api.completions.create(model="tiny", prompt="Hello", max_tokens=5, extra_body={"ignore_eos": True})
    assert done.usage.completion_tokens == 5


def test_a_stream_comes_in_pieces_and_ends_with_done(serving):
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


def test_any_of_the_keys_opens(serving):
    assert serving.ask("/v1/models", key="second-key")[0] == 200


def test_the_health_port_says_that_it_is_ready(serving):
    assert [serving.health(route)[0] for route in ("/livez", "/readyz", "/startupz")] == [200, 200, 200]


def test_prefills_beside_decodes_are_answered_whole(serving):
    """On some CPUs with AMX, bfloat16 ends the engine within a second of this (vLLM 0.32)."""
    streams = loaded(serving, 6, tokens=200)
    lengths = itertools.cycle(range(1, 8))
    until = time.monotonic() + 15
    with client(serving) as api:
        while time.monotonic() < until:
            prompt = "once " * next(lengths)
            done = api.completions.create(model="tiny", prompt=prompt, max_tokens=4, extra_body={"ignore_eos": True})
            assert done.usage.completion_tokens == 4
    became = ended(streams)
    assert (became["failed"], became["why"]) == (0, [])
    assert became["done"] >= 1
    if not read_cpu().amx:
        pytest.skip("whole streams, but this CPU has no AMX: nothing is shown for CPUs that have it")


def test_ctrl_c_lets_streams_finish_and_turns_new_requests_away(serving):
    """Last in this file: it ends the server that the others share."""
    answers = []

    def stream():
        answers.append(serving.ask("/v1/completions", STREAM))

    def closes():
        kept = http.client.HTTPConnection("127.0.0.1", serving.port, timeout=60)
        kept.request("GET", "/v1/models", headers={"Authorization": f"Bearer {serving.key}"})
        with contextlib.closing(kept), kept.getresponse() as answer:
            return answer.status, answer.will_close

    assert closes() == (200, False)
    early, late = threading.Thread(target=stream), threading.Thread(target=stream)
    early.start()
    time.sleep(0.2)
    serving.process.send_signal(signal.SIGINT)
    serving.wait_for("not ready any more")
    assert [serving.health(route)[0] for route in ("/readyz", "/livez")] == [503, 200]
    assert closes() == (200, True)  # so a client that keeps its connection finds another replica
    time.sleep(Drain(serving.drain_seconds).delay - 0.5)
    late.start()  # load balancers have not noticed yet, so it is served; vLLM's own drain begins in the middle of it
    turned_away = None
    while serving.process.poll() is None and turned_away is None:
        try:
            status, headers, _ = serving.ask("/v1/models")
        except OSError:
            break
        if status == 503:
            turned_away = headers["Retry-After"]
    early.join(60)
    late.join(60)
    assert serving.end(60) == 0
    assert turned_away == "5"
    assert len(answers) == 2
    for status, _, body in answers:
        assert status == 200
        assert body.count("data: ") >= 50
        assert cut(body.splitlines(), STREAM["max_tokens"]) is None
