"""Processes as Linux shows them: who descends from whom, what they are called, what they have done. Touches /proc."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from pathlib import Path

import msgspec

PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>
_libc = ctypes.CDLL(None, use_errno=True)


class Process(msgspec.Struct, frozen=True):
    """One process: ``resident``, ``read`` and ``written`` in bytes; ``title`` is its command line."""

    pid: int
    parent: int
    state: str  # "R", "S", "D", "T", "Z", …
    title: str
    resident: int = 0
    read: int = 0
    written: int = 0


def become_subreaper() -> None:
    """Orphaned descendants come to this process, as they do to PID 1: an engine core whose API server was killed."""
    if _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def last_will(group: int) -> int:
    """Make sure that process group ``group`` does not outlive us, even if we are killed by SIGKILL.

    A shell of its own session waits for the end of a pipe that we alone hold open, then kills the group.
    PR_SET_PDEATHSIG is not enough: SIGKILL would reach the API server and leave its engine core on the GPU, and an API
    server that is still starting may not end on SIGTERM (seen with vLLM 0.32.0). Returns the descriptor to keep;
    closing it is dying.
    """
    theirs, ours = os.pipe()
    try:
        os.posix_spawnp(
            "sh",
            ["sh", "-c", f"read _; kill -9 -{group}"],
            {"PATH": os.environ.get("PATH", os.defpath)},
            file_actions=[(os.POSIX_SPAWN_DUP2, theirs, 0)],
            setsid=True,
        )
    except BaseException:
        os.close(ours)
        raise
    finally:
        os.close(theirs)
    return ours


def look_at(pid: int) -> Process | None:
    """The process ``pid``; None when there is none."""
    root = Path("/proc", str(pid))
    try:
        fields = _stat(pid)
        title = (root / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except (OSError, ValueError):
        return None  # it has gone since its folder was listed
    try:
        io = dict(line.split(": ") for line in (root / "io").read_text().splitlines())
    except (OSError, ValueError):
        io = {}  # another user's process, or one that is just going
    return Process(
        pid=pid,
        parent=int(fields[1]),
        state=fields[0],
        title=title,
        resident=int(fields[21]) * os.sysconf("SC_PAGE_SIZE"),
        read=max(int(io.get("rchar", 0)), int(io.get("read_bytes", 0))),  # mapped files show in the latter alone
        written=int(io.get("wchar", 0)),
    )


def _stat(pid: int) -> list[str]:
    """The fields after the name, which may hold anything; the first is "state" (proc_pid_stat(5))."""
    with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123 - for each process of the machine: the cheap one
        return file.read().rpartition(")")[2].split()


def is_alive(pid: int) -> bool:
    """Whether ``pid`` is there and no zombie."""
    try:
        return _stat(pid)[0] != "Z"
    except (OSError, IndexError):
        return False


def descendants(pid: int) -> list[Process]:
    """Every process below ``pid``, zombies too, in no order. One pass over /proc: some milliseconds."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):  # noqa: PTH208 - names are all we need, twice a second
        if name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                children.setdefault(int(_stat(int(name))[1]), []).append(int(name))
    found: list[int] = []
    todo = [pid]
    while todo:
        below = children.pop(todo.pop(), [])
        found += below
        todo += below
    return [process for one in found if (process := look_at(one)) is not None]


def reap() -> dict[int, int]:
    """Collect every child that has ended, our own and adopted ones: exit codes by pid, -n for signal n.

    Whoever calls this must not wait for children by other means.
    """
    ended: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        ended[pid] = os.waitstatus_to_exitcode(status)


def has_children() -> bool:
    """Whether a child is left to be collected, which it can be once its last thread has ended, after it turned "Z"."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def end_all(pid: int, grace: float) -> list[Process]:
    """End every descendant of ``pid``: SIGTERM, at most ``grace`` seconds, then SIGKILL. Returns what would not end.

    Blocks; zombies among our children are left to ``reap``.
    """
    deadline = time.monotonic() + grace
    number = signal.SIGTERM
    asked: set[int] = set()
    while alive := [process for process in descendants(pid) if process.state != "Z"]:
        if time.monotonic() >= deadline:
            number = signal.SIGKILL
            asked.clear()
        if time.monotonic() >= deadline + 10:
            return alive  # in uninterruptible sleep: the kernel ends it when the driver lets go
        for process in alive:
            if process.pid not in asked:
                asked.add(process.pid)
                try:
                    os.kill(process.pid, number)
                except ProcessLookupError:
                    continue
        time.sleep(0.05)
    return []
