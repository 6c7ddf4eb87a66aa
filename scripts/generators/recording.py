"""Record a start of the pinned vLLM on the CPU, and its /metrics after one request: ``generators/recording.py MODEL``.

Writes tests/data/logs/vllm-VERSION-cpu-start.log and tests/data/metrics/vllm-VERSION-cpu.txt, and removes those of
another version. Tests read them as what vLLM writes.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

from vllm_launch.engine.options import pinned_vllm

TESTS = Path(__file__).parents[2] / "tests"
sys.path.append(str(TESTS / "common"))
from serving import begun  # noqa: E402 - found only by the path above

NAME = "llama3"
"""The model's name in the recorded metrics."""


def main(model: Path) -> None:
    """Start, ask once, record, stop."""
    with tempfile.TemporaryDirectory() as folder, begun(Path(folder), model, name=NAME) as run:
        run.wait_for("vllm-launch: ready")
        lines = run.log.read_text(errors="replace").splitlines()
        run.ask("/v1/completions", {"model": NAME, "prompt": "Hello", "max_tokens": 8, "ignore_eos": True})
        _, _, metrics = run.ask("/metrics")
    replace("logs/vllm-*-cpu-start.log", f"logs/vllm-{pinned_vllm()}-cpu-start.log", vllm_lines(lines))
    replace("metrics/vllm-*-cpu.txt", f"metrics/vllm-{pinned_vllm()}-cpu.txt", metrics)


def vllm_lines(lines: list[str]) -> str:
    """Return vLLM's own lines up to readiness, without the folders of this machine."""
    ours = [n for n, line in enumerate(lines) if " vllm-launch: " in line]  # the plan's table ends before the first
    ready = next(n for n in ours if "ready after" in lines[n])
    text = "".join(f"{lines[n]}\n" for n in range(ours[0], ready) if n not in ours)
    return re.sub(r"(?<![\w.])/\S*/(site-packages/|(?=tiny-chat))", "", text)


def replace(old: str, new: str, text: str) -> None:
    """Write ``text`` to tests/data/``new``, in place of what matches ``old``."""
    for path in (TESTS / "data").glob(old):
        path.unlink()
    (TESTS / "data" / new).write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
