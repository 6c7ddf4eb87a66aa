"""Writes a plan: a table for people, JSON and YAML for programs. Pure."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterator, Sequence
from typing import Literal

import msgspec

from vllm_launch.machine.gpus import Hardware
from vllm_launch.plan.explain import Reason
from vllm_launch.plan.fit import tightest
from vllm_launch.plan.plan import Plan, PlanWithCommand
from vllm_launch.report.columns import columns
from vllm_launch.report.machine_table import machine_name
from vllm_launch.units import gib

Format = Literal["table", "json", "yaml"]
FORMATS: tuple[Format, ...] = ("table", "json", "yaml")
BAR = 72
"""Columns of the bar that stands for one GPU's memory."""


def plan_as(plan: PlanWithCommand, hardware: Hardware, how: Format, width: int = 100) -> str:
    """``plan`` as text with a newline at its end; JSON and YAML are the contract, the table may change."""
    if how == "json":
        return msgspec.json.format(msgspec.json.encode(plan), indent=2).decode() + "\n"
    if how == "yaml":
        import yaml  # noqa: PLC0415 - a tenth of the time of a start, which the other formats need not pay

        return yaml.safe_dump(msgspec.to_builtins(plan), sort_keys=False, allow_unicode=True, width=width)
    return "\n".join(_table(plan, hardware, width)) + "\n"


def _table(plan: PlanWithCommand, hardware: Hardware, width: int) -> Iterator[str]:
    yield f"{plan.model} on {machine_name(hardware, plan.gpus)}, for {plan.objective}"
    yield ""
    rows = [(reason.field, _shown(reason.value), _source(reason), reason.why) for reason in plan.reasons]
    yield from columns(rows, width)
    yield ""
    yield from _bar(plan, hardware)
    if plan.rejected:
        yield ""
        yield "not taken"
        yield from columns([(one.plan, one.why) for one in plan.rejected], width)
    for warning in plan.warnings:
        yield ""
        yield from textwrap.wrap(f"warning: {warning}", width, subsequent_indent="  ", break_on_hyphens=False)
    yield ""
    words = [f"{name}={shlex.quote(value)}" for name, value in plan.env.items()]
    yield from _command(words + [shlex.quote(word) for word in plan.argv], width)


def _source(reason: Reason) -> str:
    """Where a value comes from: "you (flag --max-model-len)", or the source alone."""
    return f"{reason.source} ({reason.origin})" if reason.origin else str(reason.source)


def _shown(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _bar(plan: Plan, hardware: Hardware) -> Iterator[str]:
    """One GPU's memory, or the CPU's, to scale; what is there at all gets one column."""
    memory, workers = plan.memory, plan.tensor_parallel_size * plan.pipeline_parallel_size
    gpu = tightest(plan.gpus) if plan.gpus else None
    total = gpu.memory_total if gpu else hardware.cpu.memory_available if hardware.cpu else 0
    parts = [
        ("x", "taken by others", total - gpu.memory_free if gpu else 0),
        ("c", "CUDA context", memory.context),
        ("W", "weights", memory.weights),
        ("n", "non-torch and state" if gpu else "engine", memory.non_torch),
        ("a", "activation peak", memory.activation_peak),
        ("g", "CUDA graphs", memory.cuda_graphs),
        ("K", "KV cache", plan.kv_cache.bytes // workers),
        ("s", "safety" if gpu else "left to others", memory.safety),
    ]
    parts = [part for part in parts if part[2] > 0]
    rest = total - sum(size for _, _, size in parts)
    if rest > 0:
        parts.append((".", "not used", rest))
    yield f"memory of GPU {gpu.index}, {gib(total)}" if gpu else f"memory, {gib(total)}"
    yield "  [" + "".join(sign * columns for (sign, _, _), columns in zip(parts, _scaled(parts), strict=True)) + "]"
    for sign, name, size in parts:
        yield f"   {sign} {name:<20}{gib(size):>12}"


def _scaled(parts: Sequence[tuple[str, str, int]]) -> list[int]:
    """Columns of each part, ``BAR`` together: rounded, at least one, and the largest part takes what is over."""
    total = sum(size for _, _, size in parts)
    columns = [max(1, round(BAR * size / total)) for _, _, size in parts]
    columns[columns.index(max(columns))] += BAR - sum(columns)
    return columns


def _command(words: Sequence[str], width: int) -> Iterator[str]:
    """A command line over several lines, as a shell would take it; one that is pasted is one that runs."""
    line = ""
    for word in words:
        if line and len(line) + len(word) > width - 5:
            yield f"  {line} \\"
            line = f"  {word}"
        else:
            line = f"{line} {word}" if line else word
    yield f"  {line}"
