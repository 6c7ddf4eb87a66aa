import asyncio
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette._utils import get_route_path

from vllm_launch.inside_vllm.guard import FILE_VARIABLE, OPEN_ROUTES, Guard, Rules, _is_open, plain_path, routed_path


class GuardedApp:
    """A guard in front of an application that answers 200 to every request."""

    def __init__(self, monkeypatch, tmp_path, **rules):
        self.drain_flag, self.refuse_flag = tmp_path / "draining", tmp_path / "refusing"
        file = tmp_path / "guard.json"
        file.write_text(
            Rules(drain_flag=str(self.drain_flag), refuse_flag=str(self.refuse_flag), retry_after=7, **rules).as_json()
        )
        monkeypatch.setenv(FILE_VARIABLE, str(file))
        self.reached = []

        async def app(scope, _, send):
            self.reached.append(scope)
            await send({"type": "http.response.start", "status": 200, "headers": []})

        self.guard = Guard(app)

    def ask(self, path, key=None, *, scheme="Bearer", kind="http", **scope):
        headers = [] if key is None else [(b"authorization", f"{scheme} {key}".encode())]
        sent = []

        async def send(message):
            sent.append(message)

        asyncio.run(self.guard({"type": kind, "path": path, "headers": headers, **scope}, None, send))
        return sent


@pytest.fixture
def guarded_app(monkeypatch, tmp_path):
    return lambda **rules: GuardedApp(monkeypatch, tmp_path, **rules)


def status(sent):
    return sent[0]["status"]


@pytest.mark.parametrize("path", ["/v1/models", "/tokenize", "/invocations", "/score", "/version", "/docs", "/", ""])
def test_every_route_except_health_and_metrics_needs_a_key(guarded_app, path):
    sent = guarded_app(keys=["right"]).ask(path)
    assert status(sent) == 401
    assert dict(sent[0]["headers"])[b"www-authenticate"] == b"Bearer"
    assert json.loads(sent[1]["body"])["error"]["code"] == 401


@pytest.mark.parametrize("path", ["/health", "/ping", "/metrics"])
def test_health_and_metrics_need_no_key_and_are_never_refused(guarded_app, path):
    guarded = guarded_app(keys=["right"], routes=["/v1/chat/completions"])
    guarded.refuse_flag.touch()
    assert status(guarded.ask(path)) == 200


@pytest.mark.parametrize("key", ["one", "two"])
def test_each_of_several_keys_is_accepted(guarded_app, key):
    assert status(guarded_app(keys=["one", "two"]).ask("/v1/models", key)) == 200


def test_a_request_without_x_api_key_reaches_vllm_unchanged(guarded_app):
    guarded = guarded_app(keys=["right"])
    guarded.ask("/v1/models", "right", scheme="bearer")
    assert guarded.reached[0]["headers"] == [(b"authorization", b"bearer right")]


@pytest.mark.parametrize(
    ("key", "scheme"), [("three", "Bearer"), ("", "Bearer"), ("one", "Basic"), ("onetwo", "Bearer")]
)
def test_a_wrong_key_or_scheme_is_refused(guarded_app, key, scheme):
    assert status(guarded_app(keys=["one", "two"]).ask("/v1/models", key, scheme=scheme)) == 401


def test_a_key_may_contain_non_ascii_letters(guarded_app):
    assert status(guarded_app(keys=["schlüssel"]).ask("/v1/models", "schlüssel")) == 200


def test_without_keys_no_key_is_needed(guarded_app):
    assert status(guarded_app().ask("/v1/models")) == 200


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/v1/chat/completions", 200),
        ("/v1/chat/completions/", 200),
        ("//v1//chat/completions", 200),
        ("/v1/chat/completions/batch", 200),
        ("/v1/chat/completionsX", 404),
        ("/v1/completions", 404),
        ("/tokenize", 404),
        ("/v1/chat/completions/../../../tokenize", 404),
        ("/v1/chat/completions/%2e%2e/tokenize", 404),
        ("/v1/chat/completions%252f..%252ftokenize", 404),
        ("/health/../tokenize", 404),
        ("/v1/chat/completions\\..\\tokenize", 404),
        ("/v1/chat/completions" + "/" * 4096, 404),
    ],
)
def test_only_allowed_routes_and_routes_below_them_are_served(guarded_app, path, expected):
    assert status(guarded_app(routes=["/v1/chat/completions/"]).ask(path)) == expected


def test_allowing_the_root_allows_everything(guarded_app):
    assert status(guarded_app(routes=["/"]).ask("/tokenize")) == 200


