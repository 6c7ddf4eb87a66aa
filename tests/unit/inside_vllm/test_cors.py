"""CORS of the guard's own answers: a browser may read them where vLLM's options allow it, and gets its preflight."""

import asyncio
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.middleware.cors import CORSMiddleware

from vllm_launch.inside_vllm.cors import Cors, is_preflight
from vllm_launch.inside_vllm.rules import Rules

APP = "https://app.example.com"
ORIGINS = [APP, "https://evil.example.com", "null", f"{APP}.evil.com", "*"]
PREFLIGHT = [
    f"Origin: {APP}".encode(),
    b"Access-Control-Request-Method: POST",
    b"Access-Control-Request-Headers: authorization, x-api-key",
]
CORS_HEADERS = ("access-control-", "vary")


def cors_headers(headers):
    return {name: text for name, text in headers.items() if name.startswith(CORS_HEADERS)}


# ---- as Starlette, with which vLLM answers


def starlette_answers(scope, options):
    """Return status and headers of Starlette's middleware with vLLM's options."""
    sent = []

    async def inner(_, __, send):
        await send({"type": "http.response.start", "status": 401, "headers": []})

    async def send(message):
        sent.append(message)

    names = {name.replace("allowed", "allow"): value for name, value in options.items()}
    asyncio.run(CORSMiddleware(inner, **names)(scope, None, send))
    return sent[0]["status"], {name.decode().lower(): value.decode("latin-1") for name, value in sent[0]["headers"]}


def some(*values):
    return st.lists(st.sampled_from(values), unique=True, max_size=3)


OPTIONS = st.fixed_dictionaries({
    "allowed_origins": some(*ORIGINS), "allowed_methods": some("*", "GET", "POST"),
    "allowed_headers": some("*", "Authorization", "X-Api-Key"), "allow_credentials": st.booleans(),
})  # fmt: skip
REQUEST = st.fixed_dictionaries({"origin": st.sampled_from(ORIGINS)}, optional={
    "access-control-request-method": st.sampled_from(["GET", "POST", "get", "BREW", ""]),
    "access-control-request-headers": st.sampled_from(["authorization", "X-API-KEY,content-type", " Accept , x-other", "", ","]),
    "access-control-request-private-network": st.just("true"),
})  # fmt: skip


@given(OPTIONS, REQUEST, st.sampled_from(["OPTIONS", "POST"]))
def test_the_guards_cors_is_that_of_starlette(options, request_headers, method):
    headers = [(name.encode(), value.encode()) for name, value in request_headers.items()]
    scope = {"type": "http", "method": method, "path": "/v1/models", "headers": headers}
    cors = Cors.of(Rules(**options))
    expected_status, expected = starlette_answers(scope, options)
    if is_preflight(scope):
        answer = cors.preflight(scope)
        if "access-control-allow-origin" not in expected:  # Starlette sends it although it allows nothing
            expected.pop("access-control-allow-credentials", None)
        assert (answer.status, cors_headers(answer.headers)) == (expected_status, cors_headers(expected))
        return
    ours, theirs = cors.answer_headers(scope), cors_headers(expected)
    permission = "access-control-allow-origin"
    assert ours.get(permission) == theirs.get(permission)
    if permission in theirs:
        credentials = "access-control-allow-credentials"
        assert ours.get(credentials) == theirs.get(credentials)
        assert ours.get("vary") == theirs.get("vary") or ours[permission] == "*"


@given(st.text(st.characters(max_codepoint=255)), st.text(st.characters(max_codepoint=255)))
def test_an_answer_repeats_only_text_that_a_server_sends(origin, names):
    headers = [
        (b"origin", origin.encode("latin-1")),
        (b"access-control-request-method", b"GET"),
        (b"access-control-request-headers", names.encode("latin-1")),
    ]
    scope = {"type": "http", "method": "OPTIONS", "path": "/", "headers": headers}
    for credentials in (True, False):
        cors = Cors.of(Rules(allowed_origins=["*"], allow_credentials=credentials))
        for fields in (cors.preflight(scope).headers, cors.answer_headers(scope)):
            assert all(text.isascii() and text.replace("\t", " ").isprintable() for text in fields.values())


# ---- on the wire


def test_a_browser_reads_the_refusals_of_an_allowed_origin(serve):
    server = serve(allowed_origins=[APP], routes=["/v1"])
    origin, key = PREFLIGHT[0], b"Authorization: Bearer right"
    replies = [server.ask(b"/v1/models", origin), server.ask(b"/other", origin, key)]
    server.refuse_flag.touch()
    replies.append(server.ask(b"/v1/models", origin, key, method=b"POST"))
    assert [reply.status for reply in replies] == [401, 404, 503]
    for reply in replies:
        assert (reply.headers["access-control-allow-origin"], reply.headers["vary"]) == (APP, "Origin")
        assert reply.headers["access-control-expose-headers"] == "Retry-After"
        assert json.loads(reply.body)["error"]["code"] == reply.status
        assert "access-control-allow-credentials" not in reply.headers


def test_another_origin_reads_nothing(serve):
    server = serve(allowed_origins=[APP])
    for origin in ORIGINS[1:]:
        reply = server.ask(b"/v1/models", f"Origin: {origin}".encode())
        assert reply.status == 401
        assert cors_headers(reply.headers) == {"vary": "Origin"}
    assert cors_headers(server.ask(b"/v1/models").headers) == {"vary": "Origin"}


def test_without_allowed_origins_the_guard_sends_no_cors_headers_and_refuses_preflights(serve):
    server = serve()
    assert cors_headers(server.ask(b"/v1/models", PREFLIGHT[0]).headers) == {}
    reply = server.ask(b"/v1/models", *PREFLIGHT, method=b"OPTIONS")
    assert (reply.status, "access-control-allow-origin" in reply.headers) == (400, False)
    assert b"--allowed-origins" in reply.body


@pytest.mark.parametrize(
    ("rules", "allowed_origin", "credentials"),
    [({"allowed_origins": ["*"]}, "*", None), ({"allowed_origins": [APP]}, APP, None),
     ({"allowed_origins": ["*"], "allow_credentials": True}, APP, "true")],
)  # fmt: skip
@pytest.mark.parametrize("refusing", [False, True])
def test_a_preflight_is_answered_without_a_key_and_while_refusing(serve, rules, allowed_origin, credentials, refusing):
    server = serve(**rules, routes=["/v1"])
    if refusing:
        server.drain_flag.touch()
        server.refuse_flag.touch()
    for path in (b"/v1/messages", b"/other"):
        reply = server.ask(path, *PREFLIGHT, method=b"OPTIONS")
        assert (reply.status, reply.headers["access-control-allow-origin"]) == (200, allowed_origin)
        assert reply.headers.get("access-control-allow-credentials") == credentials
        assert reply.headers["access-control-allow-headers"] == "authorization, x-api-key"
        assert "POST" in reply.headers["access-control-allow-methods"]
        assert reply.headers.get("connection") == ("close" if refusing else None)
    assert server.reached == []


@pytest.mark.parametrize(
    ("rules", "problem"),
    [({"allowed_origins": ["https://other"]}, b"origin"), ({"allowed_methods": ["GET"]}, b"method"),
     ({"allowed_headers": ["Authorization"]}, b"headers")],
)  # fmt: skip
def test_a_preflight_that_the_options_do_not_allow_is_refused(serve, rules, problem):
    server = serve(**{"allowed_origins": [APP], **rules})
    reply = server.ask(b"/v1/messages", *PREFLIGHT, method=b"OPTIONS")
    assert reply.status == 400
    assert problem in reply.body
    assert server.reached == []
