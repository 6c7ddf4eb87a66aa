"""Where a GPU's memory goes when vLLM runs a model: bytes, by physics. Pure; vLLM 0.32.0 is the authority."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from vllm_launch.machine.generation import Generation
from vllm_launch.machine.gpus import Gpu
from vllm_launch.sizing import kv
from vllm_launch.sizing.activations import activation_peak, attention_peak, timing_peak, workspace
from vllm_launch.sizing.cuda_graphs import cuda_graphs
from vllm_launch.sizing.parallel import padded_vocab
from vllm_launch.sizing.placement import Placement
from vllm_launch.sizing.run_config import RunConfig
from vllm_launch.sizing.weights import by_rank
from vllm_launch.units import MIB

CONTEXT_HOPPER, CONTEXT_A100, CONTEXT_SMALL = 522 * MIB, 460 * MIB, 260 * MIB
"""CUDA context and cuBLAS handles before vLLM's first look; it grows with the number of multiprocessors. H200: total
139.80, free 139.29 GiB (2026-11-22); small: 15.55 and 15.32 GiB in vLLM's issues; A100 is in between, by size."""

CONTEXTS = {
    Generation.A100: CONTEXT_A100,
    **dict.fromkeys((Generation.HOPPER, Generation.BLACKWELL, Generation.THOR, Generation.NEWER), CONTEXT_HOPPER),
}
"""What a context takes by generation; CONTEXT_SMALL on all others."""

NCCL_CONTEXT = 123 * MIB
"""NCCL and custom all-reduce before vLLM's first look, on each of several GPUs that share layers. H200, TP=2: 0.63 GiB,
context included; H100, TP=2 without multicast, 2026-11-27: 0.561; PP=2, 2026-11-26: 0.515 as on one GPU, since stages
open their channels later. The most counts: too little would be an out-of-memory, too much is 0.1 % of a cache."""

RUNTIME = 270 * MIB
"""CUDA modules and input buffers that vLLM's profile sees. H200, 2026-11-22: 0.26 to 0.29 GiB on four models after
the sampler's state and the expert workspace are taken off."""

COLLECTIVES = 768 * MIB
"""NCCL channels and symmetric memory that open with the first collective. H200, TP=2, Llama-3-70B, 2026-11-22:
2.05 GiB consumed besides weights, less the sampler's state, RUNTIME and the fused all-reduce's 512 MiB."""

FUSED_ALL_REDUCE: dict[tuple[int, int], dict[int, float]] = {
    (9, 0): {2: 64, 4: 2, 8: 0.5},
    (10, 0): {2: 64, 4: 32, 8: 1},
}
"""MiB of a message of FlashInfer's fused all-reduce, by capability and TP (compilation/passes/fusion/
allreduce_rms_fusion.py: FI_ALLREDUCE_FUSION_MAX_SIZE_MB); its workspace holds four of them for each rank."""

PIPELINE_CHANNELS = 256 * MIB
"""NCCL's send and receive channels between pipeline stages, which the profile does not open."""

FLASHINFER_WORKSPACE, FLASHINFER_BYTES = 394 * MIB, 16
"""Of FlashInfer's attention: at least, and for each element of a batch's queries (v1/attention/backends/flashinfer.py,
VLLM_FLASHINFER_WORKSPACE_BUFFER_SIZE and FLASHINFER_PREFILL_WORKSPACE_BYTES_PER_ELEM)."""

SAMPLER_COPIES = 4
"""Float32 copies of the logits that sampling needs at once, which vLLM's profile does not run
(v1/worker/gpu/model_runner.py:_dummy_sampler_run). With top-k and top-p in all requests of a batch 3.5: the model's own
logits, which are half as wide, the processed ones, FlashInfer's masked ones and their probabilities
(v1/worker/gpu/sample/sampler.py:sample, v1/sample/ops/topk_topp_sampler.py:flashinfer_sample); other ways need less.
H200, Llama-3-8B, 1,024 streams with top-k, top-p, penalties and logprobs: utilisation 0.985 holds, 0.99 runs out of
memory."""

