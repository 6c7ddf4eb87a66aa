"""What would fit where nothing that was asked for does. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from vllm_launch.errors import UsageError
from vllm_launch.machine.catalogue import parse_hardware_name
from vllm_launch.machine.generation import Generation
from vllm_launch.machine.gpus import Gpu, Hardware, alike
from vllm_launch.model.model import Model
from vllm_launch.plan.choose import choose
from vllm_launch.plan.fit import NoFit
from vllm_launch.plan.request import PlanRequest

NEAREST = 3
"""How many things that would fit are named when nothing does."""

LARGER = ("A100-80GB", "H200", "B200")
"""GPUs that are named when those at hand are too small."""


def nothing_fits(
    request: PlanRequest, hardware: Hardware, gpus: Sequence[Gpu], model: Model, missed: Sequence[NoFit]
) -> UsageError:
    """The refusal: by how much it does not fit, and the three nearest things that would."""
    counts = ", ".join(f"{len(group)} x {group[0].name}" for group in alike(tuple(gpus)))
    where = f"{model.name} on {counts}"
    sized = [miss for miss in missed if miss.missing is not None]
    if not sized:
        needed = "what was asked for needs more GPUs than one vLLM can have here"
        why = "; ".join(dict.fromkeys(f"{miss.layout.title}: {miss.why}" for miss in missed[:3])) or needed
        return UsageError(where, why, "change what was set, or leave it to the plan")
    nearest = min(sized, key=lambda miss: miss.missing or 0)
    what = f"{nearest.layout.title}: {nearest.why}"
    nothing = "nothing near would: take a smaller model or larger GPUs"
    found = "; or ".join(_would_fit(request, hardware, gpus, model, max(miss.longest for miss in sized)))
    return UsageError(where, what, f"what would fit: {found}" if found else nothing)


def _would_fit(request: PlanRequest, hardware: Hardware, gpus: Sequence[Gpu], model: Model, longest: int) -> list[str]:
    """At most three changes that make it fit, nearest first; each has been planned, none is a guess."""
    found: dict[str, str] = {}
    for words, changed, machine in _changes(request, hardware, gpus, model, longest):
        kind = words.lstrip("0123456789 ")  # two GPUs will do, so nobody needs to hear of four
        if len(found) < NEAREST and kind not in found and choose(changed, machine, machine.gpus, model)[0]:
            found[kind] = words
    return list(found.values())


def _changes(
    request: PlanRequest, hardware: Hardware, gpus: Sequence[Gpu], model: Model, longest: int
) -> Iterator[tuple[str, PlanRequest, Hardware]]:
    """What could be changed, in words, as it would be asked, and on which machine; the smallest change first."""
    change = msgspec.structs.replace
    if request.gpu_memory_utilization is not None:
        yield "no --gpu-memory-utilization", change(request, gpu_memory_utilization=None), hardware
    if request.kv_cache_memory_bytes is not None:
        yield "no --kv-cache-memory-bytes", change(request, kv_cache_memory_bytes=None), hardware
    if longest:
        yield f"--max-model-len {longest}", change(request, max_model_len=longest), hardware
    if request.kv_cache_dtype in {None, "auto"} and gpus[0].generation >= Generation.ADA:
        yield "--kv-cache-dtype fp8", change(request, kv_cache_dtype="fp8"), hardware
    fp8 = request.quantization is None and model.quantization is None
    if fp8:
        yield "--quantization fp8", change(request, quantization="fp8"), hardware
    free = change(request, tensor_parallel_size=None, pipeline_parallel_size=None, data_parallel_size=None)
    if free != request:
        yield "no parallel sizes set", free, hardware
    more = [count for count in (2, 4, 8, 16) if count > len(gpus) and not gpus[0].mig_profile]
    for count in more:
        yield f"{count} of these GPUs", free, _more(hardware, gpus[0], count)
    for name in LARGER:
        yield f"{len(gpus)} x {name}", free, parse_hardware_name(f"{name}:{len(gpus)}")
    for count in more if fp8 else ():
        smaller = change(free, quantization="fp8")
        yield f"{count} of these GPUs with --quantization fp8", smaller, _more(hardware, gpus[0], count)


def _more(hardware: Hardware, gpu: Gpu, count: int) -> Hardware:
    """The same machine with ``count`` GPUs like ``gpu``, linked as its first two are."""
    gpus = tuple(msgspec.structs.replace(gpu, index=n, uuid=f"{gpu.uuid}-{n}") for n in range(count))
    linked = bool(hardware.nvlink) and any(hardware.nvlink[0])
    matrix = tuple(tuple(linked and a != b for b in range(count)) for a in range(count))
    return msgspec.structs.replace(hardware, gpus=gpus, nvlink=matrix, p2p=matrix)
