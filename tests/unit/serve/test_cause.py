"""The cause of vLLM's end, from lines of its log."""

from __future__ import annotations

import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_launch.serve import cause

ROOT = [
    "(EngineCore pid=7) ERROR 11-23 16:42:00 [core.py:1499] EngineCore failed to start.",
    "(EngineCore pid=7) ERROR 11-23 16:42:00 [core.py:1499] Traceback (most recent call last):",
    '(EngineCore pid=7) ERROR 11-23 16:42:00 [core.py:1499]   File "a.py", line 1, in f',
    "(EngineCore pid=7) ERROR 11-23 16:42:00 [core.py:1499] ValueError: No available memory for the cache blocks.",
]
WRAPPER = (
    "(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}"
)


def test_the_reason_is_the_root_cause_and_not_its_wrapper():
    for lines in ([*ROOT, WRAPPER], [WRAPPER, *ROOT]):
        assert cause.reason(lines) == "ValueError: No available memory for the cache blocks."


def test_a_process_death_in_the_log_is_preferred_to_a_wrapper():
    death = "Worker proc VllmWorker-0 died unexpectedly (exit code: -9), shutting down executor."
    logged = f"(EngineCore pid=7) ERROR 11-23 16:42:00 [multiproc_executor.py:316] {death}"
    assert cause.reason([WRAPPER, logged, WRAPPER]) == death


def test_a_wrapper_is_the_reason_if_there_is_no_other():
    assert cause.reason([WRAPPER]) == WRAPPER.removeprefix("(APIServer pid=1) ")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("OSError: [Errno 28] No space left on device", "OSError: [Errno 28] No space left on device"),
        ("torch.OutOfMemoryError: CUDA out of memory.", "torch.OutOfMemoryError: CUDA out of memory."),
        (ROOT[0], "EngineCore failed to start."),
        ("api_server.py: error: unrecognized arguments: --foo", "api_server.py: error: unrecognized arguments: --foo"),
        ("INFO all is well", None),
    ],
)
def test_the_reason_is_found_in_each_format_of_vllm(line, reason):
    assert cause.reason(["INFO one", line, "INFO two"]) == reason


@given(st.lists(st.text()))
def test_any_log_has_a_reason_of_bounded_length_or_none(lines):
    why = cause.reason(lines)
    assert why is None or 0 < len(why) <= 1000


@pytest.mark.parametrize(("status", "code"), [(0, 1), (1, 1), (3, 3), (-9, 137), (-15, 143)])
def test_an_unexpected_exit_is_never_exit_0(status, code):
    assert cause.exit_code(status) == code


@pytest.mark.parametrize(("status", "text"), [(0, "exited with status 0"), (-9, "was killed by SIGKILL")])
def test_an_exit_status_is_named_in_words(status, text):
    assert cause.how_it_ended(status) == text


def evidence(*lines, seconds_between=0.0):
    """Return the evidence of a log that has these lines."""
    found = cause.Evidence()
    for number, line in enumerate(lines):
        found.add(line, number * seconds_between)
    return found


def error(process, place, *texts):
    """Return the lines of one logged error."""
    return [f"({process} pid=7) ERROR 12-01 10:00:00 [{place}] {text}" for text in texts]


CLIENT = [
    '(APIServer pid=1) INFO:     10.0.0.7:4711 - "POST /v1/chat/completions HTTP/1.1" 400 Bad Request',
    *error(
        "APIServer",
        "serving.py:200",
        "Error in preprocessing prompt inputs",
        "Traceback (most recent call last):",
        "ValueError: bad prompt",
    ),
    "(APIServer pid=1) ERROR:    Exception in ASGI application",
    "(APIServer pid=1) Traceback (most recent call last):",
    "(APIServer pid=1) ValueError: a client's body",
    "ValueError: a client's",
]
SURVIVED = [
    *error("EngineCore", "core.py:300", "Unexpected error pre-processing request r1", "ValueError: a grammar"),
    *error(
        "Worker_TP0", "multiproc_executor.py:1063", "WorkerProc hit an exception.", "ValueError: an adapter of a client"
    ),
]
ENGINE_DEAD = "EngineDeadError: EngineCore encountered an issue. See stack trace (above) for the root cause."
FATAL = error(
    "EngineCore", "core.py:1513", "EngineCore encountered a fatal error.", "Traceback (most recent call last):"
)


def test_an_error_that_vllm_survived_is_not_the_cause():
    assert evidence(*CLIENT, *SURVIVED).cause() is None
    assert cause.why_it_exited(evidence(*CLIENT), CLIENT, starting=False, died=None) == "the log shows no error"


def test_the_error_that_ended_the_engine_is_the_cause_and_not_an_earlier_one():
    fatal = [
        *FATAL,
        *error("EngineCore", "core.py:1513", "torch.AcceleratorError: CUDA error: unspecified launch failure"),
    ]
    dead = error("APIServer", "async_llm.py:700", "AsyncLLM output_handler failed.", ENGINE_DEAD)
    found = evidence(*CLIENT, *SURVIVED, *fatal, *dead * 500, *CLIENT * 500, seconds_between=40)
    assert found.cause() == "torch.AcceleratorError: CUDA error: unspecified launch failure"


