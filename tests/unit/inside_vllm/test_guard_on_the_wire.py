"""The guard under a real uvicorn: what clients read, and that no form of a request passes it without a key."""

import http.client
import logging
import time

import pytest
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from vllm_launch.inside_vllm import answer

REFUSED = {400, 401, 404, None}
"""Answers of the guard and of uvicorn's parsers. None: the parser closed the connection."""

PATHS = [
    b"/v1/models", b"/V1/MODELS", b"/v1/models/", b"//v1/models", b"/./v1/models", b"/v1/./models", b"/v1//models",
    b"/health/../v1/models", b"/health/%2e%2e/v1/models", b"/health/..%2fv1/models", b"/health%2f..%2fv1%2fmodels",
    b"/health/%252e%252e/v1/models", b"/health/..;/v1/models", b"/health;/../v1/models", b"/health\\..\\v1\\models",
    b"/health%5c..%5cv1/models", b"/health%00/v1/models", b"/health%0a", b"/health%20", b"//health", b"/%2568ealth",
    b"/health//", b"/HEALTH", b"/healthz", b"/health/v1/models", b"/health%3f/v1/models", b"/health%23/v1/models",
    b"/metrics/../tokenize", b"/metrics/x", b"/ping%2f..%2ftokenize", b"/%76%31/models", b"/v1/models?path=/health",
    b"/v1/models#/health", b"/v1/models?key=right&api_key=right", b"http://h/v1/models", b"http://health/v1/models",
    b"http://h/health/../v1/models", b"*", b"/", b"/" * 4090 + b"health", b"/" * 4089 + b"health" + b"/../v1/models",
    b"/health" + b"/" * 5000, b"/\xc3\xa9", b"/%c3%a9/health", b"/%ff/health", b"health", b"/health\t/v1/models",
]  # fmt: skip

WITHOUT_A_KEY = [
    [b"Authorization: Bearer"], [b"Authorization: Bearer "], [b"Authorization: Bearer wrong"], [b"Authorization: right"],
    [b"Authorization: Basic right"], [b"Authorization: Token right"], [b"Authorization: Bearerright"],
    [b"Authorization: Bearer right right"], [b"Authorization: Bearer right,Bearer right"],
    [b"Authorization: Bearer righ\xa0"], [b"Authorization: Bearer right\xa0"], [b"Authorization: Bearer RIGHT"],
    [b"Authorization: Bearer wrong", b"Authorization: Bearer right"],
    [b"Authorization: Bearer right", b"Authorization: Bearer wrong"], [b"Authorization:\r\n  Bearer wrong"],
    [b"Proxy-Authorization: Bearer right"], [b"X-Authorization: Bearer right"], [b"Authorization : Bearer wrong"],
    [b"x-api-key: wrong"], [b"x-api-key:"], [b"x-api-key: Bearer right"], [b"x_api_key: right"], [b"api-key: right"],
    [b"x-api-key: wrong", b"x-api-key: right"], [b"Cookie: authorization=Bearer right; x-api-key=right"],
    [b"X-HTTP-Method-Override: OPTIONS"], [b"X-Original-URL: /health"], [b"X-Rewrite-URL: /health"],
    [b"X-Forwarded-Prefix: /v1"], [b"X-Forwarded-Path: /health"], [b"Host: h/health?"], [b"Upgrade: h2c", b"Connection: Upgrade"],
    [b"Origin: https://app"], [b"Origin: https://app", b"Access-Control-Request-Method: GET"],
]  # fmt: skip


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(answer, "MAX_DROPPED_BYTES", 32 << 20)
    monkeypatch.setattr(answer, "MAX_DROPPING_S", 5.0)


def test_no_form_of_a_path_passes_without_a_key(serve):
    server = serve()
    assert server.ask(b"/health").status == 200
    server.reached.clear()
    answers = {path: server.ask(path).status for path in PATHS}
    assert {path: status for path, status in answers.items() if status not in REFUSED} == {}
    assert [scope["path"] for scope in server.reached] == []


