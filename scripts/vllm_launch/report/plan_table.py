"""Shows a plan and a machine: a table for people, JSON and YAML for programs. Pure: text in, text out."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import Literal

import msgspec

from vllm_launch.engine.options import SECRETS
from vllm_launch.machine.gpus import Gpu, Hardware
from vllm_launch.plan.fit import tightest
from vllm_launch.plan.plan import Plan
from vllm_launch.settings.read import PATHS
from vllm_launch.settings.settings import Settings
from vllm_launch.sizing.memory import gib

Format = Literal["table", "json", "yaml"]
FORMATS: tuple[Format, ...] = ("table", "json", "yaml")
HELM: Literal["helm"] = "helm"
"""One more that a plan can be said in; it needs the settings too."""
BAR = 72
"""Columns of the bar that stands for one GPU's memory."""


def plan_as(plan: Plan, hardware: Hardware, how: Format, width: int = 100) -> str:
    """``plan`` as text with a newline at its end; JSON and YAML are the contract, the table may change."""
    if how == "json":
        return msgspec.json.format(msgspec.json.encode(plan), indent=2).decode() + "\n"
    if how == "yaml":
        import yaml  # noqa: PLC0415 - a tenth of the time of a start, which the other formats need not pay

        return yaml.safe_dump(msgspec.to_builtins(plan), sort_keys=False, allow_unicode=True, width=width)
    return "\n".join(_table(plan, hardware, width)) + "\n"


def helm_values(plan: Plan, hardware: Hardware, settings: Settings, *, folder: bool) -> str:
    """Values of the chart (helm/values.yaml) that give ``plan`` in a cluster of such machines, as YAML.

    What the plan decided is not among them, since each pod plans again for what is free where it lands: only what the
    person said, how many GPUs a pod has, and how many pods there are. Replicas become pods, which roll and drain one by
    one, unless they share their experts or the person asked for data parallelism. ``folder``: the model is a folder,
    which the pods will find below /models.
    """
    import yaml  # noqa: PLC0415 - as above

    engine = {name: value for name, value in settings.engine.items() if name not in SECRETS}
    config: dict[str, object] = {"model": settings.model}
    if folder:
        config["model"] = f"/models/{PurePath(settings.model).name}"
    config |= {name.replace("_", "-"): value for name, value in engine.items()}
    launch = msgspec.to_builtins(settings.launch)
    said = {name: value for name, value in launch.items() if f"launch.{name}" in settings.origin and name not in PATHS}
    config |= {"launch": said} if said else {}
    together = "data_parallel_size" in engine or any(
        reason.field == "enable_expert_parallel" and reason.value is True for reason in plan.reasons
    )
    replicas = 1 if together else plan.data_parallel_size
    count = plan.gpus * plan.data_parallel_size // replicas
    values: dict[str, object] = {"config": config, "gpus": {"count": count}}
    if count:
        profile = used(plan, hardware)[0].mig_profile
        values["gpus"] = {"count": count} | ({"resource": f"nvidia.com/mig-{profile}"} if profile else {})
        values["resources"] = {"memory": f"{16 + 16 * count}Gi"}
    else:
        memory = plan.memory
        taken = memory.weights + memory.non_torch + memory.activation_peak + plan.kv_cache.bytes + memory.safety
        values["resources"] = {"memory": f"{-(-taken >> 30) + 1}Gi"}
    if folder:
        values["models"] = {"claim": "models"}
    if replicas > 1:
        values |= {"replicas": replicas, "cache": {"kind": "ephemeral"}}
    head = f"# {plan.model} on {_machine(hardware, used(plan, hardware))}, for {plan.objective}\n"
    return head + yaml.safe_dump(msgspec.to_builtins(values), sort_keys=False, allow_unicode=True)


def _table(plan: Plan, hardware: Hardware, width: int) -> Iterator[str]:
    gpus = used(plan, hardware)
    yield f"{plan.model} on {_machine(hardware, gpus)}, for {plan.objective}"
    yield ""
    rows = [(reason.field, _shown(reason.value), reason.source, reason.why) for reason in plan.reasons]
    yield from _columns(rows, width)
    yield ""
    yield from _bar(plan, hardware, gpus)
    if plan.rejected:
        yield ""
        yield "not taken"
        yield from _columns([(one.plan, one.why) for one in plan.rejected], width)
    for warning in plan.warnings:
        yield ""
        yield from textwrap.wrap(f"warning: {warning}", width, subsequent_indent="  ", break_on_hyphens=False)
    if plan.argv:
        yield ""
        words = [f"{name}={shlex.quote(value)}" for name, value in plan.env.items()] + [
            shlex.quote(word) for word in plan.argv
        ]
        yield from _command(words, width)


