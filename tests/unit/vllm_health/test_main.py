"""``vllm-health`` on the command line: each command runs as a process, against a stand-in for vLLM."""

from __future__ import annotations

import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest
from machine import free_port

from vllm_health.scrape import STATE_HEADER


class Vllm(http.server.ThreadingHTTPServer):
    """A stand-in for the API server. ``answers``: status and body by "METHOD /path". Other requests get 404.

    ``state``: the state in the answers of a health port. Empty for other servers.
    """

    daemon_threads = True

    def __init__(self):
        self.answers, self.requests, self.state = {}, [], ""
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self):
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        self.server.requests.append(
            (self.command, self.path, json.loads(body) if body else None, dict(self.headers.items()))
        )
        status, text = self.server.answers.get(f"{self.command} {self.path}", (404, '{"detail":"Not Found"}'))
        if callable(text):
            text = text(json.loads(body))
        kind = "text/event-stream" if text.startswith("data:") else "application/json"
        self.send_response(status)
        self.send_header("content-type", kind)
        if self.server.state:
            self.send_header(STATE_HEADER, self.server.state)
        self.send_header("content-length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    do_GET = do_POST = answer  # noqa: N815 - the library's names

    def log_message(self, *_):
        pass


@pytest.fixture
def vllm():
    with Vllm() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


COMMAND = [sys.executable, "-m", "vllm_health"]
ENVIRON = {name: value for name, value in os.environ.items() if name != "VLLM_API_KEY"}


def run(*words, **environ):
    done = subprocess.run(
        [*COMMAND, *words], capture_output=True, text=True, timeout=60, check=False, env=ENVIRON | environ
    )
    return done.returncode, done.stdout, done.stderr


# ---- bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["smoke", "localhost:8000"], "URL 'localhost:8000': it needs http:// or https:// and a host"),
        (["smoke", "http://"], "write it like http://127.0.0.1:8000"),
        (["serve", "--target", "ftp://x"], "URL 'ftp://x'"),
        (["serve", "--port", "0"], "'0' is not a port: give a number from 1 to 65535"),
        (["serve", "--port", "http"], "'http' is not a port"),
        (["serve", "--stall-seconds", "-1"], "'-1' is not a duration: give seconds, 0 or more"),
        (["serve", "--stall-seconds", "nan"], "'nan' is not a duration"),
        (["serve", "--stall-seconds", "10m"], "'10m' is not a duration"),
        (["serve", "--start-stall-seconds", "9"], "unrecognized arguments: --start-stall-seconds 9"),
        (["wait", "http://x", "--seconds", "inf"], "'inf' is not a duration"),
        (
            ["smoke", "http://x", "--api-key-file", "/not/there"],
            "--api-key-file /not/there: cannot be read: No such file",
        ),
        (["smoke", "http://x", "--api-key-file", "/dev/null"], "the file holds no key; write one in its first line"),
        (["smoke", "http://x", "--api-key-file", "/"], "cannot be read: Is a directory"),
        (["smoke", "http://x", "--api-key-file", "/proc/self/mounts"], "characters that an HTTP header cannot contain"),
        (["smoke"], "the following arguments are required: URL"),
        (["serf"], "invalid choice: 'serf'"),
        (["serve", "--stall", "3"], "unrecognized arguments: --stall 3"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_invalid_input_is_one_line_with_a_remedy_and_exit_code_2(words, message):
    code, out, err = run(*words)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("vllm-health")
    assert message in err


def test_a_port_in_use_is_one_line(vllm):
    code, out, err = run("serve", "--target", vllm.url, "--port", vllm.url.rpartition(":")[2])
    assert (code, out) == (2, "")
    assert "the port is in use; stop the process that listens there, or give another --port" in err.splitlines()[-1]


def test_a_light_install_names_the_package_to_install():
    code = "import runpy, sys; sys.modules['aiohttp'] = None; runpy.run_module('vllm_health', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr == "vllm-health: aiohttp is not installed; install 'vllm-launch[serve]'\n"


def test_help_names_every_command():
    code, out, _ = run("--help")
    assert code == 0
    assert all(word in out for word in ("serve", "smoke", "wait"))


# ---- wait


def test_wait_ends_when_the_health_port_is_ready(vllm):
    vllm.state = "starting"
    vllm.answers["GET /readyz"] = 503, "vLLM is not ready yet: compiling."
    vllm.answers["GET /livez"] = 200, ""
    waiting = subprocess.Popen([*COMMAND, "wait", vllm.url], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert waiting.stderr.readline() == "vllm-health: vLLM is not ready yet: compiling.\n"
    vllm.answers["GET /readyz"] = 200, "vLLM serves."
    out, err = waiting.communicate(timeout=30)
    assert (waiting.returncode, out, err) == (0, "vLLM serves.\n", "")


def test_wait_asks_health_if_the_url_is_vllms_own(vllm):
    vllm.answers["GET /health"] = 200, ""
    assert run("wait", f"{vllm.url}/v1/") == (0, "vLLM answers /health\n", "")


def test_wait_waits_while_a_proxy_answers_503(vllm):
    vllm.answers |= {f"GET {route}": (503, "<html>no backend</html>") for route in ("/readyz", "/livez", "/health")}
    waiting = subprocess.Popen([*COMMAND, "wait", vllm.url], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert waiting.stderr.readline() == f"vllm-health: {vllm.url}/health: HTTP 503 (<html>no backend</html>)\n"
    time.sleep(2.5)
    assert waiting.poll() is None
    vllm.answers["GET /health"] = 200, ""
    assert waiting.communicate(timeout=30)[0] == "vLLM answers /health\n"
    assert waiting.returncode == 0


def test_wait_ends_when_vllm_is_dead(vllm):
    vllm.state = "dead"
    vllm.answers |= {"GET /readyz": (503, "It hangs."), "GET /livez": (503, "It hangs.")}
    code, _, err = run("wait", vllm.url)
    assert code == 1
    assert err.splitlines() == [
        "vllm-health: It hangs.",
        "vllm-health: vLLM will not become ready: /livez fails",
    ]


def test_wait_ends_after_the_given_seconds():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        code, _, err = run("wait", f"http://127.0.0.1:{silent.getsockname()[1]}", "--seconds", "1")
    assert code == 1
    assert "not ready after 1 s" in err
    assert "/readyz: Connection refused" in err


def test_wait_names_the_status_of_a_server_that_is_not_ready(vllm):
    vllm.answers["GET /health"] = 500, "broken"
    _, _, err = run("wait", vllm.url, "--seconds", "1")
    assert err.splitlines()[0] == f"vllm-health: {vllm.url}/health: HTTP 500 (broken)"


# ---- smoke


def chunk(**fields):
    return f"data: {json.dumps({'id': '1', 'created': 0, 'model': 'm', 'object': 'x', **fields})}\n\n"


USAGE = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}


def chat(body):
    if body.get("stream"):
        assert body["stream_options"] == {"include_usage": True}
        ends = [None, "stop"]
        pieces = [chunk(choices=[{"index": 0, "delta": {"content": "x"}, "finish_reason": end}]) for end in ends]
        return "".join(pieces) + chunk(choices=[], usage=USAGE) + "data: [DONE]\n\n"
    message = {"role": "assistant", "content": '{"city": "Oslo"}' if "response_format" in body else "Hello"}
    if "tools" in body:
        call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Lima"}'}}
        message = {"role": "assistant", "content": None, "tool_calls": [call]}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return json.dumps({"id": "1", "created": 0, "model": "m", "object": "x", "choices": [choice], "usage": USAGE})


def completion(_):
    choice = {"index": 0, "text": "x", "finish_reason": "length"}
    return json.dumps({"id": "1", "created": 0, "model": "m", "object": "x", "choices": [choice], "usage": USAGE})


@pytest.fixture
def answering(vllm):
    model = {"id": "m", "object": "model", "created": 0, "owned_by": "vllm"}
    vllm.answers = {
        "GET /v1/models": (200, json.dumps({"object": "list", "data": [model]})),
        "POST /v1/completions": (200, completion),
        "POST /v1/chat/completions": (200, chat),
    }
    return vllm


def results(out):
    """Return the result of each check, by the check's name. The rest of the line is ignored."""
    return {line[6:].partition(":")[0]: line[:4].strip() for line in out.splitlines()}


ALL = ("models", "completion", "chat", "stream", "tool call", "structured output")


@pytest.mark.parametrize("key", ["secret\n", " secret\r\n"])
def test_a_key_with_a_line_end_is_stripped(answering, key):
    assert run("smoke", answering.url, VLLM_API_KEY=key)[0] == 0
    assert {headers.get("Authorization") or headers["authorization"] for *_, headers in answering.requests} == {
        "Bearer secret"
    }


@pytest.mark.parametrize("command", ["smoke", "wait"])
def test_a_key_that_no_header_can_carry_is_one_line_without_the_key(answering, command):
    code, out, err = run(command, answering.url, VLLM_API_KEY="sec\nret")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("vllm-health: variable VLLM_API_KEY: the API key has characters that an HTTP header")
    assert "sec" not in err.replace("VLLM_API_KEY", "")


def test_every_check_is_ok_for_a_server_with_all_features(answering, tmp_path):
    (tmp_path / "keys").write_text("first\nsecond\n")
    code, out, err = run("smoke", answering.url, "--api-key-file", str(tmp_path / "keys"))
    assert (code, results(out), err) == (0, dict.fromkeys(ALL, "ok"), "")
    assert {headers.get("Authorization") or headers["authorization"] for _, _, _, headers in answering.requests} == {
        "Bearer first"
    }
    assert {body["model"] for _, _, body, _ in answering.requests if body} == {"m"}


def broken(change):
    def answer(body):
        return json.dumps(change(json.loads(chat(body)))) if not body.get("stream") else change(chat(body))

    return answer


@pytest.mark.parametrize(
    ("change", "fails"),
    [
        (lambda answer: answer | {"usage": None} if isinstance(answer, dict) else answer, {"chat"}),
        (lambda answer: answer if isinstance(answer, dict) else answer.replace('"usage"', '"used"'), {"stream"}),
        (lambda answer: answer if isinstance(answer, dict) else answer.replace('"stop"', "null"), {"stream"}),
        (lambda answer: json.loads(json.dumps(answer).replace("Oslo", "Rome")) if isinstance(answer, dict) else answer, {"structured output"}),
        (lambda answer: json.loads(json.dumps(answer).replace("Lima", "Rome")) if isinstance(answer, dict) else answer, {"tool call"}),
        (lambda answer: json.loads(json.dumps(answer).replace("weather", "whether")) if isinstance(answer, dict) else answer, {"tool call"}),
        (lambda answer: json.loads(json.dumps(answer).replace('"stop"', '"error"')) if isinstance(answer, dict) else answer, {"chat"}),
    ],
)  # fmt: skip
def test_each_wrong_answer_fails_only_its_own_check(answering, change, fails):
    answering.answers["POST /v1/chat/completions"] = 200, broken(change)
    code, out, _ = run("smoke", answering.url)
    assert code == 1
    assert {name for name, result in results(out).items() if result == "FAIL"} == fails


@pytest.mark.parametrize("end", ['"abort"', '"error"'])
def test_a_stream_that_was_cut_fails_although_it_is_done(answering, end):
    def cut(answer):
        return answer if isinstance(answer, dict) else answer.replace('"stop"', end)

    answering.answers["POST /v1/chat/completions"] = 200, broken(cut)
    assert "FAIL  stream: the stream was cut: its finish_reason is" in run("smoke", answering.url)[1]


def test_a_stream_with_an_error_chunk_fails_although_it_is_done(answering):
    def failing(answer):
        error = chunk(error={"message": "EngineCore died", "type": "InternalServerError", "code": 500})
        return answer if isinstance(answer, dict) else answer.replace("data: [DONE]", error + "data: [DONE]")

    answering.answers["POST /v1/chat/completions"] = 200, broken(failing)
    assert "FAIL  stream: EngineCore died" in run("smoke", answering.url)[1]


def test_a_choice_without_a_message_is_one_line_for_each_check(answering):
    def headless(answer):
        return {**answer, "choices": [{"index": 0, "finish_reason": "stop"}]} if isinstance(answer, dict) else answer

    answering.answers["POST /v1/chat/completions"] = 200, broken(headless)
    code, out, err = run("smoke", answering.url)
    assert (code, err) == (1, "")
    for name in ("tool call", "structured output"):
        assert f"FAIL  {name}: the answer does not have the fields of OpenAI's API\n" in out


def test_a_key_that_the_server_repeats_is_not_shown(answering):
    answering.answers["GET /v1/models"] = 401, '{"error": {"message": "Incorrect API key: top-secret"}}'
    code, out, err = run("smoke", answering.url, VLLM_API_KEY="top-secret")
    assert (code, err) == (1, "")
    assert "[the API key]" in out
    assert "top-secret" not in out


def test_a_feature_that_is_switched_off_is_not_a_failure(answering):
    def refuse(body):
        return chat(body)

    answering.answers["POST /v1/chat/completions"] = 200, refuse
    error = {"error": {"message": 'tool_choice=function "weather" requires --tool-call-parser to be set', "code": 400}}
    answering.answers["POST /v1/completions"] = 400, json.dumps(error)
    code, out, _ = run("smoke", answering.url)
    assert code == 0
    assert results(out)["completion"] == "off"


def test_a_model_that_does_not_generate_is_tested_for_embeddings(answering):
    del answering.answers["POST /v1/completions"]
    embeddings = {
        "object": "list",
        "data": [{"object": "embedding", "index": 0, "embedding": [0.5, -1.0]}],
        "model": "m",
        "usage": USAGE,
    }
    answering.answers["POST /v1/embeddings"] = 200, json.dumps(embeddings)
    code, out, _ = run("smoke", answering.url)
    assert (code, results(out)) == (0, {"models": "ok", "embedding": "ok"})
    answering.answers["POST /v1/embeddings"] = 200, json.dumps(embeddings).replace("0.5, -1.0", "0.0, 0.0")
    assert run("smoke", answering.url)[0] == 1
    answering.answers["POST /v1/embeddings"] = 200, json.dumps(embeddings | {"data": 2 * embeddings["data"]})
    assert "FAIL  embedding: the answer has 2 vectors, not 1\n" in run("smoke", answering.url)[1]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ((401, '{"error": {"message": "A valid API key is needed."}}'), "A valid API key is needed."),
        ((200, '{"data": []}'), "models: the server lists no model\n"),
        ((200, "<html>"), "models: the answer is not JSON\n"),
        ((200, '{"data": [7]}'), "models: the answer does not have the fields of OpenAI's API\n"),
    ],
)
def test_a_server_that_lists_no_model_is_one_failure(vllm, answer, reason):
    vllm.answers["GET /v1/models"] = answer
    code, out, err = run("smoke", vllm.url)
    assert (code, results(out), err) == (1, {"models": "FAIL"}, "")
    assert reason in out


def test_a_server_that_cannot_be_reached_is_one_failure():
    assert run("smoke", "http://127.0.0.1:1") == (
        1,
        "FAIL  models: http://127.0.0.1:1 cannot be reached (Connection refused)\n",
        "",
    )


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("{}", "chat: the field `usage` of the answer is missing or counts 0 tokens\n"),
        (json.dumps({"usage": USAGE}), "chat: the field `choices` of the answer is missing or empty\n"),
        (json.dumps({"usage": USAGE, "choices": [7]}), "chat: the answer does not have the fields of OpenAI's API\n"),
        ("not JSON", "chat: the answer is not JSON\n"),
    ],
)
def test_what_is_wrong_with_an_answer_is_one_line(answering, answer, reason):
    answering.answers["POST /v1/chat/completions"] = 200, answer
    code, out, err = run("smoke", answering.url)
    assert (code, err) == (1, "")
    assert reason in out
    assert results(out)["structured output"] == "FAIL"


