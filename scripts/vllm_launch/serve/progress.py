"""Reads the phase and the progress of a start of vLLM from its log and its processes. Pure: time is an argument."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from vllm_health.state import Movement
from vllm_launch.units import MIB, size

PHASES: Final = (
    "starting",
    "initializing",
    "downloading",
    "loading weights",
    "compiling",
    "profiling",
    "tuning kernels",
    "capturing CUDA graphs",
    "warming up",
    "ready",
)
"""Phases of a start, in vLLM's order. A start may skip some and repeats none. "starting" is Python's imports.
"initializing" is the work before the weights: configuration, processes, the device. vLLM captures some CUDA graphs to
measure their memory before it sizes the KV cache. That belongs to "profiling"."""

# The first line of a phase contains this text, a part of a format string of vLLM 0.32.0. The comment names its file.
_SIGNS: Final = (
    ("initializing", "non-default args:"),  # entrypoints/serve/utils/api_utils.py
    ("loading weights", "Loading model from scratch"),  # v1/worker/gpu/model_runner.py
    ("loading weights", "Starting to load model"),  # v1/worker/gpu_model_runner.py, cpu_model_runner.py
    ("loading weights", "checkpoint shards"),  # model_executor/model_loader/weight_utils.py
    ("compiling", "Using cache directory"),  # compilation/backends.py
    ("compiling", "Dynamo bytecode transform"),  # compilation/backends.py
    ("compiling", "Compiling a graph"),  # compilation/backends.py
    ("compiling", "Directly load the"),  # compilation/backends.py
    ("profiling", "Initial profiling"),  # compilation/monitor.py
    ("profiling", "Profiling CUDA graph memory"),  # v1/worker/gpu_model_runner.py
    ("profiling", "Available KV cache memory"),  # v1/worker/gpu_worker.py
    ("tuning kernels", "GPU KV cache size:"),  # v1/core/kv_cache_utils.py
    ("profiling", "CPU KV cache size:"),  # as above; the CPU engine compiles its kernels during warm-up
    ("capturing CUDA graphs", "Capturing CUDA graphs"),  # v1/worker/gpu_model_runner.py, gpu/cudagraph_utils.py
    ("warming up", "Warming up model"),  # v1/worker/cpu_model_runner.py
    ("warming up", "init engine (profile, create kv cache, warmup model) took"),  # v1/engine/core.py
)

_IDLE_CHATTER: Final = re.compile(r"Waiting for .* core engine|No available shared memory broadcast block")
"""Lines that vLLM prints while it waits. They do not count as progress."""


def phase_after(phase: str, line: str) -> str:
    """Return the phase after ``line`` of vLLM's log. It is never earlier than ``phase``."""
    candidate = next((later for later, sign in _SIGNS if sign in line), phase)
    if candidate == "capturing CUDA graphs" and PHASES.index(phase) < PHASES.index("tuning kernels"):
        return phase
    return max(phase, candidate, key=PHASES.index)


def shows_progress(line: str) -> bool:
    """Whether a log line shows progress. Lines that vLLM prints while it waits do not."""
    return not _IDLE_CHATTER.search(line)


def downloading(phase: str, before: Movement, now: Movement) -> bool:
    """Whether vLLM downloads: it wrote at least 16 MiB since ``before``. vLLM logs only the end (weight_utils.py)."""
    return PHASES.index(phase) <= PHASES.index("downloading") and now.written - before.written >= 16 * MIB


def loaded(since: Movement, now: Movement) -> int:
    """Return the bytes of weights loaded since ``since``: the largest increase of disk reads, memory or GPU memory."""
    return max(now.read - since.read, now.resident - since.resident, now.gpu - since.gpu, 0)


def remaining(last_phases: Mapping[str, float], phases: Mapping[str, float], phase: str) -> float | None:
    """Return the seconds that a start in ``phase`` still takes if it takes as long as the last start.

    ``last_phases`` and ``phases``: seconds by phase, of the last start and of this one. None without a last start.
    """
    if not last_phases:
        return None
    later_s = sum(seconds for later, seconds in last_phases.items() if PHASES.index(later) > PHASES.index(phase))
    return later_s + max(last_phases.get(phase, 0.0) - phases.get(phase, 0.0), 0.0)


def sentence(
    phase: str,
    elapsed_s: float,
    loaded_bytes: int,
    weights_bytes: int | None,
    last_phases: Mapping[str, float],
    *,
    gpu: bool,
) -> str:
    """Return one short line: the phase, the bytes of weights, the time so far, and a normal start's time."""
    weights = ""
    if phase in {"downloading", "loading weights"} and weights_bytes:
        weights = f", {size(min(loaded_bytes, weights_bytes))} of {size(weights_bytes)} of weights"
    normal = "40-180 s, minutes for large models" if gpu else "45-130 s"
    normal = f"last time: {sum(last_phases.values()):.0f} s" if last_phases else f"normal: {normal}"
    return f"{phase}{weights}, {elapsed_s:.0f} s so far ({normal})"


def kv_sentence(tokens: int, planned: int | None, tolerance: float) -> tuple[str, bool]:
    """Return a sentence on the KV cache's real size against the plan, and whether the difference deserves a warning."""
    if not planned:
        return f"KV cache: {tokens:,} tokens", False
    difference = tokens - planned
    text = f"KV cache: {tokens:,} tokens, planned {planned:,} ({difference / planned:+.1%})"
    return text, abs(difference) > tolerance * planned
