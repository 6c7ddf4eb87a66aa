import json
import signal
import threading
import time

import openai
import pytest

pytestmark = pytest.mark.timeout(600)
STREAM = {"model": "tiny", "prompt": "hi", "max_tokens": 200, "ignore_eos": True, "stream": True}


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
    assert body.rstrip().endswith("data: [DONE]")


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


def test_ctrl_c_lets_a_stream_finish_and_turns_new_requests_away(serving):
    """Last in this file: it ends the server that the others share."""
    got = []
    stream = threading.Thread(target=lambda: got.append(serving.ask("/v1/completions", STREAM)))
    stream.start()
    time.sleep(0.2)
    serving.process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert serving.ask("/v1/models")[0] == 200  # load balancers have not noticed yet
    assert serving.health("/readyz")[0] == 503
    assert serving.health("/livez")[0] == 200
    turned_away = None
    while serving.process.poll() is None and turned_away is None:
        try:
            status, headers, _ = serving.ask("/v1/models")
        except OSError:
            break
        if status == 503:
            turned_away = headers["Retry-After"]
    stream.join(60)
    assert serving.end(60) == 0
    assert turned_away == "1"
    assert got[0][2].rstrip().endswith("data: [DONE]")
