"""Code that the commands of this folder share: arguments, model folders, servers, and NVML samples during a load."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from processor import add_processor

from vllm_health import gpu_facts, metrics, nvml, scrape
from vllm_launch.engine import multicast

SHAPES: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "shapes.json").read_text())
"""Short name of a model: its config.json, which the planner reads and which dummy weights need."""

PORT = int(os.environ.get("BENCH_PORT", "8000"))
"""The servers' port. The launcher's health port is the next one. Two commands on one machine need two ports."""


def run(command: Callable[[], int]) -> NoReturn:
    """Run ``command`` as a program and exit with its code, or with 1 and one line if a server or NVML fails.

    Its servers end in any case.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that ``start_process`` stops its server
    try:
        sys.exit(command())
    except (ServerFailedError, nvml.NvmlUnavailable) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")


def parser(purpose: str | None, *, shape: str | None = "llama3-8b") -> argparse.ArgumentParser:
    """Return a parser with the arguments that all commands share. ``shape`` None: the command chooses its models."""
    common = argparse.ArgumentParser(description=purpose, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_argument("--out", type=Path, required=True, help="JSON file for the result, rewritten after every row")
    if shape:
        common.add_argument("--shape", choices=list(SHAPES), default=shape)
        common.add_argument(
            "--tokenizer", type=Path, required=True, help="folder with a tokenizer; weights are dummies"
        )
    return common


@contextlib.contextmanager
def sample_gpu_load(gpus: Sequence[int], every_s: float = 0.5) -> Iterator[dict[str, float]]:
    """Yield a dict that is filled when the context ends: ``gpu_busy`` and ``watts`` of ``gpus`` (NVML's indices).

    ``gpu_busy`` is the share of a sampling period (a second at most) in which any kernel ran. Both values are medians
    of NVML's samples of all ``gpus``, so the first and last seconds of a load do not count. A value that NVML does not
    report is missing.
    """
    medians, samples, over = dict[str, float](), list[gpu_facts.Load](), threading.Event()

    def sample() -> None:
        with contextlib.suppress(nvml.NvmlUnavailable, nvml.GpuLost), nvml.open_nvml() as opened:
            while not over.wait(every_s):
                samples.extend(opened.load(index) for index in gpus)

    sampler = threading.Thread(target=sample)
    if gpus:
        sampler.start()
    try:
        yield medians
    finally:
        over.set()
        if gpus:
            sampler.join()
        busy = [load.utilization for load in samples if load.utilization is not None]
        watts = [load.power for load in samples if load.power is not None]
        medians |= {"gpu_busy": round(statistics.median(busy), 3)} if busy else {}
        medians |= {"watts": round(statistics.median(watts))} if watts else {}


def model_folder(shape: str, tokenizer: Path, parent: Path) -> Path:
    """Make and return a folder with ``shape``'s config.json, tokenizer and processor, for ``--load-format dummy``."""
    model = parent / shape
    shutil.copytree(tokenizer, model, ignore=shutil.ignore_patterns("*.safetensors", "config.json"), dirs_exist_ok=True)
    config = SHAPES[shape]
    if "vision_config" in config:
        config = add_processor(model, config)
    (model / "config.json").write_text(json.dumps(config))
    return model


MODEL_FLAGS = ("--served-model-name=shape", "--load-format=dummy")


def vllm_command(model: Path, flags: Sequence[str], port: int = PORT) -> list[str]:
    """Return the command line of vLLM's own server with its defaults, except for ``flags``."""
    words = [f"--model={model}", *MODEL_FLAGS, f"--port={port}", *flags]
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words]


