"""How far a start of vLLM has come, judged from its log and from what its processes do. Pure: time is an argument."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
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
"""In the order in which vLLM goes through them; a start may leave some out, none comes twice. "starting" is Python's
imports, "initializing" what is done before weights: configuration, processes, the device. Graphs that are captured to
see what they take, before the KV cache has its size, belong to "profiling"."""

# Each is a piece of a format string of vLLM 0.32.0; the file that prints it stands beside it.
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
    ("profiling", "CPU KV cache size:"),  # as above; kernels are compiled while the CPU engine warms up
    ("capturing CUDA graphs", "Capturing CUDA graphs"),  # v1/worker/gpu_model_runner.py, gpu/cudagraph_utils.py
    ("warming up", "Warming up model"),  # v1/worker/cpu_model_runner.py
    ("warming up", "init engine (profile, create kv cache, warmup model) took"),  # v1/engine/core.py
)

_IDLE_CHATTER: Final = re.compile(r"Waiting for .* core engine|No available shared memory broadcast block")
"""What vLLM prints while it waits: a sign that nothing moves, not that something does."""


def phase_after(phase: str, line: str) -> str:
    """The phase once ``line`` of vLLM's log has been seen; never an earlier one than ``phase``."""
    found = next((later for later, sign in _SIGNS if sign in line), phase)
    if found == "capturing CUDA graphs" and PHASES.index(phase) < PHASES.index("tuning kernels"):
        return phase
    return max(phase, found, key=PHASES.index)


def tells_progress(line: str) -> bool:
    """Whether a log line is news, rather than vLLM saying that it waits."""
    return not _IDLE_CHATTER.search(line)


def downloading(phase: str, before: Movement, now: Movement) -> bool:
    """Whether a download is under way: vLLM logs only its end (weight_utils.py), but much is written."""
    return PHASES.index(phase) <= PHASES.index("downloading") and now.written - before.written >= 16 * MIB


def loaded(since: Movement, now: Movement) -> int:
    """Bytes of weights that have come in since the loading began: read from disk, or seen in memory."""
    return max(now.read - since.read, now.resident - since.resident, now.gpu - since.gpu, 0)


def remaining(usual: Mapping[str, float], taken: Mapping[str, float], phase: str) -> float | None:
    """Seconds that a start in ``phase`` will still take, if it takes as long as the last one did.

    ``usual`` and ``taken`` are seconds by phase, of that one and of this; None where there was none.
    """
    if not usual:
        return None
    ahead = sum(seconds for later, seconds in usual.items() if PHASES.index(later) > PHASES.index(phase))
    return ahead + max(usual.get(phase, 0.0) - taken.get(phase, 0.0), 0.0)


def sentence(
    phase: str, elapsed_s: float, read: int, weights_bytes: int | None, usual: Mapping[str, float], *, gpu: bool
) -> str:
    """One compact line: phase, bytes of weights, time so far, what is normal."""
    weights = ""
    if phase in {"downloading", "loading weights"} and weights_bytes:
        weights = f", {size(min(read, weights_bytes))} of {size(weights_bytes)} of weights"
    normal = "40-180 s, and minutes for large weights" if gpu else "45-130 s"
    normal = f"last time: {sum(usual.values()):.0f} s" if usual else f"normal: {normal}"
    return f"{phase}{weights}, {elapsed_s:.0f} s so far ({normal})"


_EXCEPTION: Final = re.compile(r"^(?:[A-Za-z_][\w.]*\.)?([A-Za-z_]\w*(?:Error|Exception|Interrupt|Killed)): (.+)$")
_PREFIX: Final = re.compile(r"^\s*(?:\([^()]*pid=\d+\) )?(?:(?:ERROR|CRITICAL) \d\d-\d\d [\d:]+ \[[^\]]+\] )?")
_WRAPPERS: Final = re.compile(
    r"Engine core initialization failed|EngineDeadError|EngineCore encountered an issue"
    r"|WorkerProc initialization failed|CancelledError|KeyboardInterrupt"
    r"|failed due to an exception in a background process"
)


def root_cause(lines: Sequence[str]) -> str | None:
    """The first exception that is not another one's wrapper, or a death that vLLM saw; None where the log has neither.

    A worker's exception is logged by the worker, then by the engine core, then by the API server, each wrapped in the
    next one's words; the first is the cause.
    """
    plain = [_plain(line) for line in lines]
    exceptions = (line for line in plain if _EXCEPTION.match(line) and not _WRAPPERS.search(line))
    deaths = (line for line in plain if "died unexpectedly" in line)  # v1/executor/multiproc_executor.py, v1/utils.py
    found = next(exceptions, None) or next(deaths, None)
    return found and found[:1000]


def reason(lines: Sequence[str]) -> str | None:
    """The most telling line of vLLM's last words: the root cause, else a wrapper, else the last error it logged."""
    if found := root_cause(lines):
        return found
    wrappers = [text for line in lines if _EXCEPTION.match(text := _plain(line))]
    errors = [_plain(line) for line in lines if re.search(r"\b(?:ERROR|CRITICAL) \d\d-", line)]
    usage = [text for line in lines if re.match(r"\S+: error: ", text := _plain(line))]
    best = next((found for found in (wrappers, errors, usage) if found and found[-1]), None)
    return best[-1][:1000] if best else None


def _plain(line: str) -> str:
    return _PREFIX.sub("", line).strip()


def exit_code(status: int) -> int:
    """Ours for a child's unrequested end (``status`` as subprocess has it): 0 becomes 1, signal n becomes 128 + n."""
    return 128 - status if status < 0 else status or 1


def kv_sentence(tokens: int, planned: int | None, tolerance: float) -> tuple[str, bool]:
    """What the KV cache really holds against the plan, and whether that is worth a warning."""
    if not planned:
        return f"KV cache: {tokens:,} tokens", False
    off = tokens - planned
    text = f"KV cache: {tokens:,} tokens, planned {planned:,} ({off / planned:+.1%})"
    return text, abs(off) > tolerance * planned
