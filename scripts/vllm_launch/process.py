"""Processes as Linux shows them: who descends from whom, what they are called, what they have done. Touches /proc."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from pathlib import Path

import msgspec

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None, use_errno=True)  # loaded here: after a fork is no time to load libraries


class Process(msgspec.Struct, frozen=True):
    """One process: ``cpu_seconds`` of itself, ``resident`` and ``read`` in bytes, ``title`` its command line."""

    pid: int
    parent: int
    state: str  # "R", "S", "D", "T", "Z", …
    title: str
    cpu_seconds: float = 0.0
    resident: int = 0
    read: int = 0


def become_subreaper() -> None:
    """Orphaned descendants come to this process, as they do to PID 1: an engine core whose API server was killed."""
    if _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def die_with_parent() -> None:
    """For ``preexec_fn``: the child is killed when the launcher is, even by SIGKILL; vLLM's own children follow it."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _read(pid: int) -> Process | None:
    root = Path("/proc", str(pid))
    try:
        fields = (root / "stat").read_text().rpartition(")")[2].split()
        title = (root / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except (OSError, ValueError):
        return None  # it has gone since its folder was listed
    try:
        read = int((root / "io").read_text().split("rchar: ")[1].split()[0])
    except (OSError, IndexError):
        read = 0  # another user's process
    ticks = os.sysconf("SC_CLK_TCK")
    return Process(
        pid=pid,
        parent=int(fields[1]),
        state=fields[0],
        title=title,
        cpu_seconds=(int(fields[11]) + int(fields[12])) / ticks,
        resident=int(fields[21]) * os.sysconf("SC_PAGE_SIZE"),
        read=read,
    )


def descendants(pid: int) -> list[Process]:
    """Every process below ``pid``, zombies too, in no order. One pass over /proc: some milliseconds."""
    children: dict[int, list[Process]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and (process := _read(int(name))) is not None:
            children.setdefault(process.parent, []).append(process)
    found, todo = [], [pid]
    while todo:
        below = children.pop(todo.pop(), [])
        found += below
        todo += [process.pid for process in below]
    return found


def reap_orphans(keep: int) -> None:
    """Collect what orphans left behind, but not the status of ``keep``, for which somebody waits."""
    while True:
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if ended is None or ended.si_pid == keep:
            return  # `keep` hides what ended after it; its waiter takes it, and the next call goes on
        os.waitpid(ended.si_pid, os.WNOHANG)


def end_all(pid: int, grace: float) -> None:
    """End every descendant of ``pid``: SIGTERM, at most ``grace`` seconds, then SIGKILL until none is left alive."""
    deadline = time.monotonic() + grace
    number = signal.SIGTERM
    asked: set[int] = set()
    while alive := [process for process in descendants(pid) if process.state != "Z"]:
        if time.monotonic() >= deadline:
            number = signal.SIGKILL
            asked.clear()
        if time.monotonic() >= deadline + 10:
            return  # in uninterruptible sleep: the kernel ends it when the driver lets go
        for process in alive:
            if process.pid not in asked:
                asked.add(process.pid)
                try:
                    os.kill(process.pid, number)
                except ProcessLookupError:
                    continue
        time.sleep(0.05)
