#!/usr/bin/env python3
"""Measure the time from process start to vLLM's argv: at most 0.25 s, without torch or vLLM."""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "tests/data/models/meta-llama--Meta-Llama-3-70B"
COMMAND = [sys.executable, "-m", "vllm_launch", "plan", str(MODEL), "--hardware", "H100:8", "--format", "json"]
RUNS, LIMIT_S = 15, 0.25
"""Number of timed runs, and the limit for their median in seconds."""


def main() -> int:
    # An installed package has bytecode. The first run writes it if it is missing.
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    traced = subprocess.run(
        [COMMAND[0], "-X", "importtime", *COMMAND[1:]], env=environ, check=True, capture_output=True, text=True
    )
    heavy = re.findall(r"\| +(torch|vllm|transformers|numpy|aiohttp|openai)$", traced.stderr, re.MULTILINE)
    seconds = []
    for _ in range(RUNS):
        began = time.perf_counter()
        subprocess.run(COMMAND, env=environ, check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - began)
    median = statistics.median(seconds)
    print(
        f"start to argv: median {median:.3f} s of {RUNS} ({min(seconds):.3f} to {max(seconds):.3f}); limit {LIMIT_S} s"
    )
    print(f"heavy imports: {', '.join(heavy) or 'none'}")
    return int(median > LIMIT_S or bool(heavy))


if __name__ == "__main__":
    sys.exit(main())
