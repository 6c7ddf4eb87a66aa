"""Finds changes that would fit when the request does not fit. Pure."""

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
from vllm_launch.plan.request import AUTO, PlanRequest

MAX_ALTERNATIVES = 3
"""Number of changes that an error suggests."""

LARGER_GPUS = ("A100-80GB", "H200", "B200")
"""GPUs that an error suggests when the GPUs of the machine are too small."""

SIZES = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "max_cudagraph_capture_size", "max_loras",
         "max_lora_rank")  # fmt: skip
"""Options that need less memory if the user lowers them."""


CACHE_SIZES = ("gpu_memory_utilization", "kv_cache_memory_bytes", "num_gpu_blocks_override")
"""Options that fix the size of the KV cache. The plan can choose it if the user removes them."""


def nothing_fits(
    request: PlanRequest, hardware: Hardware, gpus: Sequence[Gpu], model: Model, no_fits: Sequence[NoFit]
) -> UsageError:
    """Return the error that says how many bytes are missing, and the three smallest changes that would fit."""
    counts = ", ".join(f"{len(group)} x {group[0].name}" for group in alike(tuple(gpus)))
    where = f"{model.name} on {counts}"
    too_small = [no_fit for no_fit in no_fits if no_fit.missing is not None]
    if not too_small:
        default = "the parallel sizes that you set need more GPUs than one vLLM instance can use here"
        why = "; ".join(dict.fromkeys(f"{no_fit.layout.title}: {no_fit.why}" for no_fit in no_fits[:3])) or default
        return UsageError(where, why, "change the options that you set, or remove them so that the plan chooses")
    nearest = min(too_small, key=lambda no_fit: no_fit.missing or 0)
    why = f"{nearest.layout.title}: {nearest.why}"
    longest = max(no_fit.longest for no_fit in too_small)
    changes = _changes_that_fit(request, hardware, gpus, model, longest)
    if not changes:
        lower = [f"--{name.replace('_', '-')}" for name in SIZES if (getattr(request, name) or AUTO) != AUTO]
        smaller = f", or lower {' or '.join(lower)}" if lower else ""
        return UsageError(where, why, f"no small change makes it fit: use a smaller model or larger GPUs{smaller}")
    start = "any of these changes makes it fit" if len(changes) > 1 else "this change makes it fit"
    return UsageError(where, why, f"{start}: {'; or '.join(changes)}")


def _changes_that_fit(
    request: PlanRequest, hardware: Hardware, gpus: Sequence[Gpu], model: Model, longest: int
) -> list[str]:
    """Return at most three changes that make the model fit, the smallest first. Each of them was planned."""
    changes: dict[str, str] = {}
    for description, changed, machine in _changes(request, hardware, gpus, model, longest):
        kind = description.lstrip("0123456789 ")  # if 2 GPUs are enough, 4 GPUs are not suggested
        if len(changes) < MAX_ALTERNATIVES and kind not in changes and choose(changed, machine, machine.gpus, model)[0]:
            changes[kind] = description
    return list(changes.values())


def _changes(
    request: PlanRequest, hardware: Hardware, gpus: Sequence[Gpu], model: Model, longest: int
) -> Iterator[tuple[str, PlanRequest, Hardware]]:
    """Yield possible changes, the smallest first: a description, the changed request, and the machine."""
    change = msgspec.structs.replace
    for name in CACHE_SIZES:
        if getattr(request, name) is not None:
            yield f"remove --{name.replace('_', '-')}", change(request, **{name: None}), hardware
    if longest:
        yield f"--max-model-len {longest}", change(request, max_model_len=longest), hardware
    if request.kv_cache_dtype in {None, "auto"} and gpus[0].generation >= Generation.ADA:
        yield "--kv-cache-dtype fp8", change(request, kv_cache_dtype="fp8"), hardware
    can_quantize = request.quantization is None and model.quantization is None
    if can_quantize:
        yield "--quantization fp8", change(request, quantization="fp8"), hardware
    any_split = change(request, tensor_parallel_size=None, pipeline_parallel_size=None, data_parallel_size=None)
    if any_split != request:
        yield "remove the parallel sizes that you set", any_split, hardware
    counts = [count for count in (2, 4, 8, 16) if count > len(gpus) and not gpus[0].mig_profile]
    for count in counts:
        yield f"{count} of these GPUs", any_split, _with_gpus(hardware, gpus[0], count)
    for name in LARGER_GPUS:
        yield f"{len(gpus)} x {name}", any_split, parse_hardware_name(f"{name}:{len(gpus)}")
    for count in counts if can_quantize else ():
        smaller = change(any_split, quantization="fp8")
        yield f"{count} of these GPUs with --quantization fp8", smaller, _with_gpus(hardware, gpus[0], count)


def _with_gpus(hardware: Hardware, gpu: Gpu, count: int) -> Hardware:
    """Return ``hardware`` with ``count`` GPUs like ``gpu``, linked to each other as its first two GPUs are."""
    gpus = tuple(msgspec.structs.replace(gpu, index=n, uuid=f"{gpu.uuid}-{n}") for n in range(count))
    linked = bool(hardware.nvlink) and any(hardware.nvlink[0])
    matrix = tuple(tuple(linked and a != b for b in range(count)) for a in range(count))
    return msgspec.structs.replace(hardware, gpus=gpus, nvlink=matrix, p2p=matrix)