def test_an_answer_that_is_not_json_fails_the_structured_output(answering):
    def answer(body):
        return chat({name: value for name, value in body.items() if name != "response_format"})

    answering.answers["POST /v1/chat/completions"] = 200, answer
    assert "FAIL  structured output: 'Hello' is not JSON\n" in run("smoke", answering.url)[1]


# ---- serve


def get(url):
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_a_sidecar_follows_the_state_of_vllm_and_ends_on_sigterm(vllm):
    port = free_port()
    health_url = f"http://127.0.0.1:{port}"
    sidecar = subprocess.Popen(
        [*COMMAND, "serve", "--target", vllm.url, "--host", "127.0.0.1", "--port", str(port)],
        stderr=subprocess.PIPE, text=True, env=ENVIRON,
    )  # fmt: skip
    try:
        assert f"watching {vllm.url}, answering on port {port}" in sidecar.stderr.readline()
        assert [get(health_url + route)[0] for route in ("/livez", "/readyz", "/startupz")] == [200, 503, 503]
        metrics = [
            f'vllm:num_requests_running{{engine="0",model_name="m"}} {count}\n'
            f'vllm:generation_tokens_total{{engine="0",model_name="m"}} {count}\n'
            for count in (0, 1)
        ]
        vllm.answers |= {"GET /health": (200, ""), "GET /metrics": (200, metrics[0])}
        while "ready: " not in (line := sidecar.stderr.readline()):
            assert line
        assert get(f"{health_url}/readyz") == (
            200,
            "vLLM serves: 0 running and 0 waiting requests, KV cache usage 0%.\n",
        )
        vllm.answers["GET /health"] = 503, ""
        while "dead: " not in (line := sidecar.stderr.readline()):
            assert line
        status, text = get(f"{health_url}/livez")
        assert (status, text) == (503, "vLLM reports that its engine is dead (503 from /health).\n")
    finally:
        sidecar.send_signal(signal.SIGTERM)
    assert sidecar.wait(20) == 0
    sidecar.stderr.close()
