#!/usr/bin/env python3
"""What reading weights ahead saves of a start: the real engine on the CPU, a model of 0.6 GB, a disk of 50 MB/s.

The disk is slowed by the kernel (blkio of cgroup v1, so this needs root and such a machine); before each start the
page cache forgets the weights. Starts with and without it take turns. Prints seconds to ready and the share saved;
exit 1 when nothing is saved.
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
BYTES_A_SECOND = 50 << 20
BLKIO = Path("/sys/fs/cgroup/blkio")
PORT = 8600


def model(folder: Path) -> None:
    """Random weights of a Llama of 0.3 billion parameters, with the tiny model's tokenizer."""
    subprocess.run([sys.executable, "scripts/generators/tiny_model.py", str(folder)], check=True, capture_output=True)
    script = (
        "import sys, torch; from transformers import AutoConfig, AutoModelForCausalLM as M; "
        "c = AutoConfig.from_pretrained(sys.argv[1]); "
        "c.update(dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=24, num_attention_heads=16, "
        "num_key_value_heads=16, head_dim=64)); "
        "M.from_config(c, dtype=torch.bfloat16).save_pretrained(sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", script, str(folder)], check=True, capture_output=True)


def slowed(folder: Path) -> Path:
    """A cgroup whose reads from the disk of ``folder`` are slow."""
    group = BLKIO / f"read-ahead-{os.getpid()}"
    group.mkdir()
    device = os.stat(folder).st_dev  # noqa: PTH116 - the number, not the times
    whole = f"{os.major(device)}:{os.minor(device)}"
    (group / "blkio.throttle.read_bps_device").write_text(f"{whole} {BYTES_A_SECOND}")
    return group


def start(folder: Path, group: Path, flags: list[str]) -> float:
    """Seconds until the launcher calls it ready."""
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
        print("read_ahead: needs root and cgroup v1's blkio to slow a disk", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="read-ahead-") as name:
        folder = Path(name)
        model(folder)
        group = slowed(folder)
        try:
            seconds: dict[str, list[float]] = {"ahead": [], "not": []}
            for _ in range(ROUNDS):
                # vLLM's own default under another name: who names a strategy chooses for himself.
                seconds["not"].append(start(folder, group, ["--safetensors-load-strategy=lazy"]))
                seconds["ahead"].append(start(folder, group, []))
        finally:
            group.rmdir()
    ahead, without = (statistics.median(seconds[which]) for which in ("ahead", "not"))
    size = f"{BYTES_A_SECOND >> 20} MB/s"
    print(f"ready after {ahead:.0f} s with weights read ahead, {without:.0f} s without ({seconds}), from {size}: "
          f"{1 - ahead / without:.0%} saved")  # fmt: skip
    return int(ahead >= without)


if __name__ == "__main__":
    sys.exit(main())
