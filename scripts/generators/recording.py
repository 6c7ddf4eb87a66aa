"""Record a start of the pinned vLLM on the CPU, and its /metrics after one request: ``generators/recording.py MODEL``.

Writes tests/data/logs/vllm-VERSION-cpu-start.log and tests/data/metrics/vllm-VERSION-cpu.txt, and removes those of
another version. Tests read them as what vLLM writes.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from vllm_launch.engine.options import pinned_vllm

DATA = Path(__file__).parents[2] / "tests/data"
START_SECONDS = 300
NAME = "llama3"
"""The model's name in the recorded metrics: some tests know it."""


def main(model: Path) -> int:
    """Start, ask, record, stop."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        api, health = free_ports(2)
        command = [
            sys.executable, "-m", "vllm_launch", "serve", str(model), f"--served-model-name={NAME}", "--enforce-eager",
            "--max-model-len=512", "--host=127.0.0.1", f"--port={api}", "--launch-health-host=127.0.0.1",
            f"--launch-health-port={health}", f"--launch-state-dir={folder}/state",
        ]  # fmt: skip
        with log.open("wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        try:
            wait(f"http://127.0.0.1:{health}/readyz", process)
            body = {"model": NAME, "prompt": "Hello", "max_tokens": 8, "ignore_eos": True}
            request(f"http://127.0.0.1:{api}/v1/completions", json.dumps(body).encode())
            metrics = request(f"http://127.0.0.1:{api}/metrics")
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(120)
        lines = log.read_text(errors="replace").splitlines()
    replace("logs/vllm-*-cpu-start.log", f"logs/vllm-{pinned_vllm()}-cpu-start.log", vllms_lines(lines))
    replace("metrics/vllm-*-cpu.txt", f"metrics/vllm-{pinned_vllm()}-cpu.txt", metrics)
    return 0


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def wait(url: str, process: subprocess.Popen[bytes]) -> None:
    """Return once ``url`` answers 200."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            request(url)
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(1)
        else:
            return


def request(url: str, body: bytes | None = None) -> str:
    """Return the body of an answer."""
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=60) as answer:  # noqa: S310
        return answer.read().decode()


def vllms_lines(lines: list[str]) -> str:
    """Return vLLM's own lines up to readiness, without the folders of this machine."""
    ready = next(n for n, line in enumerate(lines) if " vllm-launch: ready" in line)
    plan = next(n for n, line in enumerate(lines) if " vllm-launch: " in line)  # its table ends before
    text = "".join(f"{line}\n" for line in lines[plan:ready] if " vllm-launch: " not in line)
    return re.sub(r"\S*/site-packages/", "", text)


def replace(old: str, new: str, text: str) -> None:
    """Write ``text`` to tests/data/``new``, in place of what matches ``old``."""
    for path in DATA.glob(old):
        path.unlink()
    (DATA / new).write_text(text)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
