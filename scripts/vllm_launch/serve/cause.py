"""Finds in vLLM's log why it ended. Pure: time is an argument.

A serving vLLM logs the errors of its clients too, and survives them. Such an error must not be named as the cause of
its end. So an exception counts only in three cases: a line that vLLM writes at its end introduces it, nothing caught
it, or a worker logged it at most ``FRESH_SECONDS`` before the end.
"""

from __future__ import annotations

import re
import signal
import threading
from collections import deque
from collections.abc import Sequence
from typing import Final, Literal, NamedTuple

KEPT_FINDINGS = 100
FRESH_SECONDS = 30.0
"""Most seconds between an exception in a worker and the end of its engine, if the exception is the cause."""
LONGEST = 1000
"""Most characters of a cause."""

_PROCESS: Final = re.compile(r"\s*\(([^()]*?) ?pid=\d+\) ?")
_LOGGED: Final = re.compile(r"(DEBUG|INFO|WARNING|ERROR|CRITICAL) \d\d-\d\d [\d:]+ \[([^\]]+)\] ?")
_UVICORN: Final = re.compile(r"(DEBUG|INFO|WARNING|ERROR|CRITICAL):\s+")
_ERRORS: Final = frozenset({"ERROR", "CRITICAL"})
_EXCEPTION: Final = re.compile(r"^(?:[A-Za-z_][\w.]*\.)?([A-Za-z_]\w*(?:Error|Exception|Interrupt|Killed)): (.+)$")
_WRAPPERS: Final = re.compile(
    r"Engine core initialization failed|EngineDeadError|EngineCore encountered an issue|RuntimeError: Executor failed"
    r"|WorkerProc initialization failed|CancelledError|KeyboardInterrupt"
    r"|failed due to an exception in a background process"
)
# Texts of vLLM 0.32.0. The comment names the file below v1/.
_END: Final = re.compile(
    r"EngineCore failed to start"  # engine/core.py
    r"|EngineCore encountered a fatal error"  # engine/core.py
    r"|WorkerProc failed"  # executor/multiproc_executor.py, executor/ray_executor_v2.py
)
_WORKER: Final = "WorkerProc hit an exception"  # executor/multiproc_executor.py; the engine survives some of them
_DIED: Final = re.compile(
    r"Worker proc (\S+) died unexpectedly \(exit code: (-?\d+)\)"  # executor/multiproc_executor.py
    r"|Failed core proc\(s\): \{'([^']+)': (-?\d+)"  # engine/utils.py
    r"|Process (\S+) \(PID: \d+\) died with exit code (-?\d+)"  # utils.py
)
_DIED_SOMEHOW: Final = "died unexpectedly"  # utils.py
_CRASH: Final = re.compile(r"^(?:Fatal Python error: .+|\s*what\(\): .+)$")  # CPython's faulthandler, C++'s terminate
_ASKED: Final = "[shutdown] API server: shutdown triggered"  # ../entrypoints/launchers/launcher.py
_CUT: Final = "force killing remaining process"  # utils.py

OUTSIDE: Final = frozenset({signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT})
"""Signals that a process never gets for an error of its own."""

Kind = Literal["killed", "died", "end", "worker", "uncaught", "api", "crash"]


class _Finding(NamedTuple):
    kind: Kind
    text: str
    at: float


class Evidence:
    """What vLLM's log says about its end so far. Several threads may call ``add`` at the same time.

    ``asked``: vLLM got a signal that ends it. ``cut``: it killed engines that had not finished in time.
    """

    def __init__(self) -> None:
        self.asked = self.cut = False
        self._findings: deque[_Finding] = deque(maxlen=KEPT_FINDINGS)
        # By stream and process: the tag (what the prefix has in brackets, or "uvicorn") and the first line of the error
        # that is being logged.
        self._heads: dict[tuple[int, str], tuple[str, str]] = {}
        self._lock = threading.Lock()

    def add(self, line: str, now: float, stream: int = 2) -> None:
        """Take ``line`` of the log into account. ``now``: a monotonic clock. ``stream``: file descriptor of the log."""
        with self._lock:
            process, text, head = self._place(line, stream)
            self.asked |= _ASKED in text
            self.cut |= _CUT in text
            if finding := _finding(process, text, head):
                self._findings.append(_Finding(*finding, now))

    def _place(self, line: str, stream: int) -> tuple[str, str, str]:
        """Return the line's process, its text, and the first line of the error that it belongs to, or ""."""
        match = _PROCESS.match(line)
        process, rest = (match[1], line[match.end() :]) if match else ("", line)
        key, before = (stream, process), self._heads.get((stream, process))
        if logged := _LOGGED.match(rest) or _UVICORN.match(rest):
            tag = logged[2] if logged.re is _LOGGED else "uvicorn"
            text = rest[logged.end() :]
            if logged[1] not in _ERRORS:
                self._heads.pop(key, None)
            elif before is None or before[0] != tag or tag == "uvicorn" or _END.search(text) or _WORKER in text:
                self._heads[key] = tag, text
        else:
            text = rest
            if text.startswith("Traceback (most") and (before is None or before[0] != "uvicorn"):
                self._heads[key] = "", "uncaught"
        return process, text.strip(), self._heads.get(key, ("", ""))[1]

    def cause(self) -> str | None:
        """Return why vLLM's engine or server ended, or None. Leaves out errors that vLLM is known to survive.

        A worker logs its exception first. The engine core and the API server wrap it in their own, so the first one is
        the cause. Of uncaught exceptions, the last one is the cause.
        """
        with self._lock:
            found = list(self._findings)
        end = next((finding.at for finding in found if finding.kind in {"killed", "died", "end"}), None)
        if end is not None:
            found = [finding for finding in found if finding.kind != "worker" or finding.at >= end - FRESH_SECONDS]
        else:
            found = [finding for finding in found if finding.kind != "worker"]
        for kind in ("killed", "worker", "end", "uncaught", "died", "api"):
            texts = [finding.text for finding in found if finding.kind == kind]
            if texts:
                return texts[-1 if kind in {"uncaught", "api"} else 0]
        return None

    def crash(self) -> str | None:
        """Return the last "Fatal Python error" or C++ "what():" line in the log, or None."""
        with self._lock:
            return next((finding.text for finding in reversed(self._findings) if finding.kind == "crash"), None)


