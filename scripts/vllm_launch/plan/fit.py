"""Whether one split on certain GPUs, or the CPU, holds what was asked, and with what. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from vllm_launch.machine.gpus import Cpu, Gpu
from vllm_launch.model.model import Model
from vllm_launch.plan.request import PlanRequest
from vllm_launch.sizing import kv, memory, parallel
from vllm_launch.sizing.kv import KvCache
from vllm_launch.sizing.memory import Memory
from vllm_launch.sizing.parallel import Layout
from vllm_launch.sizing.placement import Placement
from vllm_launch.sizing.run_config import RunConfig
from vllm_launch.sizing.weights import weights
from vllm_launch.units import MIB, gib

USEFUL_REQUESTS = 16
USEFUL_TOKENS = 2048
"""A KV cache is useful when it holds one request of the whole ``max_model_len``, without which vLLM refuses to start,
and 16 requests of 2,048 tokens. With fewer streams than that a GPU spends its time reading weights, and one more GPU
in the replica serves more than a replica of its own on that GPU."""

CPU_SHARE = 0.5
"""Of the memory that weights leave on a CPU, the most that the cache takes unasked: the rest is the page cache's, which
the weights are read through, and that of other programs."""

WATERMARK = 0.02
"""Of the KV cache, what is kept free where a request is let into the batch; vLLM's default is nothing. Running requests
grow into it: with no room left one is preempted, and its tokens are computed again. More gives large caches little, and
costs small ones some of their few requests. Source: benchmarks/gpu/scheduling.py, v1/core/kv_cache_manager.py."""


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A split that holds. ``kv_cache`` is per replica, ``memory`` of the tightest GPU, ``kv_bytes`` on each GPU."""

    placement: Placement
    gpus: tuple[Gpu, ...]  # of all replicas; none on the CPU engine
    memory: Memory
    utilization: float
    safe_utilization: float  # the largest that leaves every rank its room; 0.0 on the CPU engine
    kv_bytes: int
    kv_cache: KvCache
    useful: bool

    @property
    def layout(self) -> Layout:
        """How it is split."""
        return self.placement.layout

    @property
    def run_config(self) -> RunConfig:
        """How vLLM is run."""
        return self.placement.run_config

    @property
    def tokens(self) -> int:
        """KV tokens of all replicas together."""
        return self.kv_cache.tokens * self.layout.data


class NoFit(msgspec.Struct, frozen=True, kw_only=True):
    """Why a split cannot be, or is not taken. ``missing`` is by how many bytes a GPU is too small, if that is why."""

    layout: Layout
    why: str
    missing: int | None = None
    longest: int = 0  # tokens of the longest request that would fit


def watermark_of(request: PlanRequest, found: Candidate) -> float:
    """What was asked, else WATERMARK where requests can outgrow the cache; 0 where not, as in models that pool.

    And 0 in a cache that is not useful, or does not hold two of the longest: one of them would have to wait until
    nothing else runs, and those behind it with it (v1/core/sched/scheduler.py: whoever is not let in ends the turn).
    """
    if request.watermark is not None:
        return request.watermark
    longest, tokens = found.run_config.max_model_len, found.kv_cache.tokens
    outgrown = 2 * longest <= tokens < found.run_config.max_num_seqs * longest
    return WATERMARK if outgrown and found.useful and found.placement.model.task == "generate" else 0.0


def tightest(gpus: Sequence[Gpu]) -> Gpu:
    """The GPU with the least free memory."""
    return min(gpus, key=lambda gpu: (gpu.memory_free, gpu.memory_total))


def on_gpus(
    request: PlanRequest, layout: Layout, gpus: Sequence[Gpu], model: Model, run: RunConfig
) -> Candidate | NoFit:
    """Work ``layout`` out on exactly ``gpus``, those of all its replicas."""
    problems = parallel.problems(model, run, layout, gpus)
    if problems:
        return NoFit(layout=layout, why="; ".join(problems))
    gpu = tightest(gpus)  # one utilisation holds for all, so it decides
    placement = Placement(model, run, layout, gpu)
    ranks = memory.of_ranks(placement)
    parts = memory.rank_with_least_room(ranks, run)
    safe = min(memory.safe_utilization(rank, run, gpu) for rank in ranks)  # one holds for all, whoever leaves the least
    utilization = request.gpu_memory_utilization or safe
    left = memory.kv_bytes(parts, run, gpu, utilization)
    if refusal := _refusal(request, layout, parts, gpu, left):
        return refusal
    room: kv.Room = [memory.kv_bytes(rank, run, gpu, utilization) for rank in ranks]
    if request.kv_cache_memory_bytes:
        room = left = request.kv_cache_memory_bytes
    found = _with_cache(request, placement, room)
    if isinstance(found, NoFit):
        return found
    placement, cache, useful = found
    blocks = _state_blocks(placement, cache)
    if blocks is not None and run.max_num_seqs > blocks:
        if request.max_num_seqs is not None or not blocks:
            why = f"max_num_seqs {run.max_num_seqs} is more than the {blocks} recurrent states that fit"
            return NoFit(layout=layout, why=why)
        return on_gpus(request, layout, gpus, model, msgspec.structs.replace(run, max_num_seqs=blocks))
    return Candidate(
        placement=placement,
        gpus=tuple(gpus),
        memory=parts,
        utilization=utilization,
        safe_utilization=safe,
        kv_bytes=left,
        kv_cache=cache,
        useful=useful,
    )


