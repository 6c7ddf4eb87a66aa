#!/usr/bin/env python3
"""Parts of vLLM that die or stop on real GPUs: how long until all is ended, and whether the GPUs are empty afterwards.

``python benchmarks/gpu/killed.py --tokenizer FOLDER --out FILE`` needs vLLM and idle GPUs; with two it kills workers of
tensor parallelism. Each row is a launcher of its own: SIGKILL of a worker while weights load and while it serves,
SIGSTOP of one while it serves (``stall_seconds`` 20), and of the engine core. Seconds from the signal to the launcher's
end; ``left_bytes`` is what NVML still shows as used beyond the driver's own 2 s later, ``ours`` the
processes of that run that are still on a GPU.
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
"""Name, whom it hits (on one GPU the engine core is its own worker), the signal, whether it serves by then."""

LIMIT_S = 120
STALL_S = 20


def found(root: int, title: str, log: Path, seconds: float) -> int:
    """The pid of the first process below ``root`` whose title begins with ``title``."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for one in process.descendants(root):
            if one.title.startswith(title):
                return one.pid
        time.sleep(0.1)
    raise bench.DeadError(f"no process {title}: {log.read_text(errors='replace')[-800:]}")


def held() -> tuple[int, list[int]]:
    """Bytes in use on all GPUs beyond what the driver keeps, and the processes on them."""
    used, pids = 0, []
    with nvml.open_nvml() as opened:
        for device in opened.snapshot().devices:
            if device.memory is not None:
                used += device.memory.used
            pids += [one.pid for one in device.processes or ()]
    return used, pids


def tried(
    fault: str, command: Sequence[str], log: Path, *, title: str, sign: signal.Signals, serving: bool
) -> dict[str, Any]:
    before, _ = held()
    row: dict[str, Any] = {"fault": fault}
    with log.open("wb") as stream:
        launcher = subprocess.Popen(command, stdout=stream, stderr=stream, env=os.environ | bench.environment())
    victim = None
    try:
        if serving:
            bench.wait_for(launcher, bench.PORT, log, 300)
            bench.ask(bench.PORT, {"prompt": "hi", "max_tokens": 4})
        victim = found(launcher.pid, title, log, 200)
        seen = {one.pid for one in process.descendants(launcher.pid)}
        began = time.monotonic()
        os.kill(victim, sign)
        if sign == signal.SIGSTOP:  # a request is on its way when it stops, and hangs
            with contextlib.suppress(OSError):
                bench.ask(bench.PORT, {"prompt": "hi", "max_tokens": 4}, LIMIT_S)
        row["exit"] = launcher.wait(LIMIT_S)
        row["seconds"] = round(time.monotonic() - began, 1)
        time.sleep(2)
        after, pids = held()
        row["left_bytes"], row["ours"] = max(0, after - before), sorted(seen & {*pids})
        row["alive"] = [pid for pid in seen if process.is_alive(pid)]
    except (bench.DeadError, subprocess.TimeoutExpired) as error:
        row["error"] = str(error)[-800:]
    finally:
        for pid in [victim] if victim and process.is_alive(victim) else []:
            os.kill(pid, signal.SIGKILL)
        launcher.kill()
        launcher.wait()
    said = [line for line in log.read_text(errors="replace").splitlines() if "vllm-launch: " in line]
    row["said"] = said[-1][said[-1].index("vllm-launch: ") :] if said else ""  # without the time and the level
    return row


def main() -> int:
    parser = bench.parser(__doc__)
    parser.add_argument("--fault", action="append", choices=[name for name, *_ in FAULTS], help="may be repeated")
    given = parser.parse_args()
    result = Result(given.out, "faults")
    gpus = len(result.told["provenance"].get("gpus", []))
    flags = [f"--launch-stall-seconds={STALL_S}", "--enforce-eager"]  # deaths are the same uncompiled
    flags += ["--tensor-parallel-size=2"] if gpus > 1 else []
    good = True
    logs = given.out.parent / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        model = bench.model_folder(given.shape, given.tokenizer, Path(name))
        for fault, victim, sign, serving in FAULTS:
            if given.fault and fault not in given.fault:
                continue
            title = "VLLM::Worker" if victim == "worker" and gpus > 1 else "VLLM::EngineCore"
            log = logs / f"{fault.replace(' ', '-')}.log"
            row = tried(fault, bench.planned(model, flags), log, title=title, sign=sign, serving=serving)
            result.add(gpus=gpus, **row)
            good &= "error" not in row and not row["ours"] and not row["alive"] and row["exit"] != 0
    return int(not good)


if __name__ == "__main__":
    bench.run(main)
