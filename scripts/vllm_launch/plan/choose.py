"""Chooses among groups of GPUs and splits of a model over them. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from vllm_launch.machine.gpus import Gpu, Hardware, alike
from vllm_launch.model.model import Model
from vllm_launch.plan import explain
from vllm_launch.plan.fit import Candidate, NoFit, fit_on_gpus
from vllm_launch.plan.request import PlanRequest, batch_of, run_of
from vllm_launch.sizing.parallel import Layout, problems
from vllm_launch.sizing.run_config import RunConfig, default_batch

SMALLER_BATCHES = ((2048, 256), (2048, 64), (512, 16))
"""(max_num_batched_tokens, max_num_seqs) to try in this order if vLLM's defaults leave too little memory for the KV
cache: both options cost memory."""

FREE_MEMORY_STEPS = 50
"""Free memory is compared in steps of 1/50 of a GPU's memory. GPUs in the same step count as equal. Otherwise the
memory of a desktop session or a monitoring agent would change the order of the GPUs."""


def choose(
    request: PlanRequest, hardware: Hardware, gpus: Sequence[Gpu], model: Model
) -> tuple[Candidate | None, list[NoFit]]:
    """Return the best candidate of all groups and the splits that were rejected before it.

    The candidate is None if no split fits.
    """
    candidates: list[tuple[Candidate, list[NoFit]]] = []
    no_fits: list[NoFit] = []
    for group in _groups(request, hardware, gpus):
        candidate, group_no_fits = _best_split(request, hardware, group, model)
        if candidate is None:
            no_fits += group_no_fits
        else:
            candidates.append((candidate, group_no_fits))
    if not candidates:
        return None, no_fits
    return max(candidates, key=lambda pair: (pair[0].useful, pair[0].tokens))


def _groups(request: PlanRequest, hardware: Hardware, gpus: Sequence[Gpu]) -> list[tuple[Gpu, ...]]:
    """Return the sets of GPUs that one vLLM instance may use.

    All GPUs of a vLLM instance have the same ``gpu_memory_utilization`` and the same number of KV cache blocks. So
    different kinds of GPUs are mixed only if the request needs more GPUs than there are of one kind. A process sees at
    most one MIG slice (NVIDIA MIG User Guide, "CUDA device enumeration"), so each slice is its own group.
    """
    if any(gpu.mig_profile for gpu in gpus):
        return [(gpu,) for gpu in gpus]
    groups = [_ordered(hardware, group) for group in alike(tuple(gpus))]
    return groups if request.gpus_needed <= max(map(len, groups)) else [_ordered(hardware, gpus)]


def _ordered(hardware: Hardware, gpus: Sequence[Gpu]) -> tuple[Gpu, ...]:
    """Return ``gpus`` with the emptiest first. GPUs joined by NVLink are adjacent, so that one replica gets them."""
    steps = dict(zip((gpu.uuid for gpu in gpus), _steps_below_emptiest(gpus), strict=True))
    remaining = sorted(gpus, key=lambda gpu: (steps[gpu.uuid], gpu.index))
    ordered: list[Gpu] = []
    while remaining:
        joined = [gpu for gpu in remaining if gpu == remaining[0] or _linked(hardware, (remaining[0], gpu))]
        ordered += joined
        remaining = [gpu for gpu in remaining if gpu not in joined]
    return tuple(ordered)


def _steps_below_emptiest(gpus: Sequence[Gpu]) -> list[int]:
    """Return how much less free memory each GPU has than the emptiest, in FREE_MEMORY_STEPS, rounded down."""
    most_free = max(gpu.memory_free for gpu in gpus)
    return [(most_free - gpu.memory_free) * FREE_MEMORY_STEPS // gpu.memory_total for gpu in gpus]


def _linked(hardware: Hardware, gpus: Sequence[Gpu]) -> bool:
    """Whether NVLink joins every pair of ``gpus``. A single GPU counts as linked."""
    if not hardware.nvlink:
        return len(gpus) == 1
    rows = [hardware.gpus.index(gpu) for gpu in gpus]
    return all(a == b or hardware.nvlink[a][b] for a in rows for b in rows)


def _layouts(request: PlanRequest, hardware: Hardware, group: Sequence[Gpu]) -> Iterator[Layout]:
    """Yield splits of one replica over ``group``, the best for the objective first.

    ``data`` of each layout is the number of replicas: the user's number, or as many as fit into the group. Over PCIe a
    pipeline moves far less data than tensor parallelism. So for GPUs without NVLink, vLLM's documentation recommends a
    pipeline ("Parallelism and Scaling"). For the objective latency, the split with the fewest stages comes first, and
    of these the one with the most tensor parallelism.
    """
    largest = len(group) // (request.data_parallel_size or 1)
    tensor_sizes = [request.tensor_parallel_size] if request.tensor_parallel_size else range(1, largest + 1)
    pipeline_sizes = [request.pipeline_parallel_size] if request.pipeline_parallel_size else range(1, largest + 1)
    splits = [
        (tensor, pipeline) for tensor in tensor_sizes for pipeline in pipeline_sizes if tensor * pipeline <= largest
    ]
    if request.objective == "latency":
        splits.sort(key=lambda split: (split[1], -split[0]))
    else:
        joined = {size: _linked(hardware, group[:size]) for size in {tensor * pipe for tensor, pipe in splits}}
        splits.sort(key=lambda split: (split[0] * split[1], split[1] if joined[split[0] * split[1]] else split[0]))
    for tensor, pipeline in splits:
        data = request.data_parallel_size or len(group) // (tensor * pipeline)
        yield Layout(tensor=tensor, pipeline=pipeline, data=data, expert_parallel=bool(request.enable_expert_parallel))


def _best_split(
    request: PlanRequest, hardware: Hardware, group: Sequence[Gpu], model: Model
) -> tuple[Candidate | None, list[NoFit]]:
    """Return the first useful split on ``group`` and the splits that were rejected before it.

    If no split has a useful KV cache (decision 5), return the one with the largest ``max_model_len``. If no split fits,
    return None. vLLM's own batch comes first. Smaller batches are tried if no split is useful with it.
    """
    batches = [batch_of(request, model, batch) for batch in (default_batch(group[0]), *SMALLER_BATCHES)]
    oldest = min(gpu.generation for gpu in group)
    fallback: Candidate | None = None
    first_no_fits: list[NoFit] = []
    for batch in dict.fromkeys(batch for batch in batches if max(batch) <= max(batches[0])):
        run = run_of(request, model, batch, oldest)
        no_fits: list[NoFit] = []
        for layout in _layouts(request, hardware, group):
            result = _with_best_replica_count(request, layout, group, model, run)
            if isinstance(result, NoFit):
                no_fits.append(result)
            elif result.useful:
                return _with_spare_gpus(request, hardware, group, model, result), no_fits
            else:
                no_fits.append(
                    NoFit(
                        layout=result.layout,
                        why=explain.why_not_useful(result),
                        longest=result.run_config.max_model_len,
                    )
                )
                if fallback is None or result.run_config.max_model_len > fallback.run_config.max_model_len:
                    fallback = result
        first_no_fits = first_no_fits or no_fits
    if fallback is None:
        return None, first_no_fits
    return fallback, [no_fit for no_fit in first_no_fits if no_fit.layout != fallback.layout]


def _with_spare_gpus(
    request: PlanRequest, hardware: Hardware, group: Sequence[Gpu], model: Model, candidate: Candidate
) -> Candidate:
    """Return ``candidate``, or a larger candidate if GPUs would stay unused, such as 1 of 4.

    The larger candidate has the same number of replicas and more GPUs in each replica.
    """
    replicas, gpus_per_replica = candidate.layout.data, candidate.layout.gpus_per_replica
    # latency: more stages only add latency. throughput: the user set fewer replicas, or the other GPUs have too little
    # free memory.
    if request.objective == "latency" or replicas < len(group) // gpus_per_replica:
        return candidate
    for size in range(len(group) // replicas, gpus_per_replica, -1):
        for layout in _layouts(request, hardware, group):
            if (layout.gpus_per_replica, layout.data) == (size, replicas):
                larger = _with_best_replica_count(request, layout, group, model, candidate.run_config)
                if isinstance(larger, Candidate) and larger.tokens > candidate.tokens:
                    return msgspec.structs.replace(larger, enough_gpus=gpus_per_replica)
    return candidate


def _with_best_replica_count(
    request: PlanRequest, layout: Layout, group: Sequence[Gpu], model: Model, run: RunConfig
) -> Candidate | NoFit:
    """Return ``layout`` with the number of replicas that gives the most KV tokens.

    A GPU with little free memory lowers the KV cache of all replicas. If the experts' intermediate size cannot be
    split, use expert parallelism (each GPU holds whole experts), unless the user set enable_expert_parallel.
    """
    if model.experts and request.enable_expert_parallel is None and problems(model, run, layout, group):
        whole_experts = msgspec.structs.replace(layout, expert_parallel=True)
        layout = layout if problems(model, run, whole_experts, group) else whole_experts
    gpus_per_replica = layout.gpus_per_replica
    best = fit_on_gpus(request, layout, group[: gpus_per_replica * layout.data], model, run)
    if request.data_parallel_size or not any(_steps_below_emptiest(group[: gpus_per_replica * layout.data])):
        return best
    for data in range(layout.data - 1, 0, -1):
        fewer = msgspec.structs.replace(layout, data=data)
        result = fit_on_gpus(request, fewer, group[: gpus_per_replica * data], model, run)
        if isinstance(result, Candidate) and (
            isinstance(best, NoFit) or (result.useful, result.tokens) > (best.useful, best.tokens)
        ):
            best = result
    return best
