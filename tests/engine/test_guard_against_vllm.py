"""The guard in front of the pinned vLLM's own middleware: its key check and its CORS."""

import argparse
import asyncio
import os

import pytest

os.environ["VLLM_TARGET_DEVICE"] = "cpu"

from fastapi import FastAPI
from vllm.entrypoints.serve.middleware.register import init_entrypoints_middleware  # noqa: TID251 - the pinned vLLM

from vllm_launch.inside_vllm.guard import FILE_VARIABLE, OPEN_ROUTES
from vllm_launch.serve.command import GUARD, guard_rules
from vllm_launch.settings.flags import parse_flags
from vllm_launch.settings.read import read_settings

ORIGIN = "https://app.example.com"


@pytest.fixture
def ask(tmp_path, monkeypatch):
    """Return a function that asks vLLM's middleware, with vLLM's ``--api-key right`` and one allowed origin."""
    words = ["m", "--allowed-origins", f'["{ORIGIN}"]', "--allow-credentials"]
    rules = guard_rules(read_settings(parse_flags(words), {}), ["right", "only the guard's"], "probe", tmp_path)
    (tmp_path / "guard.json").write_text(rules.as_json())
    monkeypatch.setenv(FILE_VARIABLE, str(tmp_path / "guard.json"))
    app = FastAPI()
    for path in ("/v1/messages", *OPEN_ROUTES):
        app.add_api_route(path, lambda: "served", methods=["POST"])
    arguments = argparse.Namespace(
        allowed_origins=[ORIGIN], allowed_methods=["*"], allowed_headers=["*"], allow_credentials=True,
        api_key=["right"], enable_request_id_headers=True, middleware=[GUARD],
    )  # fmt: skip
    init_entrypoints_middleware(arguments, app, ("generate",))

    def ask(path, method="POST", **headers):
        sent = []
        names = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": names, "root_path": ""}

        async def receive():
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message):
            sent.append(message)

        asyncio.run(app(scope, receive, send))
        return sent[0]["status"], {name.decode(): value.decode() for name, value in sent[0]["headers"]}

    return ask


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, 401),
        ({"authorization": "Bearer right"}, 200),
        ({"x_api_key": "right"}, 200),
        ({"x_api_key": "right", "authorization": "Bearer wrong"}, 200),
        ({"x_api_key": "wrong", "authorization": "Bearer right"}, 200),
        ({"x_api_key": "wrong"}, 401),
        ({"x_api_key": "only the guard's"}, 401),  # vLLM refuses it
    ],
)
def test_x_api_key_passes_vllms_own_key_check(ask, headers, expected):
    assert ask("/v1/messages", **headers)[0] == expected


def test_a_preflight_of_the_guard_is_the_same_as_vllms(ask):
    asked = {"origin": ORIGIN, "access_control_request_method": "POST", "access_control_request_headers": "x-api-key"}
    guards, (status, vllms) = ask("/v1/messages", "OPTIONS", **asked), ask("/health", "OPTIONS", **asked)
    del vllms["x-request-id"]  # which only vLLM adds
    assert guards == (status, vllms)


def test_a_browser_reads_the_guards_401_as_it_reads_vllms_answers(ask):
    refused, served = (
        ask("/v1/messages", origin=ORIGIN),
        ask("/v1/messages", origin=ORIGIN, authorization="Bearer right"),
    )
    assert (refused[0], served[0]) == (401, 200)
    for name in ("access-control-allow-origin", "access-control-allow-credentials", "vary"):
        assert refused[1][name] == served[1][name]
