"""Chooses among groups of GPUs and splits of a model over them. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from vllm_launch.machine.gpus import Gpu, Hardware, alike
from vllm_launch.model.model import Model
from vllm_launch.plan import explain
from vllm_launch.plan.fit import Candidate, NoFit, on_gpus
from vllm_launch.plan.request import PlanRequest, batch_of, run_of
from vllm_launch.sizing.parallel import Layout, problems
from vllm_launch.sizing.run_config import RunConfig, default_batch

SMALLER_BATCHES = ((2048, 256), (2048, 64), (512, 16))
"""(max_num_batched_tokens, max_num_seqs) to try in turn when vLLM's defaults leave no room: both cost memory."""

UNEVEN = 50
"""GPUs whose free memory differs by less than one part in so many of the whole are taken for equal: a desktop, or what
a monitoring agent holds, must not change which GPUs are neighbours."""


def choose(
    request: PlanRequest, hardware: Hardware, gpus: Sequence[Gpu], model: Model
) -> tuple[Candidate | None, list[NoFit]]:
    """The best of all groups, None where nothing holds, and what was considered before it."""
    kept: list[tuple[Candidate, list[NoFit]]] = []
    missed: list[NoFit] = []
    for group in _groups(request, hardware, gpus):
        found, misses = _best(request, hardware, group, model)
        if found is None:
            missed += misses
        else:
            kept.append((found, misses))
    if not kept:
        return None, missed
    return max(kept, key=lambda pair: (pair[0].useful, pair[0].tokens))


def _groups(request: PlanRequest, hardware: Hardware, gpus: Sequence[Gpu]) -> list[tuple[Gpu, ...]]:
    """Sets of GPUs that one vLLM may span.

    One utilisation and one number of blocks hold for every GPU of a vLLM, so unlike GPUs are mixed only where what was
    asked for needs more GPUs than there are alike. A process sees one MIG slice at most (NVIDIA MIG User Guide, "CUDA
    device enumeration"), so a slice is a group of its own.
    """
    if any(gpu.mig_profile for gpu in gpus):
        return [(gpu,) for gpu in gpus]
    groups = [_ordered(hardware, group) for group in alike(tuple(gpus))]
    needed = (
        (request.tensor_parallel_size or 1) * (request.pipeline_parallel_size or 1) * (request.data_parallel_size or 1)
    )
    return groups if needed <= max(map(len, groups)) else [_ordered(hardware, gpus)]


def _ordered(hardware: Hardware, gpus: Sequence[Gpu]) -> tuple[Gpu, ...]:
    """The emptiest first, and those that NVLink joins to each other side by side, so that a replica gets them."""
    taken = dict(zip((gpu.uuid for gpu in gpus), _taken(gpus), strict=True))
    rest = sorted(gpus, key=lambda gpu: (taken[gpu.uuid], gpu.index))
    ordered: list[Gpu] = []
    while rest:
        mates = [gpu for gpu in rest if gpu == rest[0] or _linked(hardware, (rest[0], gpu))]
        ordered += mates
        rest = [gpu for gpu in rest if gpu not in mates]
    return tuple(ordered)


