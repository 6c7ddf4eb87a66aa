"""Finds changes that would fit when the request does not fit, or leaves too little memory. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec

from vllm_launch.errors import UsageError
from vllm_launch.machine.catalogue import parse_hardware_name
from vllm_launch.machine.generation import Generation
from vllm_launch.machine.gpus import Gpu, Hardware, alike, usable
from vllm_launch.machine.known_gpus import ENTRIES
from vllm_launch.model.model import Model
from vllm_launch.plan.choose import choose
from vllm_launch.plan.fit import USEFUL_TOKENS, Candidate, NoFit
from vllm_launch.plan.request import AUTO, PlanRequest
from vllm_launch.units import GIB, gib

MAX_ALTERNATIVES = 3
"""Number of changes that an error suggests."""

LARGER_GPUS = ("A100-80GB", "H200", "B200")
"""GPUs that an error suggests when the GPUs of the machine are too small."""

COUNTS = (2, 4, 8, 16)
"""Numbers of GPUs that an error suggests when the machine has fewer."""

SIZES = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "max_cudagraph_capture_size", "max_loras",
         "max_lora_rank")  # fmt: skip
"""Options that need less memory if the user lowers them."""

FP8, FP8_CACHE = "--quantization fp8", "--kv-cache-dtype fp8"

ANY_SPLIT = "without the parallel sizes that you set"


class Change(NamedTuple):
    """A change that the user can make. ``text``: for the user. ``parts``: what it changes, to compare changes."""

    text: str
    parts: frozenset[str]
    request: PlanRequest
    hardware: Hardware


CACHE_SIZES = ("gpu_memory_utilization", "kv_cache_memory_bytes", "num_gpu_blocks_override")
"""Options that fix the size of the KV cache. The plan can choose it if the user removes them."""


def nothing_fits(
    request: PlanRequest, hardware: Hardware, gpus: Sequence[Gpu], model: Model, no_fits: Sequence[NoFit]
) -> UsageError:
    """Return the error that says why nothing fits, and the three cheapest changes that would fit."""
    counts = ", ".join(f"{len(group)} x {group[0].name}" for group in alike(tuple(gpus)))
    where = f"{model.name} on {counts}"
    too_small = [no_fit for no_fit in no_fits if no_fit.missing is not None]
    longest = max((no_fit.longest for no_fit in too_small), default=0)
    changes = _changes_that_fit(request, hardware, gpus, model, longest)
    why = _why(request, gpus, no_fits, too_small)
    if changes:
        start = "any of these changes makes it fit" if len(changes) > 1 else "this change makes it fit"
        return UsageError(where, why, f"{start}: {'; or '.join(changes)}")
    if not too_small:
        return UsageError(where, why, "change the options that you set, or remove them so that the plan chooses")
    lower = [f"--{name.replace('_', '-')}" for name in SIZES if (getattr(request, name) or AUTO) != AUTO]
    smaller = f", or lower {' or '.join(lower)}" if lower else ""
    return UsageError(where, why, f"no small change makes it fit: use a smaller model or larger GPUs{smaller}")


def unsafe_utilization(request: PlanRequest, hardware: Hardware, model: Model, chosen: Candidate) -> list[str]:
    """Return a warning if the user's gpu_memory_utilization leaves less than the safety margin, with the safe value.

    The safe value is named only if the planner accepts it: it may leave too little memory for the model.
    """
    safe = chosen.safe_utilization
    if not chosen.gpus or request.gpu_memory_utilization is None or chosen.utilization <= safe:
        return []
    safer = msgspec.structs.replace(request, gpu_memory_utilization=safe)
    fits = safe > 0 and choose(safer, hardware, usable(hardware.gpus), model)[0]
    remedy = f"set at most {safe}" if fits else "no value leaves the margin for this model, so use more or larger GPUs"
    margin = f"leaves less than the safety margin of {gib(chosen.memory.safety)}"
    return [f"gpu_memory_utilization {chosen.utilization} {margin}, so vLLM may run out of memory under load: {remedy}"]


def _why(request: PlanRequest, gpus: Sequence[Gpu], no_fits: Sequence[NoFit], too_small: Sequence[NoFit]) -> str:
    """Return the problem of the split that lacks the fewest bytes, or why the splits are refused."""
    if too_small:
        nearest = min(too_small, key=lambda no_fit: no_fit.missing or 0)
        return f"{nearest.layout.title}: {nearest.why}"
    if no_fits:
        return "; ".join(dict.fromkeys(_refused_splits(no_fits)))
    needed = f"the parallel sizes that you set need more GPUs ({request.gpus_needed})"
    if any(gpu.mig_profile for gpu in gpus):
        return f"{needed} than a vLLM instance can use here: one MIG slice"
    return f"{needed} than this machine has ({len(gpus)}), and a plan is for one machine"


def _refused_splits(no_fits: Sequence[NoFit]) -> Iterator[str]:
    """Yield why the splits are refused: first the reasons that all of them share, then those of three splits."""
    if len(no_fits) == 1:
        yield f"{no_fits[0].layout.title}: {no_fits[0].why}"
        return
    whys = [no_fit.why.split("; ") for no_fit in no_fits]
    shared = [why for why in whys[0] if all(why in others for others in whys)]
    yield from shared
    for no_fit, own in zip(no_fits[:3], whys, strict=False):
        if rest := [why for why in own if why not in shared]:
            yield f"{no_fit.layout.title}: {'; '.join(rest)}"


def _changes_that_fit(
    request: PlanRequest, hardware: Hardware, gpus: Sequence[Gpu], model: Model, longest: int
) -> list[str]:
    """Return at most three changes that make the model fit, the cheapest first. Each of them was planned.

    A change is left out if a part of it is enough.
    """
    accepted: list[Change] = []
    for change in _changes(request, hardware, gpus, model, longest):
        enough = any(other.parts <= change.parts for other in accepted)
        if not enough and choose(change.request, change.hardware, usable(change.hardware.gpus), model)[0]:
            accepted.append(change)
        if len(accepted) == MAX_ALTERNATIVES:
            break
    return [change.text for change in accepted]


def _changes(
    request: PlanRequest, hardware: Hardware, gpus: Sequence[Gpu], model: Model, longest: int
) -> Iterator[Change]:
    """Yield possible changes, the cheapest first.

    Changes that lose nothing come first, then other options on these GPUs, then more GPUs, then larger GPUs.
    """
    yield from _removals(request, hardware)
    mixed = list(_mixed_splits(request, hardware, gpus))
    yield from mixed
    longest = longest or _longest_halving(request, hardware, gpus, model)
    smaller = list(_smaller(request, hardware, gpus, model, longest))
    yield from smaller
    if (any_split := _any_split(request)) != request:
        yield Change("remove the parallel sizes that you set", frozenset({"split"}), any_split, hardware)
    if {FP8, FP8_CACHE} <= {change.text for change in smaller}:
        both = msgspec.structs.replace(request, quantization="fp8", kv_cache_dtype="fp8")
        yield Change(f"{FP8} {FP8_CACHE}", frozenset({FP8, FP8_CACHE}), both, hardware)
    for change in mixed:
        yield from _with_fp8(change, f"{change.text} {FP8}", model)
    more = list(_more_gpus(request, hardware, gpus))
    yield from more
    yield from _larger_slices(request, gpus)
    yield from _larger_gpus(request, len(gpus))
    for change in more:
        yield from _with_fp8(change, f"{change.text} with {FP8}", model)
    for count in (count for count in COUNTS if count > len(gpus)):
        yield from _larger_gpus(request, count)


def _removals(request: PlanRequest, hardware: Hardware) -> Iterator[Change]:
    """Yield the request without a size of memory or a dtype that the user set."""
    for option in (*CACHE_SIZES, "dtype"):
        if getattr(request, option) is not None:
            text = f"remove --{option.replace('_', '-')}"
            yield Change(text, frozenset({text}), msgspec.structs.replace(request, **{option: None}), hardware)


def _longest_halving(request: PlanRequest, hardware: Hardware, gpus: Sequence[Gpu], model: Model) -> int:
    """Return the largest half, quarter and so on of the length that fits, or 0 if none from USEFUL_TOKENS on fits.

    A shorter length needs less memory beside the KV cache too: a batch that must hold a whole prompt has fewer
    tokens, and block tables are smaller.
    """

    def fits(length: int) -> bool:
        shorter = msgspec.structs.replace(request, max_model_len=length)
        return choose(shorter, hardware, gpus, model)[0] is not None

    length = (request.length or model.max_model_len) // 2
    if length < USEFUL_TOKENS or not fits(USEFUL_TOKENS):
        return 0
    while length > USEFUL_TOKENS and not fits(length):
        length //= 2
    return max(length, USEFUL_TOKENS)


def _smaller(
    request: PlanRequest, hardware: Hardware, gpus: Sequence[Gpu], model: Model, longest: int
) -> Iterator[Change]:
    """Yield options that need less memory on the same split."""

    def change(text: str, **fields: object) -> Change:
        return Change(text, frozenset({text}), msgspec.structs.replace(request, **fields), hardware)

    if longest:
        yield change(f"--max-model-len {longest}", max_model_len=longest)
    if request.kv_cache_dtype in {None, "auto"} and min(gpu.generation for gpu in gpus) >= Generation.ADA:
        yield change(FP8_CACHE, kv_cache_dtype="fp8")
    if _can_quantize(request, model):
        yield change(FP8, quantization="fp8")


def _mixed_splits(request: PlanRequest, hardware: Hardware, gpus: Sequence[Gpu]) -> Iterator[Change]:
    """Yield splits over GPUs of different kinds.

    The plan has tried all splits over GPUs of one kind. It mixes kinds only if the user asks for more GPUs than there
    are of one kind.
    """
    groups = alike(tuple(gpus))
    if any(gpu.mig_profile for gpu in gpus):
        return
    for count in range(max(map(len, groups)) + 1, len(gpus) + 1):
        for option in ("tensor_parallel_size", "pipeline_parallel_size"):
            if getattr(request, option) is None:
                flag = f"--{option.replace('_', '-')} {count}"
                larger = msgspec.structs.replace(request, **{option: count})
                yield Change(flag, frozenset({"split"}), larger, hardware)


def _more_gpus(request: PlanRequest, hardware: Hardware, gpus: Sequence[Gpu]) -> Iterator[Change]:
    """Yield more GPUs like the largest of the machine. MIG slices and GPUs inside a processor cannot be multiplied."""
    largest = max(gpus, key=lambda gpu: gpu.memory_total)
    if largest.mig_profile or largest.unified:
        return
    for count in COUNTS:
        if count > len(gpus):
            yield from _on(f"{count} x {largest.name}", "more GPUs", request, _with_gpus(hardware, largest, count))


def _larger_slices(request: PlanRequest, gpus: Sequence[Gpu]) -> Iterator[Change]:
    """Yield larger MIG slices of the largest slice's GPU, the smallest first, and the whole GPU."""
    largest = max(gpus, key=lambda gpu: gpu.memory_total)
    whole = largest.name.partition(" MIG ")[0]
    if largest.mig_profile is None:
        return
    same = [(entry.memory, key) for key, entry in ENTRIES.items() if entry.nvml_name.partition(" MIG ")[0] == whole]
    for memory, key in sorted(same):
        if memory * GIB > largest.memory_total:
            part = "the whole GPU" if ENTRIES[key].nvml_name == whole else "a larger slice"
            yield from _on(f"1 x {key}", part, request, parse_hardware_name(key))