def test_a_workers_own_exception_is_preferred_to_the_engines_wrapper():
    worker = error(
        "Worker_TP1",
        "multiproc_executor.py:1063",
        "WorkerProc hit an exception.",
        "torch.OutOfMemoryError: CUDA out of memory.",
    )
    wrapper = error("EngineCore", "core.py:1513", "RuntimeError: Worker failed with error 'CUDA out of memory.'")
    assert evidence(*CLIENT, *worker, *FATAL, *wrapper).cause() == "torch.OutOfMemoryError: CUDA out of memory."


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (
            "Worker proc VllmWorker-0 died unexpectedly (exit code: -4), shutting down executor.",
            "VllmWorker-0 was killed by SIGILL",
        ),
        (
            "Worker proc VllmWorker-1 died unexpectedly (exit code: -9), shutting down executor.",
            "VllmWorker-1 was killed by SIGKILL",
        ),
        (
            "Worker proc VllmWorker-1 died unexpectedly (exit code: 3), shutting down executor.",
            "VllmWorker-1 exited with status 3",
        ),
        (
            "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore_DP1': -11}",
            "EngineCore_DP1 was killed by SIGSEGV",
        ),
        ("RuntimeError: Process ApiServer_1 (PID: 77) died with exit code -6", "ApiServer_1 was killed by SIGABRT"),
        (
            "RuntimeError: Engine core process EngineCore_DP0 died unexpectedly.",
            "RuntimeError: Engine core process EngineCore_DP0 died unexpectedly.",
        ),
    ],
)
def test_a_process_that_died_is_named_with_its_signal_or_exit_code(line, text):
    consequences = [
        *FATAL,
        *error("EngineCore", "core.py:1513", "RuntimeError: Executor failed."),
        f"(APIServer pid=1) {ENGINE_DEAD}",
    ]
    for starting in (True, False):
        log = [*error("EngineCore", "multiproc_executor.py:316", line), *consequences]
        assert (
            cause.why_it_exited(evidence(*CLIENT * 300, *log, *CLIENT * 300), log, starting=starting, died=None) == text
        )


def test_an_exception_that_nothing_caught_is_the_cause():
    engine = [
        "(EngineCore pid=7) Traceback (most recent call last):",
        "(EngineCore pid=7) ImportError: no such library",
    ]
    server = ["(APIServer pid=1) Traceback (most recent call last):", "(APIServer pid=1) OSError: no such socket"]
    assert evidence(*CLIENT, *engine).cause() == "ImportError: no such library"
    assert (
        evidence(*CLIENT, "(APIServer pid=1) INFO 12-01 10:00:00 [a.py:1] up", *server).cause()
        == "OSError: no such socket"
    )


def test_a_process_that_vanished_is_named_if_the_log_has_no_cause():
    why = cause.why_it_exited(
        evidence(WRAPPER), [WRAPPER], starting=True, died="VLLM::EngineCore was killed by SIGKILL"
    )
    assert why == f"VLLM::EngineCore was killed by SIGKILL. {cause.NOBODY_SAYS}"
    log = ["ImportError: no flash-attn", WRAPPER]
    why = cause.why_it_exited(evidence(*log), log, starting=True, died="VLLM::EngineCore vanished")
    assert why == "VLLM::EngineCore vanished. An exception in the log may explain it: ImportError: no flash-attn"


@pytest.mark.parametrize("number", sorted(cause.OUTSIDE))
def test_a_signal_from_outside_has_no_cause_in_the_log(number):
    why = cause.why_killed(evidence(*CLIENT, *FATAL, *error("EngineCore", "core.py:1513", "ValueError: x")), number)
    assert "another process" in why
    assert "ValueError" not in why


def test_a_crash_has_its_last_line_as_cause():
    assert (
        cause.why_killed(evidence(*CLIENT, "Fatal Python error: Segmentation fault", ""), signal.SIGSEGV)
        == "Fatal Python error: Segmentation fault"
    )
    assert (
        cause.why_killed(evidence(*CLIENT, "  what():  CUDA error: misaligned address"), signal.SIGABRT)
        == "what():  CUDA error: misaligned address"
    )
    assert cause.why_killed(evidence(*CLIENT), signal.SIGABRT) == "the log shows no error"


def test_a_vllm_that_a_signal_of_somebody_else_ended_says_so():
    line = "(APIServer pid=1) INFO 12-01 10:00:00 [launcher.py:250] [shutdown] API server: shutdown triggered"
    why = cause.why_it_exited(evidence(*CLIENT, line), CLIENT, starting=False, died="VLLM::EngineCore vanished")
    assert why == "it got a signal that the launcher did not send"


@given(st.lists(st.text()))
def test_any_log_is_read_without_an_error(lines):
    found = evidence(*lines)
    assert found.cause() is None or len(found.cause()) <= cause.LONGEST
    assert found.crash() is None or len(found.crash()) <= cause.LONGEST