def test_no_form_of_a_path_reaches_a_route_that_is_not_allowed(serve):
    reached = []

    def route(path):
        async def endpoint(_):
            reached.append(path)
            return Response()

        return Route(path, endpoint, methods=["GET"])

    closed, allowed = ["/v1/models", "/tokenize", "/{rest:path}"], b"/v1/chat/completions"
    server = serve(
        Starlette(routes=list(map(route, [f"{allowed.decode()}/{{id}}", *closed]))), routes=[allowed.decode()]
    )
    for path in PATHS:
        for form in (path, path.replace(b"/health", allowed), allowed + path):
            server.ask(form, b"Authorization: Bearer right")
    assert not {"/v1/models", "/tokenize"} & set(reached)
    assert server.ask(allowed + b"/1", b"Authorization: Bearer right").status == 200


@pytest.mark.parametrize("root", ["/llm", "/health", "/llm/"])
def test_no_form_of_a_path_passes_below_a_root_path(serve, root):
    server = serve(root=root)
    below = [root.encode() + path for path in PATHS if path.startswith(b"/")]
    answers = {path: server.ask(path).status for path in [*PATHS, *below]}
    assert {path: status for path, status in answers.items() if status not in REFUSED} == {}
    assert server.reached == []
    assert server.ask(root.encode() + b"/health").status == 200


@pytest.mark.parametrize(
    "method", [b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"PATCH", b"OPTIONS", b"TRACE", b"QUERY", b"get"]
)
def test_no_method_passes_without_a_key(serve, method):
    server = serve()
    assert server.ask(method=method).status in {*REFUSED, 405}
    assert server.reached == []


def test_no_form_of_a_header_passes_without_a_key(serve):
    server = serve()
    for headers in WITHOUT_A_KEY:
        reply, websocket = server.ask(b"/v1/models", *headers), server.ask_websocket(b"/v1/realtime", *headers)
        assert reply.status in REFUSED, headers
        assert websocket.status in REFUSED, headers
    assert server.reached == []


def test_a_request_behind_an_open_one_on_the_same_connection_needs_a_key(serve):
    server = serve()
    second = b"GET /v1/models HTTP/1.1\r\nHost: h\r\n\r\n"
    smuggled = b"POST /health HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    for first in (b"GET /health HTTP/1.1\r\nHost: h\r\n\r\n", smuggled % len(second), smuggled % 5):
        with server.connect() as connection:
            connection.sendall(first + second)
            connection.settimeout(0.3)
            try:
                while connection.recv(1 << 16):
                    pass
            except TimeoutError:
                pass
    assert {scope["path"] for scope in server.reached} <= {"/health"}


@pytest.mark.parametrize(
    "header",
    [b"Authorization: Bearer right", b"authorization: bearer right", b"AUTHORIZATION: BEARER   right ",
     b"x-api-key: right", b"X-API-Key:  right "],
)  # fmt: skip
def test_a_valid_key_passes_in_each_usual_form(serve, header):
    server = serve()
    assert server.ask(b"/v1/messages", header, method=b"POST").status == 200
    assert server.ask_websocket(b"/v1/realtime", header).status == 101
    assert len(server.reached) == 2


@pytest.mark.parametrize("keys", [["other", "right"], []], ids=["the guard has keys", "only vLLM has a key"])
@pytest.mark.parametrize("more", [[], [b"Authorization: Bearer wrong"]], ids=["alone", "beside a wrong bearer"])
def test_x_api_key_counts_as_bearer_for_vllms_own_check(serve, keys, more):
    async def own_check(scope, _, send):
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        status = 200 if values == [b"Bearer right"] else 401
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})

    server = serve(own_check, keys=keys)
    expected = 200 if keys or not more else 401
    assert server.ask(b"/v1/messages", b"x-api-key: right", *more, method=b"POST").status == expected
    assert server.ask(b"/v1/messages", b"x-api-key: wrong", *more, method=b"POST").status == 401


# ---- refused websockets


def test_a_refused_websocket_reads_an_http_answer(serve, caplog):
    caplog.set_level(logging.INFO, "uvicorn.error")
    server = serve(routes=["/v1"])
    reply = server.ask_websocket()
    assert (reply.status, reply.headers["www-authenticate"]) == (401, "Bearer")
    assert b"A valid API key is needed." in reply.body
    assert server.ask_websocket(b"/other", b"Authorization: Bearer right").status == 404
    assert server.ask_websocket(b"/health").status == 404  # only HTTP is open there
    server.refuse_flag.touch()
    reply = server.ask_websocket(b"/v1/realtime", b"Authorization: Bearer right")
    assert (reply.status, reply.headers["retry-after"]) == (503, "7")
    assert b"draining" in reply.body
    assert server.reached == []
    server.close()
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []


# ---- bodies of refused requests

BIG = 8 << 20


def post(server, body, **headers):
    connection = http.client.HTTPConnection(*server.address, timeout=20)
    try:
        connection.request("POST", "/v1/chat/completions", body, headers)
        response = connection.getresponse()
        return response.status, dict(response.headers), response.read()
    finally:
        connection.close()


@pytest.mark.parametrize("form", ["length", "chunked", "http1.0"])
def test_a_client_that_sends_a_large_body_reads_the_refusal_each_time(serve, form, monkeypatch):
    if form == "http1.0":
        monkeypatch.setattr(http.client.HTTPConnection, "_http_vsn_str", "HTTP/1.0")
    server = serve()
    server.refuse_flag.touch()
    for _ in range(10):
        body = iter([b"x" * (BIG // 64)] * 64) if form == "chunked" else b"x" * BIG
        status, headers, text = post(server, body, Authorization="Bearer right")
        assert (status, headers["retry-after"]) == (503, "7")
        assert b"draining" in text
    server.refuse_flag.unlink()
    assert [post(server, b"x" * BIG, Connection="close")[0] for _ in range(10)] == [401] * 10
    assert server.reached == []


def test_the_refusal_goes_out_before_the_body_has_arrived(serve):
    server = serve()
    server.refuse_flag.touch()
    with server.connect() as connection:
        connection.sendall(b"POST /v1/models HTTP/1.1\r\nHost: h\r\nContent-Length: 9000\r\n\r\nfirst part")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 503 ")


@pytest.mark.parametrize("refusing", [True, False])
def test_a_client_that_asks_before_it_sends_reads_the_refusal_and_sends_nothing(serve, refusing):
    server = serve()
    if refusing:
        server.refuse_flag.touch()
    with server.connect() as connection:
        connection.sendall(b"POST /v1/models HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\nExpect: 100-continue\r\n\r\n")
        text = connection.recv(1 << 16)
    assert text.startswith(b"HTTP/1.1 503 " if refusing else b"HTTP/1.1 401 ")
    assert b"connection: close" in text.lower()


def send_for(seconds, connection, size, pause):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        connection.sendall(b"x" * size)
        time.sleep(pause)


@pytest.mark.parametrize("endless", [True, False], ids=["endless", "slow"])
def test_a_body_is_dropped_only_within_a_bound(serve, endless, monkeypatch):
    monkeypatch.setattr(answer, "MAX_DROPPED_BYTES", 1 << 20)
    monkeypatch.setattr(answer, "MAX_DROPPING_S", 5.0 if endless else 0.3)
    server = serve()
    server.refuse_flag.touch()
    with server.connect() as connection:
        connection.sendall(b"POST /v1/models HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % (1 << 40))
        with pytest.raises(ConnectionError):  # the server has closed
            send_for(4, connection, *((1 << 18, 0) if endless else (1, 0.05)))


def test_a_large_body_of_an_accepted_request_reaches_vllm_whole(serve):
    sizes = []

    async def count(_, receive, send):
        size, more = 0, True
        while more:
            message = await receive()
            size, more = size + len(message["body"]), message.get("more_body")
        sizes.append(size)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})

    server = serve(count)
    assert post(server, b"x" * BIG, **{"x-api-key": "right"})[0] == 200
    assert sizes == [BIG]


def test_a_refused_connection_stays_usable_after_its_body(serve):
    server = serve()
    connection = http.client.HTTPConnection(*server.address, timeout=20)
    for key, expected in (("wrong", 401), ("right", 200)):
        connection.request("POST", "/v1/models", b"x" * BIG, {"Authorization": f"Bearer {key}"})
        response = connection.getresponse()
        response.read()
        assert response.status == expected
    connection.close()


# ---- a lost rules file


def test_without_rules_only_the_open_routes_are_served(serve):
    server = serve(lost=True)
    assert [server.ask(path).status for path in (b"/health", b"/ping", b"/metrics")] == [200] * 3
    server.reached.clear()
    for path in PATHS:
        assert server.ask(path, b"Authorization: Bearer right").status in {400, 503, None}
    preflight = [b"Origin: https://app", b"Access-Control-Request-Method: GET"]
    assert server.ask(b"/v1/models", *preflight, method=b"OPTIONS").status == 503
    assert server.ask_websocket(b"/v1/realtime", b"Authorization: Bearer right").status == 503
    assert server.reached == []