FRAGMENTS = 256 * MIB
"""What PyTorch's allocator cannot hand out again while requests come and go."""

MAX_UTILIZATION = 0.99


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """Where the memory of one GPU goes besides the KV cache, in bytes.

    ``cuda_graphs`` is vLLM's estimate where it counts that (``RunConfig.estimate_cudagraphs``), else what they take.
    """

    weights: int
    activation_peak: int
    cuda_graphs: int
    non_torch: int
    context: int
    safety: int


def of_ranks(placement: Placement) -> tuple[Memory, ...]:
    """Where the memory of one GPU of each pipeline rank goes besides the KV cache.

    The first four are what vLLM counts against ``gpu_memory_utilization``: what ``memory_profiling`` calls consumed is
    ``weights + non_torch``, and ``cuda_graphs`` is its estimate, which is more than they take in the end; told not
    to, it counts none. Source: v1/worker/gpu_worker.py:determine_available_memory,
    utils/mem_utils.py.
    """
    graphs = [cuda_graphs(placement, count) for count in placement.layers_by_rank]
    sampler, attention = _sampler(placement), attention_peak(placement)
    beyond = _serving_overhead(placement)
    ranks = []
    for rank, held in enumerate(by_rank(placement)):
        first, last = rank == 0, rank == placement.layout.pipeline - 1
        forward = activation_peak(placement, first=first, last=last)
        ranks.append(
            Memory(
                weights=held,
                activation_peak=max(forward, timing_peak(placement) if first else 0),
                cuda_graphs=graphs[rank],
                non_torch=_non_torch(placement, first=first, last=last),
                context=_context(placement),
                safety=beyond + max(sampler, attention - forward),  # a pass' activations have ``forward`` already
            )
        )
    return tuple(ranks)


def of_gpu(placement: Placement) -> Memory:
    """Where the memory of one GPU goes besides the KV cache, on the pipeline rank that has the least left."""
    return rank_with_least_room(of_ranks(placement), placement.run_config)


def rank_with_least_room(ranks: Sequence[Memory], run: RunConfig) -> Memory:
    """The rank that leaves the least for the KV cache."""
    return max(ranks, key=lambda rank: _counted(rank, run))


def requested(gpu: Gpu, utilization: float) -> int:
    """Bytes that vLLM takes for itself (v1/worker/utils.py:request_memory)."""
    return math.ceil(gpu.memory_total * utilization)


def kv_bytes(memory: Memory, run: RunConfig, gpu: Gpu, utilization: float) -> int:
    """Bytes that vLLM's profiling leaves for the KV cache of one GPU; negative by what is missing."""
    return requested(gpu, utilization) - _counted(memory, run)


def safe_utilization(memory: Memory, run: RunConfig, gpu: Gpu) -> float:
    """The largest ``gpu_memory_utilization``, four decimals, that leaves of what is free all that vLLM does not count.

    At most 0.99; zero or less when nothing is left. vLLM's own check that so much is free at the start then passes.
    """
    graphs = 0 if run.estimate_cudagraphs else memory.cuda_graphs
    spare = gpu.memory_free - memory.context - memory.safety - graphs
    return min(MAX_UTILIZATION, math.floor(spare / gpu.memory_total * 10_000) / 10_000)


def cpu_memory(placement: Placement) -> int:
    """Bytes of host memory that one worker of the CPU engine takes besides the KV cache.

    Weights are loaded whole and never on a device; PyTorch, vLLM and the compiled model take about 1.5 GiB more.
    Source: vllm/v1/worker/cpu_worker.py:determine_available_memory (there it is the process's resident size).
    """
    peak = activation_peak(placement, first=True, last=True)
    return max(by_rank(placement)) + peak + 1536 * MIB


def _counted(memory: Memory, run: RunConfig) -> int:
    graphs = memory.cuda_graphs if run.estimate_cudagraphs else 0
    return memory.weights + memory.activation_peak + graphs + memory.non_torch


