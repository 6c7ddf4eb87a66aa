"""Run CI's suites in two lanes, and say what each took: ``suites.py``.

A suite's output is printed whole when it ends. The exit code is 1 if any suite failed; the others run on all the same.
At the end: the machine and the least it had free, the minutes of each suite, what failed, and the ten slowest tests.
Logs and the summary stay in var/ci.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LOGS = ROOT / "var" / "ci"
# No registry of base images is reached from here, and only the host's network.
IMAGE = 'CUDA_BASE=debian:bookworm-slim IMAGE_FLAGS="--network host"'
KIT = "../shared/cluster-kit"
CLUSTER = f'eval "$({KIT}/env.sh)" && make'
LANES: tuple[tuple[tuple[str, str], ...], ...] = (
    (
        ("lint", "make lint"),
        ("test-monitoring", "make test-monitoring"),
        ("test-serving", "make test-serving"),
    ),
    (
        ("test-image", f"make test-image {IMAGE}"),
        ("test-compose", "make test-compose"),
        ("test-unit", "make test-unit"),
        ("test-against-vllm", "make test-against-vllm"),
        ("cluster-kit", f"{KIT}/up.sh"),
        ("test-chart", f"{CLUSTER} test-chart"),
        ("test-cluster", f"{CLUSTER} test-cluster"),
    ),
)
"""Each lane's suites, (name, shell command) in their order. One lane computes while the other waits.

The cluster runs the image that its lane builds before. Its control plane takes time from what test_cost.py measures, so
`test-monitoring` comes early in the other lane.
"""
SLOWEST = 10
DURATION = re.compile(r"^ *([\d.]+)s (?:setup|call|teardown) +(\S.*)$", re.MULTILINE)
"""A line of what pytest says with --durations."""


FAILURE = re.compile(r"^(?:FAILED|ERROR) .*", re.MULTILINE)
"""A line of pytest's short summary."""


class Ended(NamedTuple):
    """A suite that is over: its exit code, seconds, what failed, and the slowest of its tests with theirs."""

    name: str
    code: int
    seconds: float
    failures: list[str]
    slowest: list[tuple[float, str]]


class Machine:
    """What this machine is, and the least memory and disk that it had free, looked at every few seconds."""

    def __init__(self) -> None:
        facts = Path("/proc/cpuinfo").read_text()
        name = re.search(r"model name\s*: (.*)", facts)
        amx = "with" if " amx_tile" in facts else "without"
        self.title = f"{os.cpu_count()} cores of {name[1] if name else 'an unnamed CPU'}, {amx} AMX"
        self.least = self._free()
        threading.Thread(target=self._watch, daemon=True).start()

    def __str__(self) -> str:
        memory, disk = self.least
        return f"{self.title}; at least {memory / 2**30:.1f} GiB of memory and {disk / 2**30:.1f} GiB of disk were free"

    def _watch(self) -> None:
        while True:
            time.sleep(5)
            self.least = tuple(map(min, self.least, self._free()))

    @staticmethod
    def _free() -> tuple[int, ...]:
        available = re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())
        return int(available[1]) * 1024 if available else 0, shutil.disk_usage(ROOT).free


def main() -> int:
    """Run all lanes; the exit code."""
    LOGS.mkdir(parents=True, exist_ok=True)
    machine = Machine()
    print(machine, flush=True)
    ended: list[Ended] = []
    running: dict[str, subprocess.Popen[bytes]] = {}
    printing = threading.Lock()

    def lane(suites: Sequence[tuple[str, str]]) -> None:
        for name, command in suites:
            one = run(name, command, running)
            with printing:
                ended.append(one)
                print(f"\n==== {name}: begins here\n{(LOGS / f'{name}.log').read_text(errors='replace')}")
                print(f"==== {name}: {verdict(one)}", flush=True)

    began = time.monotonic()
    lanes = [threading.Thread(target=lane, args=(suites,), daemon=True) for suites in LANES]
    try:
        for thread in lanes:
            thread.start()
        for thread in lanes:
            thread.join()
    finally:
        for process in running.values():  # only if this one is ended before its time
            os.killpg(process.pid, signal.SIGTERM)
    said = summary(machine, ended, time.monotonic() - began)
    (LOGS / "summary.txt").write_text(said)
    print(said, end="")
    return int(any(one.code for one in ended))


def run(name: str, command: str, running: dict[str, subprocess.Popen[bytes]]) -> Ended:
    """Run one suite to its end; it is in ``running`` meanwhile.

    In a session of its own: the kernel gives each session the same share of the cores (sched_autogroup_enabled), so a
    busy engine of one lane leaves the other its half.
    """
    log, began = LOGS / f"{name}.log", time.monotonic()
    environ = os.environ | {"PYTEST_ADDOPTS": f"--durations={SLOWEST} --color=no"}
    with log.open("wb") as out:
        running[name] = subprocess.Popen(
            ["bash", "-c", command], cwd=ROOT, env=environ, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
            start_new_session=True,
        )  # fmt: skip
        code = running[name].wait()
    del running[name]
    text = log.read_text(errors="replace")
    slowest = [(float(seconds), test) for seconds, test in DURATION.findall(text)]
    return Ended(name, code, time.monotonic() - began, FAILURE.findall(text), slowest)


def verdict(one: Ended) -> str:
    """Return how a suite ended, in words."""
    return f"{'failed' if one.code else 'passed'} after {one.seconds / 60:.1f} min"


def summary(machine: Machine, ended: Sequence[Ended], seconds: float) -> str:
    """Return what the machine had, the minutes of each suite, all that failed, and the slowest tests."""
    slowest = sorted((one for suite in ended for one in suite.slowest), reverse=True)[:SLOWEST]
    lines = [
        f"\n==== {seconds / 60:.1f} min in all",
        str(machine),
        *(f"{one.name:<16} {verdict(one)}" for one in ended),
        *(f"{one.name}: {failure}" for one in ended for failure in one.failures),
        "\nslowest tests, with their fixtures apart",
        *(f"{took:7.1f} s  {test}" for took, test in slowest),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
