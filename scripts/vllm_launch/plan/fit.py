"""Computes whether one split fits on certain GPUs or on the CPU, and the KV cache that it leaves. Pure."""

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
from vllm_launch.units import GIB, MIB, gib

USEFUL_REQUESTS = 16
USEFUL_TOKENS = 2048
"""A KV cache is useful if it holds 16 requests of 2,048 tokens and also one request of the full ``max_model_len``.
Without the latter vLLM refuses to start. With fewer requests a GPU spends its time reading weights. Then one more GPU
in the replica serves more requests than a separate replica on that GPU."""

CPU_SHARE = 0.5
"""Largest share of the memory left beside the weights that the plan gives to the KV cache on a CPU, if the user sets no
size. Other programs use the rest, and so does the page cache, through which the weights are read."""

WATERMARK = 0.02
"""Share of the KV cache that must stay free when vLLM admits a request to the batch. vLLM's default is 0. Running
requests grow into this share. Without free blocks vLLM preempts a request and recomputes its tokens. A larger share
hardly helps large caches, and small caches would admit fewer requests.
Source: benchmarks/gpu/scheduling.py, v1/core/kv_cache_manager.py."""


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A split that fits.

    ``kv_cache`` is per replica, ``memory`` is of the GPU with the least memory left, ``kv_bytes`` is per GPU.
    """

    placement: Placement
    gpus: tuple[Gpu, ...]  # of all replicas; empty on the CPU engine
    memory: Memory
    utilization: float
    safe_utilization: float  # the largest that leaves enough memory on every rank; 0.0 on the CPU engine
    kv_bytes: int
    kv_cache: KvCache
    useful: bool
    enough_gpus: int | None = None  # per replica, if the replica also got spare GPUs; else None

    @property
    def layout(self) -> Layout:
        """Return how the model is split."""
        return self.placement.layout

    @property
    def run_config(self) -> RunConfig:
        """Return how vLLM runs."""
        return self.placement.run_config

    @property
    def tokens(self) -> int:
        """Return the KV tokens of all replicas together."""
        return self.kv_cache.tokens * self.layout.data


class NoFit(msgspec.Struct, frozen=True, kw_only=True):
    """A split that does not fit or is rejected, and why.

    ``missing`` is the number of bytes that a GPU lacks, or None if memory is not the reason.
    """

    layout: Layout
    why: str
    missing: int | None = None
    longest: int = 0  # tokens of the longest request that would fit


def watermark_of(request: PlanRequest, candidate: Candidate) -> float:
    """Return the user's watermark, or else WATERMARK if running requests can outgrow the KV cache, or else 0.

    Requests of pooling models do not grow, so they get 0. A KV cache that is not useful, or that cannot hold two of
    the longest requests, gets 0 too: the second of them, and every request behind it, would wait until nothing else
    runs (v1/core/sched/scheduler.py: a request that cannot be admitted blocks the queue).
    """
    if request.watermark is not None:
        return request.watermark
    longest, tokens = candidate.run_config.max_model_len, candidate.kv_cache.tokens
    can_outgrow = 2 * longest <= tokens < candidate.run_config.max_num_seqs * longest
    return WATERMARK if can_outgrow and candidate.useful and candidate.placement.model.task == "generate" else 0.0


def kv_cache_on_host(request: PlanRequest, candidate: Candidate) -> int:
    """Return the bytes of host memory for KV cache blocks that are offloaded from the GPU.

    Each replica has this memory, shared by its GPUs.
    Source: vllm/config/cache.py:kv_offloading_size.
    """
    return int(request.kv_offloading_size * GIB) * candidate.layout.data


def tightest(gpus: Sequence[Gpu]) -> Gpu:
    """Return the GPU with the least free memory."""
    return min(gpus, key=lambda gpu: (gpu.memory_free, gpu.memory_total))


def fit_on_gpus(
    request: PlanRequest, layout: Layout, gpus: Sequence[Gpu], model: Model, run: RunConfig
) -> Candidate | NoFit:
    """Return what ``layout`` holds on exactly ``gpus``, the GPUs of all its replicas, or why it does not fit."""
    problems = parallel.problems(model, run, layout, gpus)
    if problems:
        return NoFit(layout=layout, why="; ".join(problems))
    gpu = tightest(gpus)  # One utilisation applies to all GPUs, so this GPU decides.
    placement = Placement(model, run, layout, gpu)
    ranks = memory.memory_by_rank(placement)
    parts = memory.rank_with_least_room(ranks, run)
    safe = min(memory.safe_utilization(rank, run, gpu) for rank in ranks)  # one utilisation applies to all ranks
    utilization = request.gpu_memory_utilization or safe
    kv_bytes = memory.kv_bytes(parts, run, gpu, utilization)
    if refusal := _too_little_memory(request, layout, parts, gpu, kv_bytes):
        return refusal
    cache_bytes: kv.CacheBytes = [memory.kv_bytes(rank, run, gpu, utilization) for rank in ranks]
    if blocks_bytes := kv.override_bytes(placement):
        cache_bytes, kv_bytes = blocks_bytes, max(blocks_bytes)
    elif request.kv_cache_memory_bytes:
        cache_bytes = kv_bytes = request.kv_cache_memory_bytes
    result = _blocks_do_not_fit(placement, ranks, safe) or _with_cache(request, placement, cache_bytes)
    if isinstance(result, NoFit):
        return result
    placement, cache, useful = result
    blocks = _state_blocks(placement, cache)
    if blocks is not None and run.max_num_seqs > blocks:
        if request.max_num_seqs is not None or not blocks:
            why = f"max_num_seqs is {run.max_num_seqs}, but only {blocks} recurrent states fit, one per request"
            return NoFit(layout=layout, why=why)
        return fit_on_gpus(request, layout, gpus, model, msgspec.structs.replace(run, max_num_seqs=blocks))
    return Candidate(
        placement=placement,
        gpus=tuple(gpus),
        memory=parts,
        utilization=utilization,
        safe_utilization=safe,
        kv_bytes=kv_bytes,
        kv_cache=cache,
        useful=useful,
    )


def _blocks_do_not_fit(placement: Placement, ranks: Sequence[Memory], safe: float) -> NoFit | None:
    """Return why the user's number of blocks does not fit, or None. vLLM does not check it before it allocates."""
    run, gpu = placement.run_config, placement.gpu
    needed = kv.override_bytes(placement)
    if not needed or gpu is None:
        return None
    missing = max(size - memory.kv_bytes(rank, run, gpu, safe) for size, rank in zip(needed, ranks, strict=True))
    if missing <= 0:
        return None
    why = f"GPU {gpu.index} lacks {gib(missing)} of memory for {run.num_gpu_blocks_override:,} KV cache blocks"
    return NoFit(layout=placement.layout, why=why, missing=missing)