def test_the_root_path_is_removed_as_the_router_does(guarded_app):
    guarded = guarded_app(keys=["right"], routes=["/v1"])
    assert status(guarded.ask("/llm/health", root_path="/llm")) == 200
    assert status(guarded.ask("/llm/v1/models", "right", root_path="/llm")) == 200
    assert status(guarded.ask("/llm/tokenize", "right", root_path="/llm")) == 404
    assert status(guarded.ask("/llmhealth", root_path="/llm")) == 404


def test_a_draining_server_refuses_new_requests_and_sends_retry_after(guarded_app):
    guarded = guarded_app(keys=["right"])
    assert status(guarded.ask("/v1/models", "right")) == 200
    guarded.refuse_flag.touch()
    sent = guarded.ask("/v1/models", "right")
    assert status(sent) == 503
    assert dict(sent[0]["headers"])[b"retry-after"] == b"7"
    assert len(guarded.reached) == 1


def test_while_draining_each_response_closes_its_connection(guarded_app):
    guarded = guarded_app(keys=["right"])
    assert (b"connection", b"close") not in guarded.ask("/v1/models", "right")[0]["headers"]
    guarded.drain_flag.touch()
    sent = guarded.ask("/v1/models", "right")
    assert status(sent) == 200
    assert (b"connection", b"close") in sent[0]["headers"]
    guarded.refuse_flag.touch()
    sent = guarded.ask("/v1/models", "right")
    assert (status(sent), dict(sent[0]["headers"])[b"connection"]) == (503, b"close")


def test_a_request_that_came_before_the_drain_closes_its_connection_if_it_is_answered_in_it(guarded_app):
    guarded = guarded_app(keys=["right"])

    async def slow(_, __, send):
        guarded.drain_flag.touch()
        await send({"type": "http.response.start", "status": 200, "headers": []})

    guarded.guard.app = slow
    assert (b"connection", b"close") in guarded.ask("/v1/models", "right")[0]["headers"]


def test_a_server_that_cannot_answer_websockets_with_http_closes_them(guarded_app):
    guarded = guarded_app(keys=["right"])
    assert guarded.ask("/v1/realtime", kind="websocket")[0] == {"type": "websocket.close", "code": 1008}
    assert status(guarded.ask("/v1/realtime", "right", kind="websocket")) == 200
    guarded.refuse_flag.touch()
    assert guarded.ask("/v1/realtime", "right", kind="websocket")[0]["code"] == 1013


def test_lifespan_messages_pass_through(guarded_app):
    guarded = guarded_app(keys=["right"])
    guarded.ask("", kind="lifespan")
    assert guarded.reached[0]["type"] == "lifespan"


@given(st.text())
def test_a_plain_path_has_no_escapes_and_no_dot_segments(path):
    plain = plain_path(path)
    if plain is not None:
        assert "//" not in plain
        assert not {".", ".."} & set(plain.split("/"))
        assert "%" not in plain
        assert plain_path(plain) == plain


@given(st.sampled_from(["/tokenize", "/v1/models"]), st.data())
def test_a_percent_encoded_route_is_still_the_same_route(route, data):
    encoded = "".join(
        f"%{ord(letter):02x}" if letter != "/" and data.draw(st.booleans()) else letter for letter in route
    )
    assert plain_path(encoded) == route


def test_only_the_launchers_own_key_opens_every_route(guarded_app):
    guarded = guarded_app(keys=["right"], routes=["/v1/chat/completions"], probe_key="secret")
    guarded.refuse_flag.touch()
    assert status(guarded.ask("/v1/completions", "secret")) == 200
    assert status(guarded.ask("/v1/completions", "secret", scheme="Basic")) == 404
    assert status(guarded.ask("/v1/completions", "right")) == 404


@pytest.mark.parametrize("probe_key", ["", None])
def test_without_a_probe_key_the_launcher_has_no_access(guarded_app, probe_key):
    assert status(guarded_app(keys=["right"], probe_key=probe_key).ask("/v1/completions")) == 401
    assert status(guarded_app(keys=["right"], probe_key=probe_key).ask("/v1/completions", "None")) == 401


PIECES = st.sampled_from(
    ["/", "//", "health", "metrics", "ping", "v1", "models", ".", "..", "%2f", "%2e", "\\", ";", "?", "%00"]
)


@given(st.lists(PIECES).map("".join) | st.text(), st.sampled_from(["", "/", "/v1", "/health", "/v1/"]))
def test_without_a_key_only_what_the_router_sees_as_an_open_route_passes(path, root):
    scope = {"type": "http", "path": path, "root_path": root}
    if _is_open(scope):
        assert get_route_path(scope).removesuffix("/") in OPEN_ROUTES


@given(st.lists(PIECES).map("".join) | st.text(), st.sampled_from(["", "/", "/v1", "/health", "/v1/"]))
def test_the_guard_and_the_router_see_the_same_path(path, root):
    scope = {"type": "http", "path": path, "root_path": root}
    assert routed_path(scope) == (get_route_path(scope) or path)