def used(plan: Plan, hardware: Hardware) -> tuple[Gpu, ...]:
    """The GPUs that ``plan`` takes of ``hardware``."""
    names = plan.env.get("CUDA_VISIBLE_DEVICES")
    if names is None:
        return hardware.gpus[: plan.gpus * plan.data_parallel_size]
    by_name = {gpu.uuid if gpu.mig_profile else str(gpu.index): gpu for gpu in hardware.gpus}
    return tuple(by_name[name] for name in names.split(","))


def _machine(hardware: Hardware, gpus: Sequence[Gpu]) -> str:
    if gpus:
        return f"{len(gpus)} of {len(hardware.gpus)} GPUs ({gpus[0].name}, {gib(gpus[0].memory_total)} each)"
    cpu = hardware.cpu
    return f"the CPU ({cpu.cores} cores, {gib(cpu.memory_available)} of memory available)" if cpu else "the CPU"


def _shown(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _columns(rows: Sequence[tuple[str, ...]], width: int) -> Iterator[str]:
    """Rows in columns; the last one is wrapped within ``width``."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]) - 1)]
    indent = 2 + sum(widths) + 2 * len(widths)
    for row in rows:
        head = "  " + "".join(f"{cell:{size}}  " for cell, size in zip(row[:-1], widths, strict=True))
        text = textwrap.wrap(row[-1], max(width - indent, 30), break_on_hyphens=False) or [""]
        yield (head + text[0]).rstrip()
        yield from (" " * indent + line for line in text[1:])


def _bar(plan: Plan, hardware: Hardware, gpus: Sequence[Gpu]) -> Iterator[str]:
    """One GPU's memory, or the CPU's, to scale; what is there at all gets one column."""
    memory, workers = plan.memory, max(plan.gpus, plan.tensor_parallel_size * plan.pipeline_parallel_size)
    gpu = tightest(gpus) if gpus else None
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


def hardware_table(hardware: Hardware, width: int = 100) -> str:
    """What the machine has, for people."""
    lines = []
    if hardware.driver:
        cuda = "" if hardware.cuda is None else ", CUDA up to {}.{}".format(*hardware.cuda)
        lines += [f"driver {hardware.driver}{cuda}", ""]
    rows = [("GPU", "name", "free", "total", "capability", "uuid")]
    for gpu in hardware.gpus:
        capability = "{}.{}".format(*gpu.compute_capability)
        rows.append((str(gpu.index), gpu.name, gib(gpu.memory_free), gib(gpu.memory_total), capability, gpu.uuid))
    lines += list(_columns(rows, max(width, 140))) if hardware.gpus else ["  no GPU"]
    lines += _links(hardware)
    for gpu in hardware.gpus:
        held = [f"{one.name} (pid {one.pid}) {gib(one.memory) if one.memory else ''}".rstrip() for one in gpu.processes]
        lines += [f"  GPU {gpu.index} is used by {', '.join(held)}"] if held else []
        lines += [f"  GPU {gpu.index}: {fault}" for fault in gpu.faults]
    if (cpu := hardware.cpu) is not None:
        limit = "no limit" if cpu.memory_limit is None else f"limit {gib(cpu.memory_limit)}"
        nodes = f", {len(cpu.numa_nodes)} NUMA nodes" if len(cpu.numa_nodes) > 1 else ""
        what = f"{gib(cpu.memory_available)} of {gib(cpu.memory_total)} available, {limit}"
        lines += ["", f"CPU: {cpu.cores} cores{nodes}; memory: {what}"]
    lines += [f"warning: {warning}" for warning in hardware.warnings]
    return "\n".join(lines) + "\n"


def _links(hardware: Hardware) -> list[str]:
    if len(hardware.gpus) < 2 or not hardware.nvlink:  # noqa: PLR2004 - a pair
        return []
    pairs = [(a, b) for a in range(len(hardware.gpus)) for b in range(a)]
    joined = sum(hardware.nvlink[a][b] for a, b in pairs)
    direct = sum(hardware.p2p[a][b] for a, b in pairs) if hardware.p2p else 0
    return ["", f"  NVLink joins {joined} of {len(pairs)} pairs; {direct} can copy to each other directly"]
