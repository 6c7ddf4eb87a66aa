#!/usr/bin/env python3
"""Measure the seconds from process start to the first token: with empty caches, prebuilt kernels, and a warm cache.

``python benchmarks/gpu/start.py --tokenizer FOLDER --kernels FOLDER --out FILE`` needs vLLM and idle GPUs.
``--kernels`` is the folder with FlashInfer's prebuilt kernels, as the image has them (flashinfer_jit_cache;
docker/kernels.py). Each start runs the launcher with a cache folder of its own, except the second start with kernels,
which uses the cache of the first. All times are seconds since the start of the process. "first token" is the end of a
request for one token. Source for the phases: vllm_launch/serve/progress.py.
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


def measure_start(command: list[str], log: Path, cache: Path, kernels: Path | None) -> dict[str, object]:
    """Start ``command`` with HOME in ``cache``, and return the seconds to ready, to the first token, and per phase."""
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(kernels) if kernels else None]))
    env = bench.environment() | {"PYTHONPATH": path, "HOME": str(cache)}
    began, began_at = time.monotonic(), time.time()
    with bench.start_server(command, log, env=env):
        ready = time.monotonic() - began
        bench.ask(bench.PORT, {"prompt": "hi", "max_tokens": 1})
        first = time.monotonic() - began
        # The launcher writes the file a moment after vLLM is ready.
        while not (histories := [path for path in cache.rglob("starts.json") if path.stat().st_mtime > began_at]):
            if time.monotonic() - began > ready + 60:
                raise bench.ServerFailedError(f"{log}: the launcher wrote no starts.json within a minute")
            time.sleep(0.1)
        history = json.loads(histories[0].read_text())
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
            start_flags = [f"--launch-cache-dir={folder / cache / 'cache'}", *flags]
            log = options.out.parent / "logs" / f"start-{caches}.log"
            row = measure_start(bench.launcher_command(model, start_flags), log, folder / cache, kernels)
            result.add(caches=caches, shape=options.shape, flags=flags, **row)
    return 0


if __name__ == "__main__":
    bench.run(main)
