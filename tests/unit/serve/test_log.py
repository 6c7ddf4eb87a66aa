"""The copying of the child's log through real pipes."""

from __future__ import annotations

import json
import os
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_launch.serve.log import KEPT_LINE_BYTES, KEPT_LINES, LOGGER, Log, send_to


def copy_through_pipe(written: bytes) -> tuple[bytes, Log]:
    """Copy ``written`` from one pipe to another. Return the copied bytes and the log."""
    (source, child), (reader, target) = os.pipe(), os.pipe()
    log = Log()
    log.copy(source, target)
    os.write(child, written)
    os.close(child)
    log.close_streams(10.0)
    os.close(target)
    with os.fdopen(reader, "rb") as file:
        seen = file.read()
    log.end(10.0)
    return seen, log


@given(st.binary(max_size=300))
def test_bytes_are_copied_unchanged_and_lines_are_kept(written: bytes) -> None:
    copied, log = copy_through_pipe(written)
    assert copied == written
    lines = [line for line in written.replace(b"\r", b"\n").split(b"\n") if line]
    assert [*log.last] == log.take() == [line.decode(errors="replace") for line in lines]
    assert log.take() == []


def test_only_the_last_lines_are_kept_and_long_lines_are_cut() -> None:
    _, log = copy_through_pipe(
        b"x" * (KEPT_LINE_BYTES + 9) + b"\n" + b"".join(b"%d\n" % number for number in range(KEPT_LINES))
    )
    assert [*log.last] == [str(number) for number in range(KEPT_LINES)]
    _, log = copy_through_pipe(b"y" * (KEPT_LINE_BYTES + 9))
    assert [*log.last] == ["y" * KEPT_LINE_BYTES]


def test_a_reader_that_has_gone_does_not_stop_the_child() -> None:
    (source, child), (reader, target) = os.pipe(), os.pipe()
    os.close(reader)
    log = Log()
    log.copy(source, target)
    for _ in range(50):  # more than a pipe's buffer
        os.write(child, b"x" * 4096 + b"\n")
    os.write(child, b"last words\n")
    os.close(child)
    log.close_streams(10.0)
    assert log.last[-1] == "last words"
    os.close(target)
    log.end(10.0)


def test_the_launchers_lines_begin_on_a_new_line(capfd: pytest.CaptureFixture[str]) -> None:
    source, child = os.pipe()
    log = Log()
    log.copy(source, 2)
    os.write(child, b"half a line")
    os.close(child)
    log.close_streams(10.0)
    log.say("ours")
    log.say("again")
    log.say_part("an answer, ")
    log.say_part("growing")
    log.say("done")
    log.end(10.0)
    assert capfd.readouterr().err == "half a line\nours\nagain\nan answer, growing\ndone\n"


def test_lines_are_dropped_without_waiting_if_stderr_blocks() -> None:
    log = Log()
    with log._stderr:  # as while the child's own write to stderr blocks
        for number in range(2000):
            log.say(str(number))
            log.say_part(str(number))
        assert log._own.full()
        log.end(0.01)
    while not log._own.empty():
        log._own.get()
    log.end(10.0)
    assert not log._speaker.is_alive()


TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4}"


def test_our_lines_have_a_time_and_a_level(capfd: pytest.CaptureFixture[str]) -> None:
    log = Log()
    send_to(log, "text")
    LOGGER.info("ready after %d s", 47)
    LOGGER.error("dead")
    log.end(10.0)
    first, second = capfd.readouterr().err.splitlines()
    assert re.fullmatch(f"{TIME} INFO vllm-launch: ready after 47 s", first)
    assert re.fullmatch(f"{TIME} ERROR vllm-launch: dead", second)


def test_our_lines_as_json_are_one_object_each(capfd: pytest.CaptureFixture[str]) -> None:
    log = Log()
    send_to(log, "json")
    LOGGER.warning('a "quoted"\nline of %s', "Zoë")
    LOGGER.info("the plan", extra={"plan": {"max_model_len": 512}})
    log.end(10.0)
    warning, plan = map(json.loads, capfd.readouterr().err.splitlines())
    assert re.fullmatch(TIME, warning.pop("time"))
    assert warning == {"level": "WARNING", "logger": "vllm-launch", "message": 'a "quoted"\nline of Zoë'}
    assert (plan["message"], plan["plan"]) == ("the plan", {"max_model_len": 512})