def _too_little_memory(request: PlanRequest, layout: Layout, parts: Memory, gpu: Gpu, kv_bytes: int) -> NoFit | None:
    """Return why vLLM would stop before it allocates a KV cache, or None.

    ``kv_bytes`` is the memory that vLLM's profiling leaves for the KV cache.
    """
    missing, purpose, available = -kv_bytes, "even without a KV cache", gpu.memory_free
    if request.gpu_memory_utilization is not None:
        share = memory.requested_bytes(gpu, request.gpu_memory_utilization)
        free = gpu.memory_free - parts.context
        if share > free:  # v1/worker/utils.py:request_memory raises
            purpose = f"for gpu_memory_utilization {request.gpu_memory_utilization}, with {gib(free)} free"
            why = f"GPU {gpu.index} lacks {gib(share - free)} of memory {purpose}"
            return NoFit(layout=layout, why=why, missing=share - free)
        available = share
        if request.kv_cache_memory_bytes:
            return None  # vLLM uses both values without a check
    elif request.kv_cache_memory_bytes:
        missing = request.kv_cache_memory_bytes - kv_bytes
        purpose = f"for a KV cache of {gib(request.kv_cache_memory_bytes)}"
    if missing < 0 or (missing == 0 and request.kv_cache_memory_bytes):
        return None
    needs = _needs(parts, available - kv_bytes, margin=request.gpu_memory_utilization is None)
    why = f"GPU {gpu.index} lacks {gib(max(missing, 1))} of memory {purpose} ({needs}; available: {gib(available)})"
    return NoFit(layout=layout, why=why, missing=max(missing, 1))


def _needs(parts: Memory, needed: int, *, margin: bool) -> str:
    """Return what the ``needed`` bytes of a GPU are for. ``margin``: whether they include the safety margin."""
    named = {"weights": parts.weights, "activations": parts.activation_peak}
    named |= {"encoder": parts.encoder} if parts.encoder else {}
    named |= {"safety margin": parts.safety} if margin else {}
    named |= {"other": needed - sum(named.values())}
    return ", ".join(f"{name} {gib(size)}" for name, size in named.items())


