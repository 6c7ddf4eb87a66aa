#!/usr/bin/env python3
"""Measure how much reading weights ahead shortens a start: the CPU engine, a model of 0.6 GB, a disk of 50 MB/s.

The kernel slows the disk (blkio of cgroup v1, so this needs root and a machine with cgroup v1). Before each start the
weights are dropped from the page cache. Starts with and without reading ahead alternate. Prints the seconds to ready
and the saved share. Exit code 1 if nothing is saved.
"""

from __future__ import annotations

import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROUNDS = 2
"""Starts with reading ahead, and as many without."""
BYTES_PER_SECOND = 50 << 20
"""Speed of the slowed disk."""
BLKIO = Path("/sys/fs/cgroup/blkio")
PORT = 8600


def model(folder: Path) -> None:
    """Write a Llama with 0.3 billion random parameters and the tiny model's tokenizer into ``folder``."""
    subprocess.run([sys.executable, "scripts/generators/tiny_model.py", str(folder)], check=True, capture_output=True)
    script = (
        "import sys, torch; from transformers import AutoConfig, AutoModelForCausalLM as M; "
        "c = AutoConfig.from_pretrained(sys.argv[1]); "
        "c.update(dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=24, num_attention_heads=16, "
        "num_key_value_heads=16, head_dim=64)); "
        "M.from_config(c, dtype=torch.bfloat16).save_pretrained(sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", script, str(folder)], check=True, capture_output=True)


def slow_cgroup(folder: Path) -> Path:
    """Make and return a cgroup whose reads from the disk of ``folder`` are slow."""
    group = BLKIO / f"read-ahead-{os.getpid()}"
    group.mkdir()
    device = os.stat(folder).st_dev  # noqa: PTH116 - only the device number
    numbers = f"{os.major(device)}:{os.minor(device)}"
    (group / "blkio.throttle.read_bps_device").write_text(f"{numbers} {BYTES_PER_SECOND}")
    return group


def start(folder: Path, group: Path, flags: list[str]) -> float:
    """Start the launcher in ``group``, and return the seconds until it reports ready."""
    os.sync()
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    log = folder / "log"
    words = [sys.executable, "-m", "vllm_launch", "serve", str(folder), "--enforce-eager", "--max-model-len=512",
             f"--port={PORT}", f"--launch-health-port={PORT + 1}", "--launch-drain-seconds=0", *flags]  # fmt: skip
    with log.open("wb") as stream:
        launcher = subprocess.Popen(
            ["sh", "-c", 'echo $$ >"$0/cgroup.procs"; exec "$@"', str(group), *words], stdout=stream, stderr=stream,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 300
        while not (ready := re.search(r"ready after (\d+) s", log.read_text(errors="replace"))):
            if launcher.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(log.read_text(errors="replace")[-2000:])
            time.sleep(0.2)
        return float(ready[1])
    finally:
        launcher.send_signal(signal.SIGTERM)
        launcher.wait(60)


def main() -> int:
    if not (BLKIO / "blkio.throttle.read_bps_device").exists() or os.geteuid():
        print("read_ahead: run as root on a machine with cgroup v1: its blkio slows the disk", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="read-ahead-") as name:
        folder = Path(name)
        model(folder)
        group = slow_cgroup(folder)
        try:
            seconds: dict[str, list[float]] = {"ahead": [], "without": []}
            for _ in range(ROUNDS):
                # "lazy" is vLLM's default. If the user sets a strategy, the launcher does not read ahead.
                seconds["without"].append(start(folder, group, ["--safetensors-load-strategy=lazy"]))
                seconds["ahead"].append(start(folder, group, []))
        finally:
            group.rmdir()
    ahead, without = (statistics.median(seconds[which]) for which in ("ahead", "without"))
    speed = f"{BYTES_PER_SECOND >> 20} MB/s"
    print(f"ready after {ahead:.0f} s with weights read ahead, {without:.0f} s without ({seconds}), from {speed}: "
          f"{1 - ahead / without:.0%} saved")  # fmt: skip
    return int(ahead >= without)


if __name__ == "__main__":
    sys.exit(main())
