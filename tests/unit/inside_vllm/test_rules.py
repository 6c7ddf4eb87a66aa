"""The guard's rules file: without a complete one, only the health routes are served, and the log says so once."""

import asyncio
import json
import logging

import pytest

from vllm_launch.inside_vllm.guard import Guard
from vllm_launch.inside_vllm.rules import FILE_VARIABLE, Rules, RulesError, read_rules

SECRET = "s3cret-key"
COMPLETE = json.loads(Rules(keys=[SECRET], routes=["/v1"], drain_flag="/run/draining").as_json())


def status(guard, path, key=SECRET):
    sent = []

    async def send(message):
        sent.append(message)

    headers = [(b"authorization", f"Bearer {key}".encode())]
    asyncio.run(guard({"type": "http", "method": "GET", "path": path, "headers": headers}, None, send))
    return sent[0]["status"]


async def app(_, __, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})


def test_the_rules_are_read_as_they_were_written(tmp_path):
    file = tmp_path / "guard.json"
    rules = Rules(["k"], "p", ["/v1"], "d", "r", 9, ["https://a"], ["GET"], ["X-A"], allow_credentials=True)
    file.write_text(rules.as_json())
    assert read_rules(str(file)) == rules
    file.write_text('{"keys": []}')
    assert read_rules(str(file)).keys == []


@pytest.mark.parametrize("path", [None, "", "/nowhere/guard.json", "."])
def test_a_lost_rules_file_closes_the_server_and_is_one_line_in_the_log(path, monkeypatch, caplog):
    monkeypatch.delenv(FILE_VARIABLE, raising=False)
    if path is not None:
        monkeypatch.setenv(FILE_VARIABLE, path)
    guard = Guard(app)
    assert [status(guard, path) for path in ("/v1/models", "/", "/docs", "/v1/chat/completions")] == [503] * 4
    assert [status(guard, path) for path in ("/health", "/ping", "/metrics")] == [200] * 3
    [record] = caplog.records
    assert (record.levelno, record.name) == (logging.ERROR, "vllm.launch_guard")
    line = record.getMessage()
    assert "\n" not in line
    assert FILE_VARIABLE in line
    assert "vllm-launch serve" in line


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "[]", "{}", '"keys"', "\x00", "[" * 100_000, json.dumps(COMPLETE)[:-1]]
    + [
        json.dumps(COMPLETE | change)
        for change in (
            {"keys": None}, {"keys": SECRET}, {"keys": [""]}, {"keys": ["", SECRET]}, {"keys": [None]}, {"keys": {}},
            {"routes": "/v1"}, {"routes": None}, {"routes": [""]}, {"routes": ["v1"]}, {"probe_key": 1}, {"drain_flag": 0},
            {"retry_after": "5"}, {"retry_after": None}, {"allow_credentials": "no"}, {"allowed_origins": "*"}, {"more": SECRET},
        )
    ],
)  # fmt: skip
def test_an_incomplete_rules_file_closes_the_server_and_no_key_is_shown(text, tmp_path, monkeypatch, caplog):
    file = tmp_path / "guard.json"
    file.write_text(text)
    with pytest.raises(RulesError, match="does not hold rules"):
        read_rules(str(file))
    monkeypatch.setenv(FILE_VARIABLE, str(file))
    guard = Guard(app)
    assert [status(guard, "/v1/models", key) for key in (SECRET, "", "other")] == [503] * 3
    assert status(guard, "/health") == 200
    assert SECRET not in caplog.text


def test_a_file_that_is_not_utf_8_closes_the_server(tmp_path):
    (tmp_path / "guard.json").write_bytes(b'{"keys": ["\xff"]}')
    with pytest.raises(RulesError, match="does not hold rules"):
        read_rules(str(tmp_path / "guard.json"))
