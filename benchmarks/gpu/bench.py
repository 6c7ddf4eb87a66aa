"""What the commands in this folder share: their arguments, model folders and servers, and what NVML sees of a load."""

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

from vllm_health import gpu_facts, metrics, nvml, scrape
from vllm_launch.engine import multicast

SHAPES: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "shapes.json").read_text())
"""config.json of models, by a short name: what the planner reads, and what dummy weights need."""

PORT = 8000


def run(command: Callable[[], int]) -> NoReturn:
    """``command`` as a program: its exit code, 1 and one line where a server or NVML fails it, servers ended always."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that ``running`` ends its server
    try:
        sys.exit(command())
    except (DeadError, nvml.NvmlUnavailable) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")


def parser(purpose: str | None, *, shape: str | None = "llama3-8b") -> argparse.ArgumentParser:
    """The arguments that commands have; ``shape`` None: the command has models of its own."""
    made = argparse.ArgumentParser(description=purpose, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, required=True, help="JSON file for the result, rewritten after every row")
    if shape:
        made.add_argument("--shape", choices=list(SHAPES), default=shape)
        made.add_argument("--tokenizer", type=Path, required=True, help="folder with a tokenizer; weights are dummies")
    return made


@contextlib.contextmanager
def load_of(gpus: Sequence[int], every_s: float = 0.5) -> Iterator[dict[str, float]]:
    """Filled at the end: ``gpu_busy``, the share of a sampling period in which any kernel ran, and ``watts``.

    Both are medians of NVML's samples (a period is a second at most) of all ``gpus`` (NVML's indices), so that a load's
    first and last seconds do not count. Empty where NVML says neither.
    """
    told, seen, over = dict[str, float](), list[gpu_facts.Load](), threading.Event()

    def look() -> None:
        with contextlib.suppress(nvml.NvmlUnavailable, nvml.GpuLost), nvml.open_nvml() as opened:
            while not over.wait(every_s):
                seen.extend(opened.load(index) for index in gpus)

    looking = threading.Thread(target=look)
    if gpus:
        looking.start()
    try:
        yield told
    finally:
        over.set()
        if gpus:
            looking.join()
        busy = [one.utilization for one in seen if one.utilization is not None]
        watts = [one.power for one in seen if one.power is not None]
        told |= {"gpu_busy": round(statistics.median(busy), 3)} if busy else {}
        told |= {"watts": round(statistics.median(watts))} if watts else {}


def model_folder(shape: str, tokenizer: Path, where: Path) -> Path:
    """A folder with ``shape``'s config.json and a tokenizer, for ``--load-format dummy``."""
    model = where / shape
    shutil.copytree(tokenizer, model, ignore=shutil.ignore_patterns("*.safetensors", "config.json"), dirs_exist_ok=True)
    (model / "config.json").write_text(json.dumps(SHAPES[shape]))
    return model


SERVED = ("--served-model-name=shape", "--load-format=dummy")


def defaults(model: Path, flags: Sequence[str], port: int = PORT) -> list[str]:
    """VLLM's own server as anyone starts it, with no argument that is not in ``flags``."""
    words = [f"--model={model}", *SERVED, f"--port={port}", *flags]
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words]


