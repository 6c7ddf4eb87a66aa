"""Writes a plan as a table for people, or as JSON or YAML for programs. Pure."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterator, Sequence
from typing import Literal

import msgspec

from vllm_launch.machine.gpus import Hardware
from vllm_launch.plan.fit import tightest
from vllm_launch.plan.plan import Plan, PlanWithCommand
from vllm_launch.plan.reason import Reason
from vllm_launch.report.columns import columns
from vllm_launch.report.machine_table import machine_name
from vllm_launch.units import gib

Format = Literal["table", "json", "yaml"]
FORMATS: tuple[Format, ...] = ("table", "json", "yaml")
BAR = 72
"""Width of the bar that shows one GPU's memory, in characters."""


def plan_as(plan: PlanWithCommand, hardware: Hardware, output_format: Format, width: int = 100) -> str:
    """Return ``plan`` as text with a newline at its end.

    Programs can rely on the layout of JSON and YAML. The layout of the table may change.
    """
    if output_format == "json":
        return msgspec.json.format(msgspec.json.encode(plan), indent=2).decode() + "\n"
    if output_format == "yaml":
        import yaml  # noqa: PLC0415 - takes a tenth of the start-up time, and only this format needs it

        return yaml.safe_dump(msgspec.to_builtins(plan), sort_keys=False, allow_unicode=True, width=width)
    return "\n".join(_table(plan, hardware, width)) + "\n"


def _table(plan: PlanWithCommand, hardware: Hardware, width: int) -> Iterator[str]:
    yield f"{plan.model} on {machine_name(hardware, plan.gpus)}, for {plan.objective}"
    yield ""
    rows = [(reason.field, _value_text(reason.value), _source_text(reason), reason.why) for reason in plan.reasons]
    yield from columns([("option", "value", "decided by", "reason"), *rows], width)
    yield ""
    yield from _bar(plan, hardware)
    if plan.rejected:
        yield ""
        yield "rejected plans"
        yield from columns([(rejected.plan, rejected.why) for rejected in plan.rejected], width)
    for warning in plan.warnings:
        yield ""
        yield from textwrap.wrap(f"warning: {warning}", width, subsequent_indent="  ", break_on_hyphens=False)
    yield ""
    assignments = [f"{name}={shlex.quote(value)}" for name, value in plan.env.items()]
    yield from _command(assignments + [shlex.quote(word) for word in plan.argv], width)


def _source_text(reason: Reason) -> str:
    """Return the source of a value, such as "hardware", or "you (flag --max-model-len)"."""
    return f"{reason.source} ({reason.origin})" if reason.origin else str(reason.source)


def _value_text(value: object) -> str:
    if value is None:
        return "not set"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _bar(plan: Plan, hardware: Hardware) -> Iterator[str]:
    """Yield a bar of one GPU's or the CPU's memory, to scale, and its legend. Each part has at least one column."""
    memory, workers = plan.memory, plan.tensor_parallel_size * plan.pipeline_parallel_size
    gpu = tightest(plan.gpus) if plan.gpus else None
    unified = gpu is not None and gpu.unified
    total = gpu.memory_total if gpu else hardware.cpu.memory_available if hardware.cpu else 0
    parts = [
        ("x", "host, other programs" if unified else "other processes", total - gpu.memory_free if gpu else 0),
        ("c", "CUDA context", memory.context),
        ("W", "weights", memory.weights),
        ("n", "CUDA, NCCL, buffers" if gpu else "vLLM and activations", memory.non_torch),
        ("a", "activation peak", memory.activation_peak),
        ("e", "multimodal encoder", memory.encoder),
        ("g", "CUDA graphs", memory.cuda_graphs),
        ("K", "KV cache", plan.kv_cache.bytes // workers),
        ("s", "safety margin" if gpu else "for other programs", memory.safety),
    ]
    parts = [part for part in parts if part[2] > 0]
    unused = total - sum(size for _, _, size in parts)
    if unused > 0:
        parts.append((".", "unused", unused))
    yield f"memory of GPU {gpu.index}, {gib(total)}" if gpu else f"memory, {gib(total)}"
    yield "  [" + "".join(sign * columns for (sign, _, _), columns in zip(parts, _scaled(parts), strict=True)) + "]"
    for sign, name, size in parts:
        yield f"   {sign} {name:<20}{gib(size):>12}"


def _scaled(parts: Sequence[tuple[str, str, int]]) -> list[int]:
    """Return the columns of each part, at least one. The largest part is adjusted so that the sum is ``BAR``."""
    total = sum(size for _, _, size in parts)
    columns = [max(1, round(BAR * size / total)) for _, _, size in parts]
    columns[columns.index(max(columns))] += BAR - sum(columns)
    return columns


def _command(words: Sequence[str], width: int) -> Iterator[str]:
    """Yield a shell command line, broken over several lines. It runs as it is if a user pastes it."""
    line = ""
    for word in words:
        if line and len(line) + len(word) > width - 5:
            yield f"  {line} \\"
            line = f"  {word}"
        else:
            line = f"{line} {word}" if line else word
    yield f"  {line}"
