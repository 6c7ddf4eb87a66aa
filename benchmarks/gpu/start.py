#!/usr/bin/env python3
"""From process start to the first token, by phase: with empty caches, with the image's kernels, with warm ones.

``python benchmarks/gpu/start.py --tokenizer FOLDER --kernels FOLDER --out FILE`` needs vLLM and idle GPUs. KERNELS is
where FlashInfer's prebuilt kernels lie (flashinfer_jit_cache; docker/kernels.py), as the image has them. Every
start is the launcher's, with a cache folder of its own, but for the second one with kernels, which finds what the first
left. Seconds from the start of the process, "first token" to the end of a request for one; phases:
vllm_launch/serve/progress.py.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path

import bench
from result import Result

SECOND = "kernels, second start"


def started(command: list[str], log: Path, cache: Path, kernels: Path | None) -> dict[str, object]:
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(kernels) if kernels else None]))
    env = bench.environment() | {"PYTHONPATH": path, "HOME": str(cache)}
    began, today = time.monotonic(), time.time()
    with bench.start_server(command, log, env=env):
        ready = time.monotonic() - began
        bench.ask(bench.PORT, {"prompt": "hi", "max_tokens": 1})
        first = time.monotonic() - began
        # Written when the launcher calls it ready, a moment later.
        while not (told := [path for path in cache.rglob("starts.json") if path.stat().st_mtime > today]):
            if time.monotonic() - began > ready + 60:
                raise bench.ServerFailedError(f"{log}: the launcher wrote no starts.json within a minute")
            time.sleep(0.1)
        history = json.loads(told[0].read_text())
    phases = {phase: round(seconds, 1) for phase, seconds in list(history.values())[-1].items()}
    return {"ready_s": round(ready, 1), "first_token_s": round(first, 1), "phases_s": phases}


def main() -> int:
    parser = bench.parser(__doc__)
    parser.add_argument("--kernels", type=Path, required=True)
    parser.add_argument("--only", action="append", choices=["empty", "kernels", SECOND])
    options, flags = parser.parse_known_args()
    if options.only and SECOND in options.only and "kernels" not in options.only:
        parser.error(f"--only {SECOND!r} needs --only kernels, which fills its cache")
    result = Result(options.out, "start")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = bench.model_folder(options.shape, options.tokenizer, folder)
        for caches, kernels, cache in (
            ("empty", None, "a"),
            ("kernels", options.kernels, "b"),
            (SECOND, options.kernels, "b"),
        ):
            if options.only and caches not in options.only:
                continue
            (folder / cache).mkdir(exist_ok=True)
            flags_ = [f"--launch-cache-dir={folder / cache / 'cache'}", *flags]
            log = options.out.parent / "logs" / f"start-{caches}.log"
            row = started(bench.launcher_command(model, flags_), log, folder / cache, kernels)
            result.add(caches=caches, shape=options.shape, flags=flags, **row)
    return 0


if __name__ == "__main__":
    bench.run(main)