def _finding(process: str, text: str, head: str) -> tuple[Kind, str] | None:
    kind: Kind | None = None
    if died := _DIED.search(text):
        name, code = (part for part in died.groups() if part is not None)
        kind, text = ("killed" if int(code) < 0 else "died"), f"{name} {how_it_ended(int(code))}"
    elif _CRASH.match(text):
        kind = "crash"
    elif _WRAPPERS.search(text):
        pass
    elif _DIED_SOMEHOW in text:
        kind = "died"
    elif _EXCEPTION.match(text):
        kind = _kind_of_exception(process, head)
    return kind and (kind, text[:LONGEST])


def _kind_of_exception(process: str, head: str) -> Kind | None:
    if _END.search(head):
        return "end"
    if _WORKER in head:
        return "worker"
    if process.startswith(("EngineCore", "Worker", "VllmWorker")) and head in {"", "uncaught"}:
        return "uncaught"
    return "api" if head == "uncaught" else None


def why_it_exited(evidence: Evidence, lines: Sequence[str], *, starting: bool, died: str | None) -> str:
    """Return why vLLM exited by itself.

    ``lines``: the end of its log. ``died``: how one of its processes ended, or None. No client has sent a request to a
    vLLM that is ``starting``, so every exception in its log may be the cause.
    """
    if cause := evidence.cause():
        return cause
    if evidence.asked:
        return "it got a signal that the launcher did not send"
    guess = root_cause(lines) if starting else None
    if died:
        return f"{died}. " + (f"An exception in the log may explain it: {guess}" if guess else NOBODY_SAYS)
    return guess or (reason(lines) if starting else None) or "the log shows no error"


NOBODY_SAYS: Final = (
    "The log shows no cause. If a signal ended the process, the kernel may have sent it for lack of memory: check dmesg"
)


def why_killed(evidence: Evidence, number: int) -> str:
    """Return why the signal ``number`` ended vLLM. A signal from outside leaves no cause in the log."""
    if number == signal.SIGKILL:
        return "another process sent the signal, or the kernel did for lack of memory: check dmesg"
    if number in OUTSIDE:
        return "another process than the launcher sent the signal"
    return evidence.crash() or "the log shows no error"


def root_cause(lines: Sequence[str]) -> str | None:
    """Return the first exception in ``lines`` that does not wrap another, else a process death that vLLM logged."""
    plain = [_plain(line) for line in lines]
    exceptions = (line for line in plain if _EXCEPTION.match(line) and not _WRAPPERS.search(line))
    deaths = (line for line in plain if _DIED_SOMEHOW in line)
    cause = next(exceptions, None) or next(deaths, None)
    return cause and cause[:LONGEST]


def reason(lines: Sequence[str]) -> str | None:
    """Return the line of the last ``lines`` that best explains why vLLM did not start, or None.

    Take the root cause, else the last wrapper, else the last logged error, else the last usage error.
    """
    if cause := root_cause(lines):
        return cause
    wrappers = [text for line in lines if _EXCEPTION.match(text := _plain(line))]
    errors = [_plain(line) for line in lines if re.search(r"\b(?:ERROR|CRITICAL) \d\d-", line)]
    usage = [text for line in lines if re.match(r"\S+: error: ", text := _plain(line))]
    candidates = next((texts for texts in (wrappers, errors, usage) if texts and texts[-1]), None)
    return candidates[-1][:LONGEST] if candidates else None


_PREFIX: Final = re.compile(r"^\s*(?:\([^()]*pid=\d+\) )?(?:(?:ERROR|CRITICAL) \d\d-\d\d [\d:]+ \[[^\]]+\] )?")


def _plain(line: str) -> str:
    return _PREFIX.sub("", line).strip()


def exit_code(status: int) -> int:
    """Return the launcher's exit code for a child that exited unexpectedly: 0 becomes 1, signal n becomes 128 + n.

    ``status``: the child's exit status as in subprocess, -n for signal n.
    """
    return 128 - status if status < 0 else status or 1


def how_it_ended(status: int) -> str:
    """Return how a process ended, such as "exited with status 1" or "was killed by SIGKILL".

    ``status``: its exit status as in subprocess, -n for signal n.
    """
    if status >= 0:
        return f"exited with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:  # a real-time signal has no name
        return f"was killed by signal {-status}"
