"""Computes how vLLM 0.32.0 uses the memory of a GPU, in bytes. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import msgspec

from vllm_launch.machine.generation import Generation
from vllm_launch.machine.gpus import Gpu
from vllm_launch.sizing import kv
from vllm_launch.sizing.activations import activation_peak, attention_peak, timing_peak, workspace
from vllm_launch.sizing.allocator import fragments
from vllm_launch.sizing.cuda_graphs import cuda_graphs
from vllm_launch.sizing.encoder import encoder_memory
from vllm_launch.sizing.parallel import padded_vocab
from vllm_launch.sizing.placement import Placement
from vllm_launch.sizing.run_config import RunConfig
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

HOST_SHARE = 1 / 16
"""Share of unified memory that stays free for the host: other programs, and the page cache through which the weights
are loaded. An estimate that is not measured. The driver can fail to allocate memory that Linux calls available
(vllm-project/vllm#56824). On a GB10 the plan then comes to a utilisation of 0.86 to 0.87. Users report 0.85 as stable,
and failures from 0.90 on (MiaAI-Lab/DeepSeek-v4-Flash-DSpark-2x-DGX-Spark#5)."""

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

PIPELINE_CHANNELS = 256 * MIB
"""Bytes of NCCL's send and receive channels between pipeline stages. The profile does not open them."""

FLASHINFER_WORKSPACE, FLASHINFER_BYTES = 394 * MIB, 16
"""Bytes of the workspace of FlashInfer's attention: the minimum, and for each element of a batch's queries.
Source: v1/attention/backends/flashinfer.py, VLLM_FLASHINFER_WORKSPACE_BUFFER_SIZE and
FLASHINFER_PREFILL_WORKSPACE_BYTES_PER_ELEM."""

SAMPLER_COPIES = 4
"""Float32 copies of the logits that sampling needs at once. vLLM's profile does not run sampling
(v1/worker/gpu/model_runner.py:_dummy_sampler_run). If all requests of a batch use top-k and top-p, it needs 3.5: the
model's logits in half the width, the processed logits, FlashInfer's masked logits and their probabilities
(v1/worker/gpu/sample/sampler.py:sample, v1/sample/ops/topk_topp_sampler.py:flashinfer_sample). Other methods need less.
Measured: H200, Llama-3-8B, 1,024 requests with top-k, top-p, penalties and logprobs: utilisation 0.985 works, 0.99 runs
out of memory."""

VERIFIED_BYTES = 1024 * MIB
"""Bytes of float32 logits that vLLM verifies at once in speculative decoding.
Source: v1/worker/gpu/spec_decode/rejection_sampler.py:MAX_CHUNK_BYTES."""

MAX_UTILIZATION = 0.99
"""Largest ``gpu_memory_utilization`` that the plan chooses."""


MarginPart = Literal["sampling", "attention", "encoder", "block tables", "fragments", "other"]
"""What the safety margin is for."""


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
                encoder=_encoder(placement, forward, peak)[0] if first else 0,
            )
        )
    return tuple(ranks)


def margin_by_rank(placement: Placement) -> tuple[dict[MarginPart, int], ...]:
    """Return the parts of the safety margin of one GPU of each pipeline rank, in bytes.

    The profile counts the forward pass, but none of sampling, attention and what it leaves out of the encoder. Only
    the largest of these three is a part, because they do not run at the same time.
    """
    sampler, attention = _sampler_copies(placement), attention_peak(placement)
    margins = []
    for rank in range(placement.layout.pipeline):
        first, last = rank == 0, rank == placement.layout.pipeline - 1
        forward = activation_peak(placement, first=first, last=last)
        unprofiled = _encoder(placement, forward, max(forward, timing_peak(placement)))[1] if first else 0
        beyond: dict[MarginPart, int] = {"sampling": sampler, "attention": attention - forward, "encoder": unprofiled}
        largest = max(beyond, key=lambda part: beyond[part])
        temporary = forward + beyond[largest]
        margins.append(
            {
                largest: beyond[largest],
                "block tables": _block_tables(placement),
                "fragments": fragments(placement, temporary),
                "other": _serving_overhead(placement),
            }
        )
    return tuple(margins)