def _taken(gpus: Sequence[Gpu]) -> list[int]:
    """How much less each GPU has free than the emptiest, in parts of 1 / UNEVEN of its memory, rounded down."""
    most = max(gpu.memory_free for gpu in gpus)
    return [(most - gpu.memory_free) * UNEVEN // gpu.memory_total for gpu in gpus]


def _linked(hardware: Hardware, gpus: Sequence[Gpu]) -> bool:
    """Whether NVLink joins every pair of ``gpus``; alone, a GPU is as good as linked."""
    if not hardware.nvlink:
        return len(gpus) == 1
    rows = [hardware.gpus.index(gpu) for gpu in gpus]
    return all(a == b or hardware.nvlink[a][b] for a in rows for b in rows)


def _layouts(request: PlanRequest, hardware: Hardware, group: Sequence[Gpu]) -> Iterator[Layout]:
    """Splits of one replica over ``group``, best first for the objective; ``data`` is how many replicas fit there.

    Over PCIe alone a pipeline moves far less than tensor parallelism does, which is what vLLM's documentation advises
    there ("Parallelism and Scaling", on GPUs without NVLink); for latency only tensor parallelism helps.
    """
    most = len(group) // (request.data_parallel_size or 1)
    tensors = [request.tensor_parallel_size] if request.tensor_parallel_size else range(1, most + 1)
    pipelines = [request.pipeline_parallel_size] if request.pipeline_parallel_size else range(1, most + 1)
    splits = [(tensor, pipeline) for tensor in tensors for pipeline in pipelines if tensor * pipeline <= most]
    if request.objective == "latency":
        splits.sort(key=lambda split: (split[1], -split[0]))
    else:
        joined = {size: _linked(hardware, group[:size]) for size in {tensor * pipe for tensor, pipe in splits}}
        splits.sort(key=lambda split: (split[0] * split[1], split[1] if joined[split[0] * split[1]] else split[0]))
    for tensor, pipeline in splits:
        data = request.data_parallel_size or len(group) // (tensor * pipeline)
        yield Layout(tensor=tensor, pipeline=pipeline, data=data, expert_parallel=bool(request.enable_expert_parallel))


def _best(
    request: PlanRequest, hardware: Hardware, group: Sequence[Gpu], model: Model
) -> tuple[Candidate | None, list[NoFit]]:
    """The first useful split on ``group``, else the one with the longest requests, else None; and what was passed over.

    vLLM's own batch comes first; smaller ones are tried when with it nothing is useful.
    """
    batches = [batch_of(request, model, batch) for batch in (default_batch(group[0]), *SMALLER_BATCHES)]
    oldest = min(gpu.generation for gpu in group)
    fallback: Candidate | None = None
    first: list[NoFit] = []
    for batch in dict.fromkeys(batch for batch in batches if max(batch) <= max(batches[0])):
        run = run_of(request, model, batch, oldest)
        misses: list[NoFit] = []
        for layout in _layouts(request, hardware, group):
            found = _spread(request, layout, group, model, run)
            if isinstance(found, NoFit):
                misses.append(found)
            elif found.useful:
                return _with_spare_gpus(request, hardware, group, model, found), misses
            else:
                misses.append(
                    NoFit(layout=found.layout, why=explain.too_small(found), longest=found.run_config.max_model_len)
                )
                if fallback is None or found.run_config.max_model_len > fallback.run_config.max_model_len:
                    fallback = found
        first = first or misses
    if fallback is None:
        return None, first
    return fallback, [miss for miss in first if miss.layout != fallback.layout]


def _with_spare_gpus(
    request: PlanRequest, hardware: Hardware, group: Sequence[Gpu], model: Model, found: Candidate
) -> Candidate:
    """``found``, or the same number of replicas with more GPUs each where some would be left over, such as 1 of 4."""
    replicas, each = found.layout.data, found.layout.gpus_per_replica
    if request.objective == "latency" or replicas < len(group) // each:
        return found  # more stages only add to the latency; or some GPUs are too full to help
    for size in range(len(group) // replicas, each, -1):
        for layout in _layouts(request, hardware, group):
            if (layout.gpus_per_replica, layout.data) == (size, replicas):
                larger = _spread(request, layout, group, model, found.run_config)
                if isinstance(larger, Candidate) and larger.tokens > found.tokens:
                    return larger
    return found


def _spread(
    request: PlanRequest, layout: Layout, group: Sequence[Gpu], model: Model, run: RunConfig
) -> Candidate | NoFit:
    """``layout`` with as many replicas as give the most tokens: a GPU that is half taken drags all of them down.

    Where the experts' width cannot be cut, whole experts can be spread (expert parallelism), unless that was asked for
    or denied.
    """
    if model.experts and request.enable_expert_parallel is None and problems(model, run, layout, group):
        whole = msgspec.structs.replace(layout, expert_parallel=True)
        layout = layout if problems(model, run, whole, group) else whole
    each = layout.gpus_per_replica
    best = on_gpus(request, layout, group[: each * layout.data], model, run)
    if request.data_parallel_size or not any(_taken(group[: each * layout.data])):
        return best
    for data in range(layout.data - 1, 0, -1):
        found = on_gpus(request, msgspec.structs.replace(layout, data=data), group[: each * data], model, run)
        if isinstance(found, Candidate) and (
            isinstance(best, NoFit) or (found.useful, found.tokens) > (best.useful, best.tokens)
        ):
            best = found
    return best
