"""CUDA graphs: captured batch sizes, vLLM's estimate of their memory, and their real memory, in bytes. Pure."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from vllm_launch.machine.generation import Generation
from vllm_launch.sizing.kv_layers import kv_dtype
from vllm_launch.sizing.placement import Placement
from vllm_launch.sizing.run_config import RunConfig
from vllm_launch.sizing.sparse import has_dense_attention
from vllm_launch.units import MIB

ESTIMATE_BASE, ESTIMATE_PER_LAYER = 143 * MIB, 0.1333 * MIB
"""Bytes that vLLM's profile measures for CUDA graphs, besides attention's splits: the pool of the largest batch, and
each layer of each graph. Measured: vLLM's log, 2026-11-26, H100 and H200, 53 graphs, GiB: 0.61 (32 layers), 0.50 (16,
PP=2), 0.72 (48), 0.96 (80, TP=2), 1.14 (64), 0.70 (48 of experts), 0.97 (27 of latent attention)."""

RELEASED_BEFORE_CAPTURE = 16 * MIB
"""Bytes, besides attention's splits, that the run before a capture leaves in PyTorch's cache. The same logs show 10 to
20 MiB."""

ACTUAL_BASE, ACTUAL_PER_LAYER = 150 * MIB, 0.0355 * MIB
"""Bytes that CUDA graphs really use, besides attention's splits: a base, and each layer of each graph. Measured: vLLM's
log, "CUDA graph pool memory", 2026-11-26, H100 and H200, MiB for 102 graphs: 460 (32 layers), 310 (TP=2), 430 (16
layers, PP=2), 510 (48), 860 (64), 480 (48 of experts), 830 (27 of latent attention), and 800 for 166 graphs of up to
1,024 requests. None of these exceeds the computed value. Only gpt-oss-20b does: it uses 790, and 500 are computed."""

LATENT_EXTRA = 0.75
"""Additional memory in a graph of a layer with latent attention, as a share of another layer's, because it has more
kernels. Measured as above, DeepSeek-V2-Lite: 0.24 MiB for each layer that vLLM's profile captures."""

MAX_SPLITS = 32
"""Splits of a context that a graph of a full batch has memory for (config/attention.py:
flash_attn_max_num_splits_for_cuda_graph)."""

MAX_SPLIT_REQUESTS = 992
"""FlashAttention 3 does not split in larger batches (hopper/flash_api.cpp:PREPARE_VARLEN_MAX_BATCHES_1CTA)."""


def capture_sizes(run: RunConfig, generation: Generation | None) -> list[int]:
    """Return the batch sizes that vLLM captures CUDA graphs for, in tokens (vllm/config/vllm.py:_set_cudagraph_sizes).

    With speculative decoding each request of a decoding batch has ``num_speculative_tokens`` tokens more.
    """
    if run.cudagraph_mode == "NONE":
        return []
    if run.cudagraph_capture_sizes is not None:
        return sorted({size for size in run.cudagraph_capture_sizes if size <= run.max_num_batched_tokens})
    ceiling = 1024 if generation is Generation.BLACKWELL else 512
    largest, full_batches = run.max_cudagraph_capture_size, {run.max_num_batched_tokens}
    if largest is None:
        query = 1 + run.num_speculative_tokens
        largest = min(2 * run.max_num_seqs * query, ceiling)
        requests = [run.max_num_seqs] if query == 1 else [*_steps(ceiling), min(run.max_num_seqs, ceiling)]
        full_batches |= {query * count for count in requests if count <= run.max_num_seqs}
    sizes = {*_steps(largest), *full_batches}
    if run.performance_mode == "interactivity":
        sizes |= set(range(1, min(largest, 32) + 1))
    return sorted(size for size in sizes if size <= min(largest, run.max_num_batched_tokens))


def _steps(largest: int) -> list[int]:
    """Return 1, 2, 4, then the multiples of 8 below 256, then those of 16, up to ``largest``."""
    return [size for size in (1, 2, 4, *range(8, 256, 8), *range(256, largest + 1, 16)) if size <= largest]