def _larger_gpus(request: PlanRequest, count: int) -> Iterator[Change]:
    for name in LARGER_GPUS:
        yield from _on(f"{count} x {name}", name, request, parse_hardware_name(f"{name}:{count}"))


def _on(text: str, part: str, request: PlanRequest, hardware: Hardware) -> Iterator[Change]:
    """Yield the request on other hardware, and also without the user's parallel sizes if there are any."""
    yield Change(text, frozenset({part}), request, hardware)
    if (any_split := _any_split(request)) != request:
        yield Change(f"{text} {ANY_SPLIT}", frozenset({part, "split"}), any_split, hardware)


def _with_fp8(change: Change, text: str, model: Model) -> Iterator[Change]:
    if _can_quantize(change.request, model):
        smaller = msgspec.structs.replace(change.request, quantization="fp8")
        yield Change(text, change.parts | {FP8}, smaller, change.hardware)


def _can_quantize(request: PlanRequest, model: Model) -> bool:
    return request.quantization is None and model.quantization is None


def _any_split(request: PlanRequest) -> PlanRequest:
    """Return ``request`` without parallel sizes."""
    return msgspec.structs.replace(
        request, tensor_parallel_size=None, pipeline_parallel_size=None, data_parallel_size=None
    )


def _with_gpus(hardware: Hardware, gpu: Gpu, count: int) -> Hardware:
    """Return ``hardware`` with ``count`` GPUs like ``gpu``, linked to each other as its first two GPUs are."""
    gpus = tuple(msgspec.structs.replace(gpu, index=n, uuid=f"{gpu.uuid}-{n}") for n in range(count))
    linked = bool(hardware.nvlink) and any(hardware.nvlink[0])
    matrix = tuple(tuple(linked and a != b for b in range(count)) for a in range(count))
    return msgspec.structs.replace(hardware, gpus=gpus, nvlink=matrix, p2p=matrix)