def forked(model: Path, flags: Sequence[str], port: int = PORT) -> list[str]:
    """VLLM's own command, whose processes fork as the launcher's do, and with no argument that is not in ``flags``."""
    words = [str(model), *SERVED, f"--port={port}", *flags]
    fork = "VLLM_WORKER_MULTIPROC_METHOD=fork"
    return ["env", fork, sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", *words]


def planned(model: Path, flags: Sequence[str], port: int = PORT) -> list[str]:
    """The launcher's."""
    ours = [f"--launch-health-port={port + 1}", "--launch-drain-seconds=6", "--launch-start-stall-seconds=300"]
    words = [str(model), *SERVED, f"--port={port}", *ours, *flags]
    return [sys.executable, "-m", "vllm_launch", "serve", *words]


def environment() -> dict[str, str]:
    """For every server: nothing from a hub, and NVLink multicast off as the launcher has it, vLLM's own server too."""
    return {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", **multicast.SWITCHES}


class DeadError(Exception):
    """A server that ended or did not come up, in one line: its log, what happened, and the log's last word."""


@contextlib.contextmanager
def served(
    command: Sequence[str], log: Path, *, port: int = PORT, seconds: float = 420, env: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """``running``, and answering.

    Raises:
        DeadError: it ended, or did not answer within ``seconds``.
    """
    with running(command, log, port=port, env=env) as process:
        wait_for(process, port, log, seconds)
        yield process


@contextlib.contextmanager
def running(
    command: Sequence[str], log: Path, *, port: int, env: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """``command``, which will answer on ``port``; at the end it is asked to go, and everything of it is gone."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as stream:
        if healthy(port):
            raise DeadError(f"port {port} is served already, by something else: end that")
        process = subprocess.Popen(
            command, stdout=stream, stderr=stream, env=os.environ | (env or {}), start_new_session=True
        )
    try:
        yield process
    finally:
        ended(process)


def wait_for(process: subprocess.Popen[bytes], port: int, log: Path, seconds: float) -> None:
    """Until ``process`` answers on ``port``.

    Raises:
        DeadError: it ended first, or ``seconds`` are over.
    """
    deadline = time.monotonic() + seconds
    while not healthy(port):
        code = process.poll()
        if code is not None or time.monotonic() > deadline:
            what = f"no answer on port {port} in {seconds:.0f} s" if code is None else f"it ended with {code}"
            raise DeadError(f"{log}: {what}: {last_word(log)}")
        time.sleep(0.1)


def last_word(log: Path) -> str:
    """The last line that names an error, or else the last."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "it says nothing")


def healthy(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
    except OSError:
        return False
    return True


def ended(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, then SIGKILL to its whole session: vLLM's own server leaves workers behind when it is killed."""
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(30)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(1)  # for the driver to give the memory back


def page_faults(session: int) -> int:
    """Pages that the kernel has had to map since each process of ``session`` began (minflt in /proc/PID/stat).

    A process that ends takes its own along.
    """
    found = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            fields = stat.read_text().rpartition(")")[2].split()  # from the third field on: proc(5)
            found += int(fields[7]) if int(fields[3]) == session else 0
    return found


def ask(port: int, body: dict[str, Any], seconds: float = 60) -> dict[str, Any]:
    """A completion of the served shape."""
    data = json.dumps({"model": "shape", **body}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", data, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=seconds) as answer:
        return dict(json.load(answer))


def exposition(port: int) -> str:
    """The server's /metrics."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        return str(answer.read().decode())


def preemptions(port: int) -> int:
    """How often a request was put out of the batch for want of cache since the start; its tokens are computed again.

    Raises:
        DeadError: the server does not say.
    """
    found = re.findall(rf"^{metrics.PREEMPTIONS}{{.*}} (\S+)$", exposition(port), re.MULTILINE)
    if not found:
        raise DeadError(f"/metrics has no {metrics.PREEMPTIONS}")
    return round(sum(map(float, found)))


def cache_info(port: int) -> list[int]:
    """KV tokens of each engine (kv_cache_size_tokens in vllm:cache_config_info)."""
    return list(scrape.read(exposition(port)).kv_cache_tokens.values())


def utilization(port: int) -> float:
    """``gpu_memory_utilization`` of its engines, as vllm:cache_config_info has it.

    Raises:
        DeadError: the server does not say.
    """
    found = re.search(
        rf'^{metrics.CACHE_CONFIG_INFO}{{.*gpu_memory_utilization="([\d.]+)"', exposition(port), re.MULTILINE
    )
    if not found:
        raise DeadError(f"/metrics has no gpu_memory_utilization in {metrics.CACHE_CONFIG_INFO}")
    return float(found[1])