def full_graph_sizes(run: RunConfig, sizes: Sequence[int]) -> list[int]:
    """Return the batch sizes of full CUDA graphs, in tokens, given all captured ``sizes``.

    A full graph is for batches that only decode. FULL would capture all batches in full graphs. But not all attention
    backends support this, and then vLLM falls back to FULL_AND_PIECEWISE. So FULL counts as both.
    Source: v1/worker/gpu/cudagraph_utils.py:_init_candidates, config/compilation.py:resolve_cudagraph_mode_and_sizes.
    """
    if run.cudagraph_mode in {"NONE", "PIECEWISE"} or not sizes:
        return []
    if run.cudagraph_mode == "FULL":
        return list(sizes)
    query = 1 + run.num_speculative_tokens
    limit = min(query * run.max_num_seqs, max(sizes))
    return sorted({size for tokens in sizes if (size := -(-tokens // query) * query) <= limit})


def cuda_graphs(placement: Placement, layers: int) -> int:
    """Return vLLM's estimate of the bytes of CUDA graphs, or the bytes that they really use if vLLM does not estimate.

    vLLM's profile captures all piecewise graphs, but only the two largest full graphs. It counts each other full graph
    as much as the second took of free memory. But that is negative: PyTorch empties its cache when a capture begins,
    and so frees what the run before the capture left (torch/cuda/graphs.py:graph.__enter__). So each of them counts as
    vLLM's minimum, 1 MiB, and the released memory counts as if graphs used it.
    Source: v1/worker/gpu/cudagraph_utils.py:profile_cudagraph_memory, _extrapolate_full_graph_memory.
    """
    model, run, layout = placement.model, placement.run_config, placement.layout
    sizes = capture_sizes(run, placement.generation)
    if not sizes:
        return 0
    weighted_layers = layers * (1 + LATENT_EXTRA if model.mla else 1)
    cases = 2 if run.adapter_ranks else 1  # with adapters and without (v1/worker/gpu/lora_utils.py)
    full_sizes = full_graph_sizes(run, sizes)
    piecewise = 0 if run.cudagraph_mode == "FULL_DECODE_ONLY" else len(sizes)
    splits = functools.partial(_split_bytes, placement)
    if not run.estimate_cudagraphs:
        graphs = cases * (piecewise + len(full_sizes))
        return round(ACTUAL_BASE + splits(full_sizes) + graphs * weighted_layers * ACTUAL_PER_LAYER)
    captured_graphs = cases * piecewise + len(full_sizes[-2:])
    measured_bytes = ESTIMATE_BASE + splits(full_sizes[-2:]) + captured_graphs * weighted_layers * ESTIMATE_PER_LAYER
    if len(full_sizes) < 2:  # noqa: PLR2004 - there is no second graph
        return round(measured_bytes)
    # The next layer reuses the memory of a layer's splits, unless other tensors occupy it. With a norm of queries and
    # keys, more tensors are alive than PyTorch's smaller segments hold, so the next layer allocates its own splits.
    # A feed-forward layer fits into the memory of the splits.
    feed_forward = 3 * full_sizes[-2] * model.intermediate_size * run.activation_bytes // layout.tensor
    released_bytes = RELEASED_BEFORE_CAPTURE + max(
        splits(full_sizes[-2:-1]) * (2 if model.qk_norm else 1), feed_forward
    )
    return round(measured_bytes + released_bytes + (cases * len(full_sizes) - 1) * MIB)


def _split_bytes(placement: Placement, sizes: Sequence[int]) -> int:
    """Return the bytes of attention's partial results in the largest graph that splits: float32, with a sum for each.

    Only FlashAttention 3 on Hopper gets memory for MAX_SPLITS splits (v1/attention/backends/flash_attn.py).
    FLASH_ATTN_MLA does not read FP8, so FLASHMLA does, which splits by multiprocessors (mla/flashmla.py).
    """
    model, run, layout = placement.model, placement.run_config, placement.layout
    if placement.generation is not Generation.HOPPER or (model.mla and kv_dtype(model, run).startswith("fp8")):
        return 0
    if not has_dense_attention(model):  # FlashMLA's sparse kernels split by multiprocessors too
        return 0
    size = max((size for size in sizes if size <= MAX_SPLIT_REQUESTS), default=0)
    width = model.mla.kv_lora_rank if model.mla else model.head_dim
    return MAX_SPLITS * size * (model.heads // layout.tensor) * (width + 1) * 4
