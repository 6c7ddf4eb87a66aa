"""Computes how vLLM 0.32.0 uses the memory of a GPU, in bytes. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from vllm_launch.machine.generation import Generation
from vllm_launch.machine.gpus import Gpu
from vllm_launch.sizing.activations import activation_peak, timing_peak, workspace
from vllm_launch.sizing.cuda_graphs import cuda_graphs
from vllm_launch.sizing.encoder import encoder_memory, profiled_encoder
from vllm_launch.sizing.margin import margin_by_rank
from vllm_launch.sizing.placement import Placement
from vllm_launch.sizing.run_config import RunConfig
from vllm_launch.sizing.sparse import chosen_indices
from vllm_launch.sizing.weights import weights_by_rank
from vllm_launch.units import GIB, MIB

CONTEXT_HOPPER, CONTEXT_A100, CONTEXT_SMALL = 522 * MIB, 460 * MIB, 260 * MIB
"""Bytes of the CUDA context and cuBLAS handles before vLLM first measures memory. They grow with the number of
multiprocessors. Measured: H200, total 139.80 GiB, free 139.29 GiB (2026-11-22). Small GPU: 15.55 and 15.32 GiB in
vLLM's issues. A100: interpolated by its size."""

CONTEXTS = {
    Generation.A100: CONTEXT_A100,
    **dict.fromkeys((Generation.HOPPER, Generation.BLACKWELL, Generation.THOR, Generation.NEWER), CONTEXT_HOPPER),
}
"""Bytes of a CUDA context by generation. All other generations use CONTEXT_SMALL."""

CONTEXT_UNIFIED = 3 * GIB
"""Bytes of unified memory that are gone before vLLM first measures it: the CUDA context, and the host memory of vLLM's
processes. Measured on a GB10, vLLM 0.28: available memory 116.43 and 32.40 GiB before the start, and vLLM finds 113.69
and 29.83 GiB free (llamastash/llamastash#81)."""

HOST_GROWTH = 4 * GIB
"""Bytes of host memory by which vLLM's processes grow while it profiles: loading, compilation. With unified memory the
profile counts them, because free memory is the host's available memory (utils/mem_utils.py:MemorySnapshot.measure). An
estimate that is not measured. A first start that compiles can need much more for a while
(eugr/spark-vllm-docker#286: 30 GiB), which then makes vLLM's KV cache smaller than planned."""

NCCL_CONTEXT = 123 * MIB
"""Bytes of NCCL and custom all-reduce before vLLM first measures memory, on each of several GPUs that share layers.
Measured, with the CUDA context: H200, TP=2: 0.63 GiB. H100, TP=2 without multicast, 2026-11-27: 0.561 GiB. PP=2,
2026-11-26: 0.515 GiB, as on one GPU, because stages open their channels later. The largest value is used: too little
would run out of memory, and too much costs 0.1 % of a KV cache."""

RUNTIME = 270 * MIB
"""Bytes of CUDA modules and input buffers that vLLM's profile counts. Measured: H200, 2026-11-22, four models: 0.26 to
0.29 GiB without the sampler's state and the experts' workspace."""

COLLECTIVES = 768 * MIB
"""Bytes of NCCL channels and symmetric memory, which the first collective opens. Measured: H200, TP=2, Llama-3-70B,
2026-11-22: 2.05 GiB besides weights, minus the sampler's state, RUNTIME and the 512 MiB of the fused all-reduce."""

FUSED_ALL_REDUCE: dict[tuple[int, int], dict[int, float]] = {
    (9, 0): {2: 64, 4: 2, 8: 0.5},
    (10, 0): {2: 64, 4: 32, 8: 1},
}
"""Largest message of FlashInfer's fused all-reduce in MiB, by capability and TP. The workspace holds four messages for
each rank. Source: compilation/passes/fusion/allreduce_rms_fusion.py: FI_ALLREDUCE_FUSION_MAX_SIZE_MB."""

MAX_UTILIZATION = 0.99
"""Largest ``gpu_memory_utilization`` that the plan chooses."""


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """The memory of one GPU besides the KV cache, in bytes.

    ``encoder`` is what images, videos and audio add to the activation peak, and the buffers for them.
    ``cuda_graphs`` is vLLM's estimate if vLLM makes one (``RunConfig.estimate_cudagraphs``), or else the real use.
    """

    weights: int
    activation_peak: int
    cuda_graphs: int
    non_torch: int
    context: int
    safety: int
    encoder: int = 0


def memory_by_rank(placement: Placement) -> tuple[Memory, ...]:
    """Return the memory of one GPU of each pipeline rank, besides the KV cache.

    vLLM counts the first four fields and ``encoder`` against ``gpu_memory_utilization``. The consumed memory of
    ``memory_profiling`` is ``weights + non_torch``. vLLM's estimate of ``cuda_graphs`` exceeds their real use. If the
    estimate is disabled, vLLM counts no CUDA graphs.
    Source: v1/worker/gpu_worker.py:determine_available_memory, utils/mem_utils.py.
    """
    graphs = [cuda_graphs(placement, count) for count in placement.layers_by_rank]
    margins = margin_by_rank(placement)
    ranks = []
    for rank, weight_bytes in enumerate(weights_by_rank(placement)):
        first, last = rank == 0, rank == placement.layout.pipeline - 1
        forward = activation_peak(placement, first=first, last=last)
        peak = max(forward, timing_peak(placement) if first else 0)
        ranks.append(
            Memory(
                weights=weight_bytes,
                activation_peak=peak,
                cuda_graphs=graphs[rank],
                non_torch=_non_torch(placement, first=first, last=last),
                context=_context(placement),
                safety=sum(margins[rank].values()),
                encoder=profiled_encoder(placement, forward, peak)[0] if first else 0,
            )
        )
    return tuple(ranks)


