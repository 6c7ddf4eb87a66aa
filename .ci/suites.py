"""Run CI's suites in two lanes, and say what each took: ``suites.py``.

A suite's output is printed whole when it ends. The exit code is 1 if any suite failed; the others run on all the same.
At the end: the minutes of each suite, and the ten slowest tests. Logs and the summary stay in var/ci.
"""

from __future__ import annotations

import os
import re
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


class Ended(NamedTuple):
    """A suite that is over: its exit code, seconds, and the slowest of its tests with theirs."""

    name: str
    code: int
    seconds: float
    slowest: list[tuple[float, str]]


def main() -> int:
    """Run all lanes; the exit code."""
    LOGS.mkdir(parents=True, exist_ok=True)
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
    said = summary(ended, time.monotonic() - began)
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
    slowest = [(float(seconds), test) for seconds, test in DURATION.findall(log.read_text(errors="replace"))]
    return Ended(name, code, time.monotonic() - began, slowest)


def verdict(one: Ended) -> str:
    """Return how a suite ended, in words."""
    return f"{'failed' if one.code else 'passed'} after {one.seconds / 60:.1f} min"


def summary(ended: Sequence[Ended], seconds: float) -> str:
    """Return the minutes of each suite and the slowest tests of all."""
    slowest = sorted((one for suite in ended for one in suite.slowest), reverse=True)[:SLOWEST]
    lines = [
        f"\n==== {seconds / 60:.1f} min in all",
        *(f"{one.name:<16} {verdict(one)}" for one in ended),
        "\nslowest tests, with their fixtures apart",
        *(f"{took:7.1f} s  {test}" for took, test in slowest),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
