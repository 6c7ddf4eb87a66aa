#!/usr/bin/env python3
"""Kill or stop a process of vLLM on real GPUs, and measure how long the launcher takes to end and free the GPUs.

``python benchmarks/gpu/killed.py --tokenizer FOLDER --out FILE`` needs vLLM and idle GPUs. With two GPUs it kills
workers of tensor parallelism. Each row starts a launcher of its own: SIGKILL of a worker while weights load and while
it serves, SIGSTOP of a worker and of the engine core while they serve (``stall_seconds`` 20). ``seconds`` counts from
the signal to the launcher's end. ``left_bytes`` are the bytes in use 2 s later that were not in use before the run
(NVML). ``ours`` are the processes of that run that still use a GPU.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bench
from result import Result

from vllm_health import nvml
from vllm_launch.serve import process

FAULTS = (
    ("worker killed at start", "worker", signal.SIGKILL, False),
    ("worker killed while serving", "worker", signal.SIGKILL, True),
    ("worker stopped while serving", "worker", signal.SIGSTOP, True),
    ("engine core stopped while serving", "engine core", signal.SIGSTOP, True),
)
"""Name, target process (on one GPU the engine core is its own worker), signal, whether the server serves by then."""

LIMIT_S = 120
"""Seconds that the launcher may take to end after the signal."""
STALL_S = 20
"""``stall_seconds`` of the launcher."""


def find_process(root: int, title: str, log: Path, seconds: float) -> int:
    """Return the pid of the first process below ``root`` whose title begins with ``title``.

    Raises:
        ServerFailedError: there is none within ``seconds``.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for child in process.descendants(root):
            if child.title.startswith(title):
                return child.pid
        time.sleep(0.1)
    raise bench.ServerFailedError(f"no process {title}: {log.read_text(errors='replace')[-800:]}")


def gpu_usage() -> tuple[int, list[int]]:
    """Return the bytes in use on all GPUs, without the memory that the driver reserves, and the pids that use them."""
    used, pids = 0, []
    with nvml.open_nvml() as opened:
        for device in opened.snapshot().devices:
            if device.memory is not None:
                used += device.memory.used
            pids += [user.pid for user in device.processes or ()]
    return used, pids


def measure_fault(
    fault: str, command: Sequence[str], log: Path, *, title: str, signal_number: signal.Signals, serving: bool
) -> dict[str, Any]:
    """Start ``command``, send the signal to the process with ``title``, and return the row of ``fault``."""
    before, _ = gpu_usage()
    row: dict[str, Any] = {"fault": fault}
    with log.open("wb") as stream:
        launcher = subprocess.Popen(command, stdout=stream, stderr=stream, env=os.environ | bench.environment())
    victim = None
    try:
        if serving:
            bench.wait_for(launcher, bench.PORT, log, 300)
            bench.ask(bench.PORT, {"prompt": "hi", "max_tokens": 4})
        victim = find_process(launcher.pid, title, log, 200)
        children = {child.pid for child in process.descendants(launcher.pid)}
        began = time.monotonic()
        os.kill(victim, signal_number)
        if signal_number == signal.SIGSTOP:  # send a request, which hangs
            with contextlib.suppress(OSError):
                bench.ask(bench.PORT, {"prompt": "hi", "max_tokens": 4}, LIMIT_S)
        row["exit"] = launcher.wait(LIMIT_S)
        row["seconds"] = round(time.monotonic() - began, 1)
        time.sleep(2)
        after, pids = gpu_usage()
        row["left_bytes"], row["ours"] = max(0, after - before), sorted(children & {*pids})
        row["alive"] = [pid for pid in children if process.is_alive(pid)]
    except (bench.ServerFailedError, subprocess.TimeoutExpired) as error:
        row["error"] = str(error)[-800:]
    finally:
        for pid in [victim] if victim and process.is_alive(victim) else []:
            os.kill(pid, signal.SIGKILL)
        launcher.kill()
        launcher.wait()
    messages = [line for line in log.read_text(errors="replace").splitlines() if "vllm-launch: " in line]
    row["said"] = messages[-1][messages[-1].index("vllm-launch: ") :] if messages else ""  # without time and level
    return row


def main() -> int:
    parser = bench.parser(__doc__)
    parser.add_argument("--fault", action="append", choices=[name for name, *_ in FAULTS], help="may be repeated")
    options = parser.parse_args()
    result = Result(options.out, "faults")
    gpus = len(result.content["provenance"].get("gpus", []))
    flags = [f"--launch-stall-seconds={STALL_S}", "--enforce-eager"]  # compiling does not change how a process dies
    flags += ["--tensor-parallel-size=2"] if gpus > 1 else []
    good = True
    logs = options.out.parent / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        model = bench.model_folder(options.shape, options.tokenizer, Path(name))
        for fault, target, signal_number, serving in FAULTS:
            if options.fault and fault not in options.fault:
                continue
            title = "VLLM::Worker" if target == "worker" and gpus > 1 else "VLLM::EngineCore"
            log = logs / f"{fault.replace(' ', '-')}.log"
            command = bench.launcher_command(model, flags)
            row = measure_fault(fault, command, log, title=title, signal_number=signal_number, serving=serving)
            result.add(gpus=gpus, **row)
            good &= "error" not in row and not row["ours"] and not row["alive"] and row["exit"] != 0
    return int(not good)


if __name__ == "__main__":
    bench.run(main)