def _refusal(request: PlanRequest, layout: Layout, parts: Memory, gpu: Gpu, left: int) -> NoFit | None:
    """Why vLLM would not get as far as a KV cache; ``left`` bytes are what its profiling leaves for one."""
    over, why = -left, "before any KV cache"
    if request.gpu_memory_utilization is not None:
        share = memory.requested(gpu, request.gpu_memory_utilization)
        free = gpu.memory_free - parts.context
        if share > free:  # v1/worker/utils.py:request_memory raises
            over, why = (
                share - free,
                f"to gpu_memory_utilization {request.gpu_memory_utilization}, with {gib(free)} free",
            )
        elif request.kv_cache_memory_bytes:
            return None  # vLLM takes both as they are given
    elif request.kv_cache_memory_bytes:
        over, why = request.kv_cache_memory_bytes - left, f"to a KV cache of {gib(request.kv_cache_memory_bytes)}"
    if over < 0 or (over == 0 and request.kv_cache_memory_bytes):
        return None
    needs = f"weights {gib(parts.weights)}, activations {gib(parts.activation_peak)}"
    why = f"{gib(max(over, 1))} of GPU {gpu.index}'s memory are missing {why} ({needs})"
    return NoFit(layout=layout, why=why, missing=max(over, 1))


def on_cpu(request: PlanRequest, layout: Layout, cpu: Cpu, model: Model, run: RunConfig) -> Candidate | NoFit:
    """Work ``layout`` out on the CPU engine, one worker for each tensor-parallel rank (vLLM binds them to NUMA nodes).

    Unasked, the cache holds ``max_num_seqs`` requests of 2,048 tokens and one of ``max_model_len``, or as many as
    ``CPU_SHARE`` of the memory allows: a larger one would only be taken from other programs.
    """
    problems = parallel.problems(model, run, layout, ())
    if problems:
        return NoFit(layout=layout, why="; ".join(problems))
    placement = Placement(model, run, layout)
    taken = memory.cpu_memory(placement)
    # A worker is bound to one node, and one of them may be small.
    nodes = [node.memory_available or node.memory_total for node in cpu.numa_nodes]
    left = min(cpu.memory_available // layout.gpus, *nodes, cpu.memory_available) - taken
    if left <= 0:
        why = f"{gib(max(-left, 1))} of memory are missing before any KV cache (one worker takes {gib(taken)})"
        return NoFit(layout=layout, why=why, missing=max(-left, 1))
    set_bytes = request.cpu_kv_cache_bytes or request.kv_cache_memory_bytes
    if request.gpu_memory_utilization is not None and not set_bytes:
        set_bytes = max(1, _cpu_share(cpu, request.gpu_memory_utilization) - taken)
    if set_bytes and (over := set_bytes - left) > 0:
        why = f"{gib(over)} of memory are missing to a KV cache of {gib(set_bytes)}"
        return NoFit(layout=layout, why=why, missing=over)
    most = set_bytes or int(left * CPU_SHARE)
    found = _with_cache(request, placement, most)
    if isinstance(found, NoFit):
        return found
    placement, cache, useful = found
    if not set_bytes:
        run = placement.run_config
        wanted = run.max_model_len + run.max_num_seqs * min(USEFUL_TOKENS, run.max_model_len)
        each = wanted * cache.bytes_per_token // layout.gpus_per_replica
        most = min(most, -(-each // MIB) * MIB)
        cache = kv.kv_cache(placement, most)
    held = weights(placement)
    parts = Memory(
        weights=held, activation_peak=0, cuda_graphs=0, non_torch=taken - held, context=0, safety=left - most
    )
    return Candidate(
        placement=placement,
        gpus=(),
        memory=parts,
        utilization=request.gpu_memory_utilization or 0.0,
        safe_utilization=0.0,
        kv_bytes=most,
        kv_cache=cache,
        useful=useful,
    )


def _cpu_share(cpu: Cpu, utilization: float) -> int:
    """Bytes that a worker may take where the person says which share: of its node (v1/worker/cpu_worker.py)."""
    limit = min(cpu.memory_total, cpu.memory_limit or cpu.memory_total)
    return math.ceil(min([limit, *(node.memory_total for node in cpu.numa_nodes)]) * utilization)


def _with_cache(request: PlanRequest, placement: Placement, room: kv.Room) -> tuple[Placement, KvCache, bool] | NoFit:
    """What ``room`` for the cache holds: ``placement`` with a length that fits, the cache, and whether it is useful."""
    model, run, layout = placement.model, placement.run_config, placement.layout
    longest = kv.longest_that_fits(placement, room)
    if longest < run.max_model_len:
        if request.length is not None or longest < min(USEFUL_TOKENS, run.max_model_len):
            needed = kv.bytes_per_request(placement, run.max_model_len)
            left = room if isinstance(room, int) else min(room)
            missing = max(needed // layout.gpus_per_replica - left, 1)
            what = f"a request of {run.max_model_len:,} tokens; {longest:,} would fit"
            return NoFit(layout=layout, why=f"{gib(missing)} are missing to {what}", missing=missing, longest=longest)
        run = msgspec.structs.replace(run, max_model_len=longest)
        placement = Placement(model, run, layout, placement.gpu)
    cache = kv.kv_cache(placement, room)
    whole = run.max_model_len == (request.length or model.max_model_len)
    enough = cache.tokens >= USEFUL_REQUESTS * min(USEFUL_TOKENS, run.max_model_len)
    return placement, cache, not cache.bytes_per_token or (whole and enough)


def _state_blocks(placement: Placement, cache: KvCache) -> int | None:
    """Blocks of the pool where requests keep recurrent states; None where none does, or where it does not matter.

    With full CUDA graphs vLLM refuses more requests than blocks (config/compilation.py, "exceeds available Mamba
    cache blocks").
    """
    if placement.run_config.enforce_eager or not any(layer.state_shapes for layer in placement.model.layers):
        return None
    return cache.bytes // (sum(kv.grouping_of(placement).block_bytes) * placement.layout.tensor)
