"""``vllm-health`` as it is typed: each command in a process of its own, over a stand-in for vLLM."""

from __future__ import annotations

import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request

import pytest
from machine import free_port


class Vllm(http.server.ThreadingHTTPServer):
    """An API server; ``answers``: status and body by "METHOD /path"; what is not in it is 404."""

    daemon_threads = True

    def __init__(self):
        self.answers, self.asked = {}, []
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self):
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        self.server.asked.append(
            (self.command, self.path, json.loads(body) if body else None, dict(self.headers.items()))
        )
        status, text = self.server.answers.get(f"{self.command} {self.path}", (404, '{"detail":"Not Found"}'))
        if callable(text):
            text = text(json.loads(body))
        kind = "text/event-stream" if text.startswith("data:") else "application/json"
        self.send_response(status)
        self.send_header("content-type", kind)
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
    ("words", "said"),
    [
        (["smoke", "localhost:8000"], "URL 'localhost:8000': it is not http:// or https:// and a host"),
        (["smoke", "http://"], "write one such as http://127.0.0.1:8000"),
        (["serve", "--target", "ftp://x"], "URL 'ftp://x'"),
        (["serve", "--port", "0"], "'0' is no port: give 1 to 65535"),
        (["serve", "--port", "http"], "'http' is no port"),
        (["serve", "--stall-seconds", "-1"], "'-1' is no time: give seconds, 0 or more"),
        (["serve", "--stall-seconds", "nan"], "'nan' is no time"),
        (["serve", "--start-stall-seconds", "10m"], "'10m' is no time"),
        (["wait", "http://x", "--seconds", "inf"], "'inf' is no time"),
        (
            ["smoke", "http://x", "--api-key-file", "/not/there"],
            "--api-key-file /not/there: cannot be read: No such file",
        ),
        (["smoke", "http://x", "--api-key-file", "/dev/null"], "the file holds no key; write one in its first line"),
        (["smoke", "http://x", "--api-key-file", "/"], "cannot be read: Is a directory"),
        (["smoke", "http://x", "--api-key-file", "/proc/self/mounts"], "an HTTP header cannot carry its first line"),
        (["smoke"], "the following arguments are required: URL"),
        (["serf"], "invalid choice: 'serf'"),
        (["serve", "--stall", "3"], "unrecognized arguments: --stall 3"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_a_mistake_is_one_line_with_a_remedy_and_exit_2(words, said):
    code, out, err = run(*words)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("vllm-health")
    assert said in err


def test_a_taken_port_is_one_line(vllm):
    code, out, err = run("serve", "--target", vllm.url, "--port", vllm.url.rpartition(":")[2])
    assert (code, out) == (2, "")
    assert "the port is in use; end what listens there, or give another --port" in err.splitlines()[-1]


def test_a_light_install_says_what_to_install():
    code = "import runpy, sys; sys.modules['aiohttp'] = None; runpy.run_module('vllm_health', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr == "vllm-health: aiohttp is not installed; install 'vllm-launch[serve]'\n"


def test_help_names_every_command():
    code, out, _ = run("--help")
    assert code == 0
    assert all(word in out for word in ("serve", "smoke", "wait"))


# ---- wait


def test_waiting_ends_when_the_health_port_says_ready(vllm):
    vllm.answers["GET /readyz"] = 503, "vLLM is not ready yet: compiling."
    vllm.answers["GET /livez"] = 200, ""
    waiting = subprocess.Popen([*COMMAND, "wait", vllm.url], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert waiting.stderr.readline() == "vllm-health: vLLM is not ready yet: compiling.\n"
    vllm.answers["GET /readyz"] = 200, "vLLM serves."
    out, err = waiting.communicate(timeout=30)
    assert (waiting.returncode, out, err) == (0, "vLLM serves.\n", "")


def test_waiting_for_vllm_itself_asks_its_health(vllm):
    vllm.answers["GET /health"] = 200, ""
    assert run("wait", f"{vllm.url}/v1/") == (0, "vLLM answers /health\n", "")


def test_waiting_for_the_dead_ends(vllm):
    vllm.answers |= {"GET /readyz": (503, "It hangs."), "GET /livez": (503, "It hangs.")}
    code, _, err = run("wait", vllm.url)
    assert code == 1
    assert err.splitlines() == [
        "vllm-health: It hangs.",
        "vllm-health: it will not become ready: /livez says that it is dead",
    ]


def test_waiting_has_an_end_where_one_is_given():
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        code, _, err = run("wait", f"http://127.0.0.1:{nobody.getsockname()[1]}", "--seconds", "1")
    assert code == 1
    assert "not ready after 1 s" in err


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
    said = {"role": "assistant", "content": '{"city": "Oslo"}' if "response_format" in body else "Hello"}
    if "tools" in body:
        call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Lima"}'}}
        said = {"role": "assistant", "content": None, "tool_calls": [call]}
    choice = {"index": 0, "message": said, "finish_reason": "stop"}
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
    """Result by name of the check; what is behind the name may change with time."""
    return {line[6:].partition(":")[0]: line[:4].strip() for line in out.splitlines()}


ALL = ("models", "completion", "chat", "stream", "tool call", "structured output")


def test_a_server_that_does_all_is_all_ok(answering, tmp_path):
    (tmp_path / "keys").write_text("first\nsecond\n")
    code, out, err = run("smoke", answering.url, "--api-key-file", str(tmp_path / "keys"))
    assert (code, results(out), err) == (0, dict.fromkeys(ALL, "ok"), "")
    assert {headers.get("Authorization") or headers["authorization"] for _, _, _, headers in answering.asked} == {
        "Bearer first"
    }
    assert {body["model"] for _, _, body, _ in answering.asked if body} == {"m"}


def broken(change):
    def answer(body):
        return json.dumps(change(json.loads(chat(body)))) if not body.get("stream") else change(chat(body))

    return answer


@pytest.mark.parametrize(
    ("change", "fails"),
    [
        (lambda told: told | {"usage": None} if isinstance(told, dict) else told, {"chat"}),
        (lambda told: told if isinstance(told, dict) else told.replace('"usage"', '"used"'), {"stream"}),
        (lambda told: told if isinstance(told, dict) else told.replace('"stop"', "null"), {"stream"}),
        (lambda told: json.loads(json.dumps(told).replace("Oslo", "Rome")) if isinstance(told, dict) else told, {"structured output"}),
        (lambda told: json.loads(json.dumps(told).replace("Lima", "Rome")) if isinstance(told, dict) else told, {"tool call"}),
        (lambda told: json.loads(json.dumps(told).replace("weather", "whether")) if isinstance(told, dict) else told, {"tool call"}),
        (lambda told: json.loads(json.dumps(told).replace('"stop"', '"error"')) if isinstance(told, dict) else told, {"chat"}),
    ],
)  # fmt: skip
def test_each_thing_that_is_wrong_fails_its_own_check(answering, change, fails):
    answering.answers["POST /v1/chat/completions"] = 200, broken(change)
    code, out, _ = run("smoke", answering.url)
    assert code == 1
    assert {name for name, result in results(out).items() if result == "FAIL"} == fails


def test_what_is_switched_off_is_no_failure(answering):
    def refuse(body):
        return chat(body)

    answering.answers["POST /v1/chat/completions"] = 200, refuse
    error = {"error": {"message": 'tool_choice=function "weather" requires --tool-call-parser to be set', "code": 400}}
    answering.answers["POST /v1/completions"] = 400, json.dumps(error)
    code, out, _ = run("smoke", answering.url)
    assert code == 0
    assert results(out)["completion"] == "off"


def test_a_model_that_generates_nothing_is_tried_for_embeddings(answering):
    del answering.answers["POST /v1/completions"]
    found = {
        "object": "list",
        "data": [{"object": "embedding", "index": 0, "embedding": [0.5, -1.0]}],
        "model": "m",
        "usage": USAGE,
    }
    answering.answers["POST /v1/embeddings"] = 200, json.dumps(found)
    code, out, _ = run("smoke", answering.url)
    assert (code, results(out)) == (0, {"models": "ok", "embedding": "ok"})
    answering.answers["POST /v1/embeddings"] = 200, json.dumps(found).replace("0.5, -1.0", "0.0, 0.0")
    assert run("smoke", answering.url)[0] == 1


@pytest.mark.parametrize(
    "answer", [(401, '{"error": {"message": "A valid API key is needed."}}'), (200, '{"data": []}')]
)
def test_a_server_that_names_no_model_is_one_failure(vllm, answer):
    vllm.answers["GET /v1/models"] = answer
    code, out, _ = run("smoke", vllm.url)
    assert (code, results(out)) == (1, {"models": "FAIL"})


# ---- serve


def get(url):
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_a_sidecar_follows_the_vllm_beside_it_and_ends_when_it_is_told_to(vllm):
    port = free_port()
    told = f"http://127.0.0.1:{port}"
    sidecar = subprocess.Popen(
        [*COMMAND, "serve", "--target", vllm.url, "--host", "127.0.0.1", "--port", str(port)],
        stderr=subprocess.PIPE, text=True, env=ENVIRON,
    )  # fmt: skip
    try:
        assert f"watching {vllm.url}, answering on port {port}" in sidecar.stderr.readline()
        assert [get(told + route)[0] for route in ("/livez", "/readyz", "/startupz")] == [200, 503, 503]
        metrics = [
            f'vllm:num_requests_running{{engine="0",model_name="m"}} {count}\n'
            f'vllm:generation_tokens_total{{engine="0",model_name="m"}} {count}\n'
            for count in (0, 1)
        ]
        vllm.answers |= {"GET /health": (200, ""), "GET /metrics": (200, metrics[0])}
        while "ready: " not in (line := sidecar.stderr.readline()):
            assert line
        assert get(f"{told}/readyz") == (200, "vLLM serves: 0 requests run, 0 wait, KV cache 0% full.\n")
        vllm.answers["GET /health"] = 503, ""
        while "dead: " not in (line := sidecar.stderr.readline()):
            assert line
        status, text = get(f"{told}/livez")
        assert (status, text) == (503, "vLLM says that its engine is dead (503 of /health).\n")
    finally:
        sidecar.send_signal(signal.SIGTERM)
    assert sidecar.wait(20) == 0
    sidecar.stderr.close()