def _encoder(placement: Placement, forward: int, peak: int) -> tuple[int, int]:
    """Return the bytes that the encoder adds to ``peak``, with its buffers, and what it can need beyond them.

    ``forward`` is the peak of the language model, which runs after the encoder while the encoder's output is kept.
    """
    encoder = encoder_memory(placement)
    if encoder is None:
        return 0, 0
    counted = max(0, max(encoder.profiled_peak, encoder.profiled_output + forward) - peak)
    needed = max(encoder.peak, encoder.cache + forward)
    return counted + encoder.buffers, max(0, needed - peak - counted)


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

    They are the sampler's state, the experts' workspace, CUDA modules and collectives. Source of the sampler's state:
    v1/worker/gpu/sample/penalties.py (for each request, a count and two bits for each token of the vocabulary),
    logit_bias.py and bad_words.py (17.4 KB for each request).
    """
    model, run, layout, gpu = placement.model, placement.run_config, placement.layout, placement.gpu
    total = RUNTIME + (HOST_GROWTH if gpu is not None and gpu.unified else 0)
    if last and model.task == "generate":
        state = 4 * model.vocab_size + 2 * 4 * math.ceil(model.vocab_size / 32) + 17_400
        total += run.max_num_seqs * state
    total += workspace(placement)
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


def _sampler_copies(placement: Placement) -> int:
    """Return the bytes of the copies of logits that sampling makes while vLLM serves (``SAMPLER_COPIES``).

    With speculative decoding a batch has logits for each draft token too. The model's logits of all of them are alive
    while vLLM verifies them. Model runner V2 copies at most VERIFIED_BYTES of them at once, V1 copies all.
    """
    model, run = placement.model, placement.run_config
    if model.task != "generate":
        return 0
    vocab = padded_vocab(model.vocab_size)
    copied = min(run.max_num_seqs, run.max_num_batched_tokens)
    if not run.num_speculative_tokens:
        return SAMPLER_COPIES * 4 * copied * vocab
    rows = min(run.max_num_seqs * (1 + run.num_speculative_tokens), run.max_num_batched_tokens)
    copied = min(rows, max(1, VERIFIED_BYTES // (4 * vocab))) if run.verifies_in_chunks else rows
    return rows * vocab * run.activation_bytes + SAMPLER_COPIES * 4 * copied * vocab


def _serving_overhead(placement: Placement) -> int:
    """Return the bytes of channels, FlashInfer's workspace, and the host's share of unified memory."""
    channels = PIPELINE_CHANNELS if placement.layout.pipeline > 1 else 0
    gpu = placement.gpu
    host = round(gpu.memory_total * HOST_SHARE) if gpu is not None and gpu.unified else 0
    return channels + _flashinfer_workspace(placement) + host


def _block_tables(placement: Placement) -> int:
    """Return the bytes of block tables: two rows of int32 for each request and group of layers.

    vLLM allocates them after it chose the size of the KV cache. The row of a sliding window is as long as any other
    row. Source: v1/worker/gpu/block_table.py.
    """
    run = placement.run_config
    row_length = sum(
        math.ceil(run.max_model_len / min(spec.block for spec in group)) for group in kv.grouping_of(placement).groups
    )
    return 2 * 4 * run.max_num_seqs * row_length


def _flashinfer_workspace(placement: Placement) -> int:
    """Return the bytes of FlashInfer's workspace, or 0 if vLLM uses other attention kernels.

    The first batch allocates it, and it is never freed. vLLM prefers FlashInfer on data-centre Blackwell, where kernels
    of TensorRT-LLM need only the minimum. On other GPUs except Hopper, vLLM uses FlashInfer if FlashAttention cannot
    read the KV cache. Source: platforms/cuda.py:_get_backend_priorities.
    """
    model, run, layout = placement.model, placement.run_config, placement.layout
    if placement.generation is Generation.BLACKWELL:
        return FLASHINFER_WORKSPACE
    if placement.generation is Generation.HOPPER or model.mla or not kv.kv_dtype(model, run).startswith("fp8"):
        return 0
    queries = run.max_num_batched_tokens * (model.heads // layout.tensor) * model.head_dim
    return max(FLASHINFER_WORKSPACE, queries * FLASHINFER_BYTES)
