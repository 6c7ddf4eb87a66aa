#!/usr/bin/env python3
"""Print the sizes of an image's layers and folders, and compare the image with its budget: ``size.py IMAGE TARGET``.

The budget of a target is its last accepted size, from docker/size.json, plus 3 %. `--accept` records the present size.
Exit code 1: the image is larger than its budget.
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
    """Print the tables and return the exit code."""
    image_bytes = int(_docker("image", "inspect", "--format", "{{.Size}}", image))
    print(f"{image}: {image_bytes / 1e9:.2f} GB\n\nlayers, MiB")
    for line in _docker(
        "history", "--no-trunc", "--human=false", "--format", "{{.Size}}\t{{.CreatedBy}}", image
    ).splitlines():
        size, _, made_by = line.partition("\t")
        if int(size) >= _MIB:
            print(f"{int(size) / _MIB:8.0f}  {' '.join(made_by.split())[:100]}")
    folders = "/usr /opt/vllm-launch/own $(echo /opt/vllm-launch/engine/lib/python3.*/site-packages/*)"
    folder_sizes = _docker(
        "run", "--rm", "--entrypoint", "sh", image, "-c", f"du -sm {folders} | sort -rn | head -n {SHOWN}"
    )
    print(f"\nfolders, MiB\n{folder_sizes}")
    budget = json.loads(BUDGET.read_text())
    if accept:
        BUDGET.write_text(json.dumps(budget | {target: image_bytes}, indent=1, sort_keys=True) + "\n")
        return 0
    limit = int(budget[target] * GROWTH)
    print(
        f"budget of {target}: {budget[target] / 1e9:.2f} GB + 3 %, the image: {image_bytes / budget[target] - 1:+.1%}"
    )
    return int(image_bytes > limit)


def _docker(*words: str) -> str:
    return subprocess.run(["docker", *words], check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    arguments = [word for word in sys.argv[1:] if word != "--accept"]
    sys.exit(main(*arguments, accept="--accept" in sys.argv))
