#!/usr/bin/env python3
"""Serves a shape of shapes.json with dummy weights by its own plan on the GPUs that are here: planned against real.

``python benchmarks/gpu/serve.py --tokenizer FOLDER SHAPE [any flag of vllm-launch serve]`` needs vLLM, GPUs, a folder
with a tokenizer. Prints what the launcher said, asks for one completion, drains; exit 0 when the KV cache is within 2 %
of the plan and the drain ended with 0. ``--starts 2`` does it again with what the first start left in the caches.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

SHAPES = json.loads((Path(__file__).parent / "shapes.json").read_text())
TOLERANCE = 0.02
PORT = 8000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=list(SHAPES))
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--timeout", type=float, default=400, help="seconds until it must be ready")
    parser.add_argument("--starts", type=int, default=1)
    arguments, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / arguments.shape
        shutil.copytree(arguments.tokenizer, model, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
        (model / "config.json").write_text(json.dumps(SHAPES[arguments.shape]))
        return max(start(model, Path(folder) / "log", arguments, flags) for _ in range(arguments.starts))


def start(model: Path, log: Path, arguments: argparse.Namespace, flags: list[str]) -> int:
    """Serve once; 0 when all was as planned."""
    command = [sys.executable, "-m", "vllm_launch", "serve", str(model), "--load-format=dummy", f"--port={PORT}",
               "--launch-drain-seconds=12", "--served-model-name=shape", *flags]  # fmt: skip
    with log.open("wb") as stream:
        launcher = subprocess.Popen(command, stdout=stream, stderr=stream, env=os.environ)
    try:
        answered = ask(launcher, log, arguments.timeout)
    finally:
        launcher.send_signal(signal.SIGTERM)
        code = launcher.wait(60)
        text = log.read_text(errors="replace")
    said = [line for line in text.splitlines() if not re.match(r"\((APIServer|EngineCore|Worker|DPCoord)", line)]
    print("\n".join(said if answered else text.splitlines()[-60:]))
    pairs = re.findall(r"engine (\d+): KV cache: ([\d,]+) tokens, planned ([\d,]+)", text)
    real = {engine: (int(tokens.replace(",", "")), int(planned.replace(",", ""))) for engine, tokens, planned in pairs}
    print(json.dumps({"shape": arguments.shape, "flags": flags, "kv_tokens": real, "answered": answered, "exit": code}))
    near = all(abs(tokens / planned - 1) <= TOLERANCE for tokens, planned in real.values())
    return int(not (real and near and answered and code == 0))


def ask(launcher: subprocess.Popen[bytes], log: Path, timeout: float) -> bool:
    """Whether a completion of 8 tokens came once the KV cache was compared with the plan."""
    deadline = time.monotonic() + timeout
    while "KV cache: " not in log.read_text(errors="replace").rpartition("vllm-launch: engine")[2]:
        if launcher.poll() is not None or time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    body = json.dumps({"model": "shape", "prompt": "hi", "max_tokens": 8, "ignore_eos": True}).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{PORT}/v1/completions", body, headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return bool(json.load(answer)["usage"]["completion_tokens"] == 8)  # noqa: PLR2004 - as asked for


if __name__ == "__main__":
    sys.exit(main())
