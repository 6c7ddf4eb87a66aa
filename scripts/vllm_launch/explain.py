"""Puts a decision into words: why each value is what it is, what was not taken, what to beware of. Pure."""

from __future__ import annotations

import msgspec

from vllm_launch.gpus import Gpu
from vllm_launch.memory import Memory
from vllm_launch.parallel import Layout

GIB = 1 << 30


class Reason(msgspec.Struct, frozen=True, kw_only=True):
    """Why one value is what it is. ``source``: "you", "model", "hardware", "vLLM 0.32.0" or "rule" (ours)."""

    field: str
    value: object
    why: str
    source: str


class Rejected(msgspec.Struct, frozen=True, kw_only=True):
    """A plan that was considered and not taken, such as "TP=3", and why."""

    plan: str
    why: str


def gib(size: int) -> str:
    """Bytes as GiB for people: "14.96 GiB"."""
    return f"{size / GIB:.2f} GiB"


def title(layout: Layout) -> str:
    """A split in the field's words: "TP=2", "TP=2 PP=2 DP=2"."""
    words = [f"TP={layout.tensor}"]
    if layout.pipeline > 1:
        words.append(f"PP={layout.pipeline}")
    if layout.data > 1:
        words.append(f"DP={layout.data}")
    return " ".join(words)


def utilization_why(memory: Memory, gpu: Gpu) -> str:
    """What stands between a GPU's memory and what vLLM may claim of it."""
    taken = gpu.memory_total - gpu.memory_free
    others = f" less {gib(taken)} that others hold" if taken else ""
    return (
        f"{gib(gpu.memory_total)} on GPU {gpu.index}{others}, less what vLLM does not count: the CUDA context "
        f"{gib(memory.context)} and {gib(memory.safety)} for what serving takes beyond the profile"
    )
