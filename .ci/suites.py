"""Run CI's suites in parallel lanes and print how long each took: ``suites.py``.

The output of a suite is printed when the suite ends. If a suite fails, the others still run, and the exit code is 1.
The summary at the end has the machine and its lowest free memory and disk space, the minutes of each suite, the
failures, and the ten slowest tests. Logs and the summary stay in var/ci.
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
KIT = "../shared/cluster-kit"
HAS_KIT = (ROOT / KIT).is_dir()
"""Whether the folder with a cluster is beside the clone. A machine with it reaches no registry of base images, and its
containers have only the host's network. Elsewhere the registries are reached, and KUBECONFIG must name a cluster."""
IMAGE = 'CUDA_BASE=debian:bookworm-slim IMAGE_FLAGS="--network host"' if HAS_KIT else ""
CLUSTER = f'eval "$({KIT}/env.sh)" && make' if HAS_KIT else "make"
Suites = tuple[tuple[str, str], ...]
PHASES: tuple[tuple[Suites, ...], ...] = (
    (
        (
            ("lint", "make lint"),
            ("test-serving", "make test-serving"),
        ),
        (
            ("test-image", f"make test-image {IMAGE}"),
            ("test-compose", "make test-compose"),
            ("test-unit", "make test-unit"),
            ("test-against-vllm", "make test-against-vllm"),
            *([("cluster-kit", f"{KIT}/up.sh")] if HAS_KIT else []),
            ("test-chart", f"{CLUSTER} test-chart"),
        ),
    ),
    (
        (("test-monitoring", "make test-monitoring"),),
        (("test-cluster", f"{CLUSTER} test-cluster"),),
    ),
)
"""Phases in their order, each with lanes that run in parallel. A lane's suites, as (name, shell command), run in order.

The second phase begins when all lanes of the first have ended. The cluster's rollouts keep both cores busy: beside them
the engine's tests took four times as long and failed. `test-monitoring` has few engines, so it can run beside them.
As a third lane of the first phase it lost requests of its load. The cluster needs the image that `test-image` builds.
"""
UNBOUND = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
"""By default vLLM binds its workers to the first core, those of all lanes to the same one. With these variables two
engines that start at the same time are ready after 66 instead of 86 s (2 cores, 2026-11-30)."""

SLOWEST = 10
DURATION = re.compile(r"^ *([\d.]+)s (?:setup|call|teardown) +(\S.*)$", re.MULTILINE)
"""A line of pytest's --durations report."""


FAILURE = re.compile(r"^(?:FAILED|ERROR) .*", re.MULTILINE)
"""A failure in pytest's short summary."""


class SuiteResult(NamedTuple):
    """Result of one suite: exit code, seconds, failures, and its slowest tests as (seconds, test)."""

    name: str
    code: int
    seconds: float
    failures: list[str]
    slowest: list[tuple[float, str]]


class Machine:
    """This machine, with the lowest free memory and disk space (bytes) of all samples. It samples every 5 s."""

    def __init__(self) -> None:
        facts = Path("/proc/cpuinfo").read_text()
        name = re.search(r"model name\s*: (.*)", facts)
        amx = "with" if " amx_tile" in facts else "without"
        self.title = f"{os.cpu_count()} cores of {name[1] if name else 'an unnamed CPU'}, {amx} AMX"
        self.lowest = self._free()
        threading.Thread(target=self._watch, daemon=True).start()

    def __str__(self) -> str:
        memory, disk = self.lowest
        return f"{self.title}; at least {memory / 2**30:.1f} GiB of memory and {disk / 2**30:.1f} GiB of disk were free"

    def _watch(self) -> None:
        while True:
            time.sleep(5)
            self.lowest = tuple(map(min, self.lowest, self._free()))

    @staticmethod
    def _free() -> tuple[int, ...]:
        available = re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())
        return int(available[1]) * 1024 if available else 0, shutil.disk_usage(ROOT).free


def main() -> int:
    """Run all lanes and return the exit code."""
    LOGS.mkdir(parents=True, exist_ok=True)
    machine = Machine()
    print(machine, flush=True)
    results: list[SuiteResult] = []
    running: dict[str, subprocess.Popen[bytes]] = {}
    printing = threading.Lock()

    def run_lane(suites: Suites) -> None:
        for name, command in suites:
            result = run(name, command, running)
            with printing:
                results.append(result)
                print(f"\n==== {name}: output\n{(LOGS / f'{name}.log').read_text(errors='replace')}")
                print(f"==== {name}: {verdict(result)}", flush=True)

    began = time.monotonic()
    try:
        for phase in PHASES:
            lanes = [threading.Thread(target=run_lane, args=(suites,), daemon=True) for suites in phase]
            for thread in lanes:
                thread.start()
            for thread in lanes:
                thread.join()
    finally:
        for process in running.values():  # some still run only if this process is stopped early
            os.killpg(process.pid, signal.SIGTERM)
    report = summary(machine, results, time.monotonic() - began)
    (LOGS / "summary.txt").write_text(report)
    print(report, end="")
    return int(any(result.code for result in results))


def run(name: str, command: str, running: dict[str, subprocess.Popen[bytes]]) -> SuiteResult:
    """Run one suite and return its result. While it runs, its process is in ``running``.

    Each suite has its own session, because the kernel gives every session the same share of the cores
    (sched_autogroup_enabled). A busy engine in one lane therefore leaves half of the cores to the other lane.
    """
    log, began = LOGS / f"{name}.log", time.monotonic()
    environ = os.environ | UNBOUND | {"PYTEST_ADDOPTS": f"--durations={SLOWEST} --color=no"}
    with log.open("wb") as out:
        running[name] = subprocess.Popen(
            ["bash", "-c", command], cwd=ROOT, env=environ, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
            start_new_session=True,
        )  # fmt: skip
        code = running[name].wait()
    del running[name]
    text = log.read_text(errors="replace")
    slowest = [(float(seconds), test) for seconds, test in DURATION.findall(text)]
    return SuiteResult(name, code, time.monotonic() - began, FAILURE.findall(text), slowest)


def verdict(result: SuiteResult) -> str:
    """Return as text whether a suite passed, and after how many minutes."""
    return f"{'failed' if result.code else 'passed'} after {result.seconds / 60:.1f} min"


def summary(machine: Machine, results: Sequence[SuiteResult], seconds: float) -> str:
    """Return the machine's lowest free resources, the minutes of each suite, all failures, and the slowest tests."""
    slowest = sorted((test for result in results for test in result.slowest), reverse=True)[:SLOWEST]
    lines = [
        f"\n==== {seconds / 60:.1f} min in total",
        str(machine),
        *(f"{result.name:<16} {verdict(result)}" for result in results),
        *(f"{result.name}: {failure}" for result in results for failure in result.failures),
        "\nslowest tests (fixtures are listed separately)",
        *(f"{duration:7.1f} s  {test}" for duration, test in slowest),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