def _uses_collectives(placement: Placement) -> bool:
    """Whether collectives run in every layer: over a replica's GPUs, or over all replicas where they share experts."""
    layout = placement.layout
    return layout.tensor > 1 or (placement.model.experts is not None and layout.data > 1)


def _non_torch(placement: Placement, *, first: bool, last: bool) -> int:
    """What stays allocated besides weights: the sampler's state, the experts' workspace, CUDA modules, collectives.

    Source: v1/worker/gpu/sample/penalties.py (a count and two bits for each token of the vocabulary and request),
    logit_bias.py and bad_words.py (17.4 KB a request).
    """
    model, run, layout, gpu = placement.model, placement.run_config, placement.layout, placement.gpu
    total = RUNTIME
    if last and model.task == "generate":
        state = 4 * model.vocab_size + 2 * 4 * math.ceil(model.vocab_size / 32) + 17_400
        total += run.max_num_seqs * state
    total += workspace(placement)
    if _uses_collectives(placement):
        total += COLLECTIVES
    if layout.tensor > 1:
        message = run.max_num_batched_tokens * model.hidden_size * run.activation_bytes
        assert gpu is not None  # noqa: S101 - the CPU engine is computed by ``cpu_memory``
        limit = FUSED_ALL_REDUCE.get(gpu.compute_capability, {}).get(layout.tensor, 0)
        fused = run.fuse_allreduce_rms and not run.enforce_eager
        total += 4 * layout.tensor * min(round(limit * MIB), message) if fused else 0
    if not first:  # the hidden states and residual that arrive from the rank before
        total += 2 * run.max_num_batched_tokens * model.hidden_size * run.activation_bytes
    return total


def _context(placement: Placement) -> int:
    """The CUDA context of one GPU, and NCCL's where collectives run."""
    base = CONTEXTS.get(placement.generation or Generation.UNKNOWN, CONTEXT_SMALL)
    return base + (NCCL_CONTEXT if _uses_collectives(placement) else 0)


def _sampler(placement: Placement) -> int:
    """Copies of the logits that sampling makes while serving (``SAMPLER_COPIES``)."""
    model, run = placement.model, placement.run_config
    if model.task != "generate":
        return 0
    return SAMPLER_COPIES * 4 * min(run.max_num_seqs, run.max_num_batched_tokens) * padded_vocab(model.vocab_size)


def _serving_overhead(placement: Placement) -> int:
    """What serving takes beyond the profile in any case: block tables, fragments, channels, FlashInfer's workspace.

    Block tables are two rows of int32 per request and group of layers (v1/worker/gpu/block_table.py), allocated after
    the cache is sized; the row of a window is as long as any other.
    """
    run, layout = placement.run_config, placement.layout
    rows = sum(
        math.ceil(run.max_model_len / min(spec.block for spec in group)) for group in kv.grouping_of(placement).groups
    )
    tables = 2 * 4 * run.max_num_seqs * rows
    channels = PIPELINE_CHANNELS if layout.pipeline > 1 else 0
    return tables + FRAGMENTS + channels + _flashinfer(placement)


def _flashinfer(placement: Placement) -> int:
    """FlashInfer's workspace, which the first batch allocates and nobody frees; 0 where other kernels attend.

    vLLM takes FlashInfer first on data-centre Blackwell, where kernels of TensorRT-LLM need no more than the least, and
    on other GPUs but Hopper where FlashAttention does not read the cache (platforms/cuda.py:_get_backend_priorities).
    """
    model, run, layout = placement.model, placement.run_config, placement.layout
    if placement.generation is Generation.BLACKWELL:
        return FLASHINFER_WORKSPACE
    if placement.generation is Generation.HOPPER or model.mla or not kv.kv_dtype(model, run).startswith("fp8"):
        return 0
    queries = run.max_num_batched_tokens * (model.heads // layout.tensor) * model.head_dim
    return max(FLASHINFER_WORKSPACE, queries * FLASHINFER_BYTES)
