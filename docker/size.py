#!/usr/bin/env python3
"""What weighs what in an image, and whether it is heavier than it may be: ``size.py IMAGE TARGET``.

The budget is what each target weighed when somebody last looked, in docker/size.json, and 3 %; `--accept` writes down
what it weighs now. Exit code 1: it has grown beyond that.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BUDGET = Path(__file__).with_name("size.json")
GROWTH = 1.03
SHOWN = 25
_MIB = 1 << 20


def main(image: str, target: str, *, accept: bool) -> int:
    """Print the tables; the exit code."""
    whole = int(_docker("image", "inspect", "--format", "{{.Size}}", image))
    print(f"{image}: {whole / 1e9:.2f} GB\n\nlayers, MiB")
    for line in _docker(
        "history", "--no-trunc", "--human=false", "--format", "{{.Size}}\t{{.CreatedBy}}", image
    ).splitlines():
        size, _, made_by = line.partition("\t")
        if int(size) >= _MIB:
            print(f"{int(size) / _MIB:8.0f}  {' '.join(made_by.split())[:100]}")
    folders = "/usr /opt/vllm-launch/own $(echo /opt/vllm-launch/engine/lib/python3.*/site-packages/*)"
    weighed = _docker(
        "run", "--rm", "--entrypoint", "sh", image, "-c", f"du -sm {folders} | sort -rn | head -n {SHOWN}"
    )
    print(f"\nfolders, MiB\n{weighed}")
    budget = json.loads(BUDGET.read_text())
    if accept:
        BUDGET.write_text(json.dumps(budget | {target: whole}, indent=1, sort_keys=True) + "\n")
        return 0
    limit = int(budget[target] * GROWTH)
    print(f"budget of {target}: {budget[target] / 1e9:.2f} GB and 3 %, {whole / budget[target] - 1:+.1%}")
    return int(whole > limit)


def _docker(*words: str) -> str:
    return subprocess.run(["docker", *words], check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    given = [word for word in sys.argv[1:] if word != "--accept"]
    sys.exit(main(*given, accept="--accept" in sys.argv))
