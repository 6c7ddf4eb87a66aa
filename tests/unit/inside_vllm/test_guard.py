import asyncio
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_launch.inside_vllm.guard import FILE_VARIABLE, Guard, Rules, plain_path


class Door:
    """A guard before an application that says 200 to everything."""

    def __init__(self, monkeypatch, tmp_path, **rules):
        self.draining, self.flag = tmp_path / "draining", tmp_path / "refusing"
        file = tmp_path / "guard.json"
        file.write_text(
            Rules(drain_flag=str(self.draining), refuse_flag=str(self.flag), retry_after=7, **rules).as_json()
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
def door(monkeypatch, tmp_path):
    return lambda **rules: Door(monkeypatch, tmp_path, **rules)


def status(sent):
    return sent[0]["status"]


@pytest.mark.parametrize("path", ["/v1/models", "/tokenize", "/invocations", "/score", "/version", "/docs", "/", ""])
def test_every_route_but_health_asks_for_a_key(door, path):
    sent = door(keys=["right"]).ask(path)
    assert status(sent) == 401
    assert dict(sent[0]["headers"])[b"www-authenticate"] == b"Bearer"
    assert json.loads(sent[1]["body"])["error"]["code"] == 401


@pytest.mark.parametrize("path", ["/health", "/ping", "/metrics"])
def test_probes_and_prometheus_need_no_key_and_are_never_turned_away(door, path):
    d = door(keys=["right"], routes=["/v1/chat/completions"])
    d.flag.touch()
    assert status(d.ask(path)) == 200


@pytest.mark.parametrize("key", ["one", "two"])
def test_any_of_several_keys_opens(door, key):
    assert status(door(keys=["one", "two"]).ask("/v1/models", key)) == 200


@pytest.mark.parametrize(
    ("key", "scheme"), [("three", "Bearer"), ("", "Bearer"), ("one", "Basic"), ("onetwo", "Bearer")]
)
def test_a_wrong_key_or_scheme_does_not_open(door, key, scheme):
    assert status(door(keys=["one", "two"]).ask("/v1/models", key, scheme=scheme)) == 401


def test_a_key_may_hold_letters_beyond_ascii(door):
    assert status(door(keys=["schlüssel"]).ask("/v1/models", "schlüssel")) == 200


def test_without_keys_nobody_is_asked(door):
    assert status(door().ask("/v1/models")) == 200


def test_without_a_rules_file_everything_passes(monkeypatch, tmp_path):
    monkeypatch.delenv(FILE_VARIABLE, raising=False)
    monkeypatch.setattr("vllm_launch.inside_vllm.guard.FILE_VARIABLE", "LAUNCH_GUARD_FILE_THAT_NOBODY_SET")
    d = Door(monkeypatch, tmp_path, keys=["right"])
    assert status(d.ask("/v1/models")) == 200


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
    ],
)
def test_only_allowed_routes_and_what_lies_below_are_served(door, path, expected):
    assert status(door(routes=["/v1/chat/completions/"]).ask(path)) == expected


def test_allowing_the_root_allows_everything(door):
    assert status(door(routes=["/"]).ask("/tokenize")) == 200


def test_a_root_path_is_taken_off_as_the_router_does(door):
    d = door(keys=["right"], routes=["/v1"])
    assert status(d.ask("/llm/health", root_path="/llm")) == 200
    assert status(d.ask("/llm/v1/models", "right", root_path="/llm")) == 200
    assert status(d.ask("/llm/tokenize", "right", root_path="/llm")) == 404
    assert status(d.ask("/llmhealth", root_path="/llm")) == 404


def test_a_draining_server_turns_new_requests_away_and_says_when_to_come_back(door):
    d = door(keys=["right"])
    assert status(d.ask("/v1/models", "right")) == 200
    d.flag.touch()
    sent = d.ask("/v1/models", "right")
    assert status(sent) == 503
    assert dict(sent[0]["headers"])[b"retry-after"] == b"7"
    assert len(d.reached) == 1


def test_while_draining_an_answer_is_the_last_of_its_connection(door):
    d = door(keys=["right"])
    assert (b"connection", b"close") not in d.ask("/v1/models", "right")[0]["headers"]
    d.draining.touch()
    sent = d.ask("/v1/models", "right")
    assert status(sent) == 200
    assert (b"connection", b"close") in sent[0]["headers"]
    d.flag.touch()
    sent = d.ask("/v1/models", "right")
    assert (status(sent), dict(sent[0]["headers"])[b"connection"]) == (503, b"close")


def test_a_browser_may_ask_before_it_brings_its_key(door):
    assert status(door(keys=["right"]).ask("/v1/models", method="OPTIONS")) == 200


def test_websockets_are_closed_without_a_key_and_while_draining(door):
    d = door(keys=["right"])
    assert d.ask("/v1/realtime", kind="websocket")[0] == {
        "type": "websocket.close",
        "code": 1008,
        "reason": "A valid API key is needed.",
    }
    assert status(d.ask("/v1/realtime", "right", kind="websocket")) == 200
    d.flag.touch()
    assert d.ask("/v1/realtime", "right", kind="websocket")[0]["code"] == 1013


def test_the_lifespan_is_not_the_guards_business(door):
    d = door(keys=["right"])
    d.ask("", kind="lifespan")
    assert d.reached[0]["type"] == "lifespan"


@given(st.text())
def test_a_plain_path_has_no_disguise_left(path):
    plain = plain_path(path)
    if plain is not None:
        assert "//" not in plain
        assert not {".", ".."} & set(plain.split("/"))
        assert "%" not in plain
        assert plain_path(plain) == plain


@given(st.sampled_from(["/tokenize", "/v1/models"]), st.data())
def test_no_percent_encoding_makes_another_route_of_a_route(route, data):
    hidden = "".join(
        f"%{ord(letter):02x}" if letter != "/" and data.draw(st.booleans()) else letter for letter in route
    )
    assert plain_path(hidden) == route


def test_the_launchers_own_key_opens_every_route_and_no_other_does(door):
    d = door(keys=["right"], routes=["/v1/chat/completions"], probe_key="secret")
    d.flag.touch()
    assert status(d.ask("/v1/completions", "secret")) == 200
    assert status(d.ask("/v1/completions", "secret", scheme="Basic")) == 404
    assert status(d.ask("/v1/completions", "right")) == 404


@pytest.mark.parametrize("nothing", ["", None])
def test_without_a_key_of_its_own_the_launcher_is_nobody(door, nothing):
    assert status(door(keys=["right"], probe_key=nothing).ask("/v1/completions")) == 401
    assert status(door(keys=["right"], probe_key=nothing).ask("/v1/completions", "None")) == 401
