"""Reads, ends and reaps Linux processes: their parents, titles, memory and I/O. Touches /proc."""

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
    """One process. ``title`` is its command line. ``resident``, ``read`` and ``written`` are in bytes."""

    pid: int
    parent: int
    state: str  # "R", "S", "D", "T", "Z", …
    title: str
    resident: int = 0
    read: int = 0
    written: int = 0


def become_subreaper() -> None:
    """Make this process the parent of its orphaned descendants, such as an engine core whose API server was killed.

    Raises:
        OSError: the kernel refuses.
    """
    if _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def kill_group_on_exit(group: int) -> int:
    """Kill process group ``group`` as soon as this process ends, even if SIGKILL ended it.

    Return a file descriptor. Keep it open.

    A shell in its own session waits until the descriptor is closed, then kills the group. Only this process holds the
    descriptor, so its end closes it. PR_SET_PDEATHSIG is not enough, because it signals only the API server. SIGKILL
    would leave its engine core on the GPU, and an API server that is still starting may ignore SIGTERM (vLLM 0.32.0).
    """
    read_end, write_end = os.pipe()
    try:
        os.posix_spawnp(
            "sh",
            ["sh", "-c", f"read _; kill -9 -{group}"],
            {"PATH": os.environ.get("PATH", os.defpath)},
            file_actions=[(os.POSIX_SPAWN_DUP2, read_end, 0)],
            setsid=True,
        )
    except BaseException:
        os.close(write_end)
        raise
    finally:
        os.close(read_end)
    return write_end


def read_process(pid: int) -> Process | None:
    """Return the process ``pid``, or None if it does not exist."""
    root = Path("/proc", str(pid))
    try:
        fields = _stat(pid)
        title = (root / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except (OSError, ValueError):
        return None  # the process has ended
    try:
        io = dict(line.split(": ") for line in (root / "io").read_text().splitlines())
    except (OSError, ValueError):
        io = {}  # another user's process, or one that is ending
    return Process(
        pid=pid,
        parent=int(fields[1]),
        state=fields[0],
        title=title,
        resident=int(fields[21]) * os.sysconf("SC_PAGE_SIZE"),
        read=max(int(io.get("rchar", 0)), int(io.get("read_bytes", 0))),  # mapped files count only in read_bytes
        written=int(io.get("wchar", 0)),
    )


def _stat(pid: int) -> list[str]:
    """Return the fields after the process name, which may contain spaces. The first is "state" (proc_pid_stat(5))."""
    with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123 - faster than Path, and runs for each process of the machine
        return file.read().rpartition(")")[2].split()


def is_alive(pid: int) -> bool:
    """Whether process ``pid`` exists and is not a zombie."""
    try:
        return _stat(pid)[0] != "Z"
    except (OSError, IndexError):
        return False


def exit_status(pid: int) -> int | None:
    """Return the exit status of a process that has ended and is not yet reaped, -n for signal n. Else return None.

    The kernel shows 0 for a process of another user. So 0 means nothing, and is None too.
    """
    try:
        fields = _stat(pid)
        status = os.waitstatus_to_exitcode(int(fields[49])) if fields[0] == "Z" else 0
    except (OSError, ValueError, IndexError):
        return None
    return status or None


def descendants(pid: int) -> list[Process]:
    """Return all descendants of ``pid``, zombies too, in no order. One pass over /proc takes some milliseconds."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):  # noqa: PTH208 - needs only names, twice a second
        if name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                children.setdefault(int(_stat(int(name))[1]), []).append(int(name))
    pids: list[int] = []
    parents = [pid]
    while parents:
        next_pids = children.pop(parents.pop(), [])
        pids += next_pids
        parents += next_pids
    return [process for child in pids if (process := read_process(child)) is not None]


def reap() -> dict[int, int]:
    """Reap every child that has ended, adopted ones too. Return exit codes by pid, -n for signal n.

    A program that calls this must not wait for its children in other ways.
    """
    exit_codes: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return exit_codes
        if pid == 0:
            return exit_codes
        exit_codes[pid] = os.waitstatus_to_exitcode(status)


def has_children() -> bool:
    """Whether any child is not yet reaped. A zombie child can be reaped only after its last thread has ended."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def end_all(pid: int, grace: float) -> list[Process]:
    """End every descendant of ``pid``: send SIGTERM, wait at most ``grace`` seconds, send SIGKILL.

    Return the processes that did not end within 10 s of SIGKILL. Blocks. Does not reap zombies; ``reap`` does.
    """
    deadline = time.monotonic() + grace
    number = signal.SIGTERM
    signalled: set[int] = set()
    while alive := [process for process in descendants(pid) if process.state != "Z"]:
        if time.monotonic() >= deadline:
            number = signal.SIGKILL
            signalled.clear()
        if time.monotonic() >= deadline + 10:
            return alive  # in uninterruptible sleep: the kernel ends them when the driver returns
        for process in alive:
            if process.pid not in signalled:
                signalled.add(process.pid)
                try:
                    os.kill(process.pid, number)
                except ProcessLookupError:
                    continue
        time.sleep(0.05)
    return []
