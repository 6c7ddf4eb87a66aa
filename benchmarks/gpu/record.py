#!/usr/bin/env python3
"""Record /metrics of two replicas on two GPUs: start, mixed load, a drain and restart of one under load, idle time.

``python benchmarks/gpu/record.py --tokenizer FOLDER OUT.gz SHAPE`` needs vLLM and two GPUs. The tests and pictures of
monitoring/ use the file for GPUs (tests/data/metrics).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import bench

ROOT = Path(__file__).parents[2]


def replica(model: Path, gpu: int, log: Path) -> subprocess.Popen[bytes]:
    """Start a replica on GPU ``gpu``. Its API port is 8000 + 10 * ``gpu``, and its health port the next one."""
    with log.open("ab") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", "vllm_launch", "serve", str(model), "--load-format=dummy",
             "--served-model-name=llama", "--max-model-len=4096", "--max-num-seqs=64", f"--port={8000 + 10 * gpu}",
             f"--launch-health-port={8001 + 10 * gpu}", "--launch-drain-seconds=60"],
            stdout=stream, stderr=stream, env=os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu)},
        )  # fmt: skip


def wait_until_ready(gpu: int, seconds: float) -> None:
    """Wait until the replica on ``gpu`` is ready.

    Raises:
        OSError: it is not ready within ``seconds``.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{8001 + 10 * gpu}/readyz", timeout=5).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(1)
        else:
            return


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("shape", choices=list(bench.SHAPES))
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--load-seconds", type=int, default=240)
    options = parser.parse_args()
    tests = ROOT / "tests/monitoring"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = bench.model_folder(options.shape, options.tokenizer, folder)
        pods = [f"llama-{gpu}=http://127.0.0.1:{8000 + 10 * gpu},http://127.0.0.1:{8001 + 10 * gpu}" for gpu in (0, 1)]
        recorder = subprocess.Popen(
            [sys.executable, str(tests / "recording.py"), str(options.out), str(options.load_seconds + 340), "5", *pods]
        )
        replicas = [replica(model, gpu, folder / f"log-{gpu}") for gpu in (0, 1)]
        try:
            for gpu in (0, 1):
                wait_until_ready(gpu, 300)
            print("ready", flush=True)
            loads = [
                subprocess.Popen([sys.executable, str(tests / "mixed_load.py"), f"http://127.0.0.1:{8000 + 10 * gpu}",
                                  "llama", str(seconds), str(clients), "4096"])
                for gpu, seconds, clients in ((0, options.load_seconds, 96), (1, options.load_seconds // 2, 40))
            ]  # fmt: skip
            time.sleep(options.load_seconds / 2 - 5)
            replicas[1].send_signal(signal.SIGTERM)  # its streams end before it exits
            print("drained, exit code", replicas[1].wait(90), flush=True)
            replicas[1] = replica(model, 1, folder / "log-1")
            for load in loads:
                load.wait(options.load_seconds + 120)
            wait_until_ready(1, 200)
            time.sleep(75)  # an idle prober sends its canary
        finally:
            recorder.terminate()
            for process in replicas:
                process.send_signal(signal.SIGTERM)
            for process in replicas:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(120)
                process.kill()
            recorder.wait(30)
            print((folder / "log-0").read_text(errors="replace")[-1500:])
    return 0


if __name__ == "__main__":
    bench.run(main)