def fit_on_cpu(request: PlanRequest, layout: Layout, cpu: Cpu, model: Model, run: RunConfig) -> Candidate | NoFit:
    """Return what ``layout`` holds on the CPU engine, or why it does not fit.

    vLLM runs one worker for each tensor-parallel rank and binds it to a NUMA node. If the user sets no size, the KV
    cache holds ``max_num_seqs`` requests of 2,048 tokens and one request of ``max_model_len``, or as much as
    ``CPU_SHARE`` of the memory allows. A larger KV cache would only take memory from other programs.
    """
    problems = parallel.problems(model, run, layout, ())
    if problems:
        return NoFit(layout=layout, why="; ".join(problems))
    placement = Placement(model, run, layout)
    worker_bytes = memory.cpu_memory(placement)
    # A worker is bound to one NUMA node, and one of the nodes may be small.
    nodes = [node.memory_available or node.memory_total for node in cpu.numa_nodes]
    left = min(cpu.memory_available // layout.gpus, *nodes, cpu.memory_available) - worker_bytes
    if left <= 0:
        why = f"a worker lacks {gib(max(-left, 1))} of memory even without a KV cache (it needs {gib(worker_bytes)})"
        return NoFit(layout=layout, why=why, missing=max(-left, 1))
    blocks_bytes = kv.override_bytes(placement)
    set_bytes = max(blocks_bytes, default=0) or request.cpu_kv_cache_bytes or request.kv_cache_memory_bytes
    if request.gpu_memory_utilization is not None and not set_bytes:
        set_bytes = max(1, _cpu_share(cpu, request.gpu_memory_utilization) - worker_bytes)
    if set_bytes and (missing := set_bytes - left) > 0:
        why = f"a worker lacks {gib(missing)} of memory for a KV cache of {gib(set_bytes)}"
        return NoFit(layout=layout, why=why, missing=missing)
    kv_bytes = set_bytes or int(left * CPU_SHARE)
    result = _with_cache(request, placement, kv_bytes)
    if isinstance(result, NoFit):
        return result
    placement, cache, useful = result
    if not set_bytes:
        needed = cpu_cache_bytes(placement) // layout.gpus_per_replica
        kv_bytes = min(kv_bytes, -(-needed // MIB) * MIB)
        cache = kv.kv_cache(placement, kv_bytes)
    weight_bytes = weights(placement)
    parts = Memory(
        weights=weight_bytes,
        activation_peak=0,
        cuda_graphs=0,
        non_torch=worker_bytes - weight_bytes,
        context=0,
        safety=left - kv_bytes,
    )
    return Candidate(
        placement=placement,
        gpus=(),
        memory=parts,
        utilization=request.gpu_memory_utilization or 0.0,
        safe_utilization=0.0,
        kv_bytes=kv_bytes,
        kv_cache=cache,
        useful=useful,
    )


def cpu_cache_bytes(placement: Placement) -> int:
    """Return the bytes of the largest KV cache that the plan chooses on a CPU (``fit_on_cpu``), for all workers."""
    run = placement.run_config
    usual = kv.bytes_per_request(placement, min(USEFUL_TOKENS, run.max_model_len))
    return kv.bytes_per_request(placement, run.max_model_len) + run.max_num_seqs * usual


def _cpu_share(cpu: Cpu, utilization: float) -> int:
    """Return the bytes that a worker may use: ``utilization`` of its NUMA node (v1/worker/cpu_worker.py)."""
    limit = min(cpu.memory_total, cpu.memory_limit or cpu.memory_total)
    return math.ceil(min([limit, *(node.memory_total for node in cpu.numa_nodes)]) * utilization)


def _with_cache(
    request: PlanRequest, placement: Placement, cache_bytes: kv.CacheBytes
) -> tuple[Placement, KvCache, bool] | NoFit:
    """Return ``placement`` with a length that fits, the KV cache, and whether it is useful.

    If no length fits, return why. ``cache_bytes`` are the bytes for the KV cache.
    """
    model, run, layout = placement.model, placement.run_config, placement.layout
    longest = kv.longest_that_fits(placement, cache_bytes)
    if longest < run.max_model_len:
        if request.length is not None or longest < min(USEFUL_TOKENS, run.max_model_len):
            needed = kv.bytes_per_request(placement, run.max_model_len)
            left = cache_bytes if isinstance(cache_bytes, int) else min(cache_bytes)
            missing = max(needed // layout.gpus_per_replica - left, 1)
            fits = f"the longest that fits: {longest:,}" if longest else "no request fits"
            what = f"a request of {run.max_model_len:,} tokens ({fits})"
            why = f"the KV cache lacks {gib(missing)} for {what}"
            return NoFit(layout=layout, why=why, missing=missing, longest=longest)
        run = msgspec.structs.replace(run, max_model_len=longest)
        placement = Placement(model, run, layout, placement.gpu)
    cache = kv.kv_cache(placement, cache_bytes)
    full_length = run.max_model_len == (request.length or model.max_model_len)
    requests = kv.requests_that_fit(placement, cache, min(USEFUL_TOKENS, run.max_model_len))
    return placement, cache, not cache.bytes_per_token or (full_length and requests >= USEFUL_REQUESTS)


def _state_blocks(placement: Placement, cache: KvCache) -> int | None:
    """Return the number of blocks that can hold recurrent states, or None if that number is no limit.

    With full CUDA graphs vLLM refuses a ``max_num_seqs`` above it (config/compilation.py, "exceeds available Mamba
    cache blocks").
    """
    if placement.run_config.cudagraph_mode in {"NONE", "PIECEWISE"} or not any(
        layer.state_shapes for layer in placement.model.layers
    ):
        return None
    return cache.bytes // (sum(kv.grouping_of(placement).block_bytes) * placement.layout.tensor)