def memory_of_gpu(placement: Placement) -> Memory:
    """Return the memory of one GPU besides the KV cache, on the pipeline rank that has the least left."""
    return rank_with_least_room(memory_by_rank(placement), placement.run_config)


def rank_with_least_room(ranks: Sequence[Memory], run: RunConfig) -> Memory:
    """Return the rank that leaves the least for the KV cache."""
    return max(ranks, key=lambda rank: _counted_by_vllm(rank, run))


def requested_bytes(gpu: Gpu, utilization: float) -> int:
    """Return the bytes that vLLM claims on a GPU (v1/worker/utils.py:request_memory)."""
    return math.ceil(gpu.memory_total * utilization)


def kv_bytes(memory: Memory, run: RunConfig, gpu: Gpu, utilization: float) -> int:
    """Return the bytes that vLLM's profiling leaves for the KV cache of one GPU. Negative if memory is missing."""
    return requested_bytes(gpu, utilization) - _counted_by_vllm(memory, run)


def safe_utilization(memory: Memory, run: RunConfig, gpu: Gpu) -> float:
    """Return the largest ``gpu_memory_utilization`` that leaves enough free memory for what vLLM does not count.

    It has four decimals and is at most MAX_UTILIZATION. It is zero or less if no memory is left. With it vLLM's own
    check of free memory at start-up passes.
    """
    graphs = 0 if run.estimate_cudagraphs else memory.cuda_graphs
    claimable = gpu.memory_free - memory.context - memory.safety - graphs
    return min(MAX_UTILIZATION, math.floor(claimable / gpu.memory_total * 10_000) / 10_000)


def cpu_memory(placement: Placement) -> int:
    """Return the bytes of host memory that one worker of the CPU engine needs besides the KV cache.

    Weights are loaded completely into host memory. PyTorch, vLLM and the compiled model need about 1.5 GiB more.
    Source: vllm/v1/worker/cpu_worker.py:determine_available_memory (vLLM uses the resident size of the process).
    """
    forward = activation_peak(placement, first=True, last=True)
    encoder = encoder_memory(placement)
    peak = forward if encoder is None else encoder.buffers + max(encoder.peak, encoder.cache + forward)
    return max(weights_by_rank(placement)) + peak + 1536 * MIB


def _counted_by_vllm(memory: Memory, run: RunConfig) -> int:
    graphs = memory.cuda_graphs if run.estimate_cudagraphs else 0
    return memory.weights + memory.activation_peak + graphs + memory.non_torch + memory.encoder


def _uses_collectives(placement: Placement) -> bool:
    """Whether collectives run in every layer: over a replica's GPUs, or over all replicas if they share experts."""
    layout = placement.layout
    return layout.tensor > 1 or (placement.model.experts is not None and layout.data > 1)


def _non_torch(placement: Placement, *, first: bool, last: bool) -> int:
    """Return the bytes that stay allocated besides weights.

    They are the sampler's state, the workspace, the tokens that sparse attention chose, CUDA modules and collectives.
    Source of the sampler's state: v1/worker/gpu/sample/penalties.py (for each request, a count and two bits for each
    token of the vocabulary), logit_bias.py and bad_words.py (17.4 KB for each request).
    """
    model, run, layout, gpu = placement.model, placement.run_config, placement.layout, placement.gpu
    total = RUNTIME + (HOST_GROWTH if gpu is not None and gpu.unified else 0)
    if last and model.task == "generate":
        state = 4 * model.vocab_size + 2 * 4 * math.ceil(model.vocab_size / 32) + 17_400
        total += run.max_num_seqs * state
    total += workspace(placement) + chosen_indices(placement)
    if _uses_collectives(placement):
        total += COLLECTIVES
    if layout.tensor > 1:
        message = run.max_num_batched_tokens * model.hidden_size * run.activation_bytes
        assert gpu is not None  # noqa: S101 - ``cpu_memory`` computes the CPU engine
        limit = FUSED_ALL_REDUCE.get(gpu.compute_capability, {}).get(layout.tensor, 0)
        total += 4 * layout.tensor * min(round(limit * MIB), message) if run.fuse_allreduce_rms else 0
    if not first:  # buffers for the hidden states and residual of the previous rank
        total += 2 * run.max_num_batched_tokens * model.hidden_size * run.activation_bytes
    return total


def _context(placement: Placement) -> int:
    """Return the bytes of one GPU's CUDA context, and of NCCL's if collectives run."""
    base = CONTEXTS.get(placement.generation or Generation.UNKNOWN, CONTEXT_SMALL)
    if placement.gpu is not None and placement.gpu.unified:
        base = CONTEXT_UNIFIED
    return base + (NCCL_CONTEXT if _uses_collectives(placement) else 0)