def forked_command(model: Path, flags: Sequence[str], port: int = PORT) -> list[str]:
    """Return vLLM's command line with its defaults except for ``flags``. Its processes fork, as the launcher's do."""
    words = [str(model), *MODEL_FLAGS, f"--port={port}", *flags]
    fork = "VLLM_WORKER_MULTIPROC_METHOD=fork"
    return ["env", fork, sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", *words]


def launcher_command(model: Path, flags: Sequence[str], port: int = PORT) -> list[str]:
    """Return the launcher's command line."""
    ours = [f"--launch-health-port={port + 1}", "--launch-drain-seconds=6", "--launch-start-stall-seconds=300"]
    words = [str(model), *MODEL_FLAGS, f"--port={port}", *ours, *flags]
    return [sys.executable, "-m", "vllm_launch", "serve", *words]


def environment() -> dict[str, str]:
    """Return variables for all servers, vLLM's own too: no hub access, NVLink multicast off as in the launcher."""
    return {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", **multicast.SWITCHES}


class ServerFailedError(Exception):
    """A server ended or did not start. One line: its log file, what happened, and the log's last error."""


@contextlib.contextmanager
def start_server(
    command: Sequence[str], log: Path, *, port: int = PORT, seconds: float = 420, env: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Start ``command``, yield its process when it answers, and stop it at the end (see ``start_process``).

    Raises:
        ServerFailedError: the process ended, or did not answer within ``seconds``.
    """
    with start_process(command, log, port=port, env=env) as process:
        wait_for(process, port, log, seconds)
        yield process


@contextlib.contextmanager
def start_process(
    command: Sequence[str], log: Path, *, port: int, env: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Start ``command``, which will answer on ``port``, and yield its process. At the end stop all of its processes."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as stream:
        if healthy(port):
            raise ServerFailedError(f"another program already answers on port {port}: stop it")
        process = subprocess.Popen(
            command, stdout=stream, stderr=stream, env=os.environ | (env or {}), start_new_session=True
        )
    try:
        yield process
    finally:
        stop(process)


def wait_for(process: subprocess.Popen[bytes], port: int, log: Path, seconds: float) -> None:
    """Wait until ``process`` answers on ``port``.

    Raises:
        ServerFailedError: the process ended first, or did not answer within ``seconds``.
    """
    deadline = time.monotonic() + seconds
    while not healthy(port):
        code = process.poll()
        if code is not None or time.monotonic() > deadline:
            event = f"no answer on port {port} in {seconds:.0f} s" if code is None else f"exit code {code}"
            raise ServerFailedError(f"{log}: {event}: {last_error(log)}")
        time.sleep(0.1)


def last_error(log: Path) -> str:
    """Return the last line of ``log`` that contains "Error", or else its last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "the log is empty")


def healthy(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
    except OSError:
        return False
    return True


def stop(process: subprocess.Popen[bytes]) -> None:
    """Send SIGTERM, then SIGKILL to the whole session: vLLM's own server leaves workers behind when it is killed."""
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(30)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(1)  # the driver needs a moment to free the memory


def page_faults(session: int) -> int:
    """Return the minor page faults of all live processes of ``session`` (minflt in /proc/PID/stat).

    The faults of a process that has ended are not included.
    """
    faults = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # the process has ended meanwhile
            fields = stat.read_text().rpartition(")")[2].split()  # from the third field on: proc(5)
            faults += int(fields[7]) if int(fields[3]) == session else 0
    return faults


def ask(port: int, body: dict[str, Any], seconds: float = 60) -> dict[str, Any]:
    """Return the server's response to a completion request with ``body``."""
    data = json.dumps({"model": "shape", **body}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", data, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=seconds) as answer:
        return dict(json.load(answer))


def exposition(port: int) -> str:
    """Return the text of the server's /metrics."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        return str(answer.read().decode())


def preemptions(port: int) -> int:
    """Return the number of preemptions since the server's start.

    Raises:
        ServerFailedError: /metrics does not contain it.
    """
    counts = re.findall(rf"^{metrics.PREEMPTIONS}{{.*}} (\S+)$", exposition(port), re.MULTILINE)
    if not counts:
        raise ServerFailedError(f"/metrics has no {metrics.PREEMPTIONS}")
    return round(sum(map(float, counts)))


def kv_cache_tokens(port: int) -> list[int]:
    """Return the KV cache tokens of each engine (kv_cache_size_tokens in vllm:cache_config_info)."""
    return list(scrape.read(exposition(port)).kv_cache_tokens.values())


def utilization(port: int) -> float:
    """Return ``gpu_memory_utilization`` of the server's engines (vllm:cache_config_info).

    Raises:
        ServerFailedError: /metrics does not contain it.
    """
    match = re.search(
        rf'^{metrics.CACHE_CONFIG_INFO}{{.*gpu_memory_utilization="([\d.]+)"', exposition(port), re.MULTILINE
    )
    if not match:
        raise ServerFailedError(f"/metrics has no gpu_memory_utilization in {metrics.CACHE_CONFIG_INFO}")
    return float(match[1])
