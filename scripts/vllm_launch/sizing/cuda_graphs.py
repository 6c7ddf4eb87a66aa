"""CUDA graphs: for which batches vLLM captures them, what it expects of them, and what they take. Bytes. Pure."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from vllm_launch.machine.generation import Generation
from vllm_launch.sizing.kv import kv_dtype
from vllm_launch.sizing.placement import Placement
from vllm_launch.sizing.run_config import RunConfig
from vllm_launch.units import MIB

GRAPH_POOL, GRAPH_LAYER = 143 * MIB, 0.1333 * MIB
"""What vLLM sees of CUDA graphs when it looks, beside attention's splits: the pool of the largest batch, and each layer
of a graph. vLLM's log, 2026-11-26, H100 and H200, 53 graphs, GiB: 0.61 (32 layers), 0.50 (16, PP=2), 0.72 (48), 0.96
(80, TP=2), 1.14 (64), 0.70 (48 of experts), 0.97 (27 of latent attention)."""

GRAPH_RELEASED = 16 * MIB
"""What the run before a capture leaves beside attention's splits, as the logs above have it: 10 to 20 MiB."""

GRAPHS_TAKEN, GRAPHS_TAKEN_LAYER = 150 * MIB, 0.0355 * MIB
"""What CUDA graphs take, beside attention's splits, and each layer of a graph more; vLLM's own log, "CUDA graph pool
memory", 2026-11-26, H100 and H200, MiB for 102 graphs: 460 (32 layers), 310 (TP=2), 430 (16 layers, PP=2), 510 (48),
860 (64), 480 (48 of experts), 830 (27 of latent attention), and 800 for 166 graphs of up to 1,024 requests. None of
these is more than is said here; gpt-oss-20b takes 790, of which 500 are said."""

GRAPH_LATENT = 0.75
"""How much more of a graph a layer of latent attention is than another: it has so many more kernels (DeepSeek-V2-Lite,
as above: 0.24 MiB for each layer that vLLM looks at)."""

GRAPH_SPLITS = 32
"""Splits of a context that a graph of a whole batch has room for (config/attention.py:
flash_attn_max_num_splits_for_cuda_graph)."""

SPLIT_REQUESTS = 992
"""In larger batches FlashAttention 3 splits nothing (hopper/flash_api.cpp:PREPARE_VARLEN_MAX_BATCHES_1CTA)."""


def capture_sizes(run: RunConfig, generation: Generation | None) -> list[int]:
    """The batch sizes that vLLM captures CUDA graphs for (vllm/config/vllm.py:_set_cudagraph_sizes)."""
    if run.enforce_eager:
        return []
    ceiling = 1024 if generation is Generation.BLACKWELL else 512
    most, full = run.max_cudagraph_capture_size, {run.max_num_batched_tokens}
    if most is None:
        most = min(2 * run.max_num_seqs, ceiling)
        full.add(run.max_num_seqs)
    sizes = {1, 2, 4, *range(8, 256, 8), *range(256, most + 1, 16), *full}
    return sorted(size for size in sizes if size <= min(most, run.max_num_batched_tokens))


def cuda_graphs(placement: Placement, layers: int) -> int:
    """What vLLM's profile expects of CUDA graphs, or what they take where it is told not to count that.

    It captures those of parts of a batch, and of those of whole batches the largest two. Each of the others it takes
    for as much as the second took of free memory, but that is less than nothing: PyTorch empties its cache as a capture
    begins, and in it is what the run before the capture left (torch/cuda/graphs.py:graph.__enter__). So each counts as
    vLLM's least, 1 MiB, and what was released is counted as if graphs took it. Source:
    v1/worker/gpu/cudagraph_utils.py:profile_cudagraph_memory, _extrapolate_full_graph_memory.
    """
    model, run, layout = placement.model, placement.run_config, placement.layout
    sizes = capture_sizes(run, placement.generation)
    if not sizes:
        return 0
    nodes = layers * (1 + GRAPH_LATENT if model.mla else 1)
    cases = 2 if run.adapter_ranks else 1  # with adapters and without (v1/worker/gpu/lora_utils.py)
    whole = [size for size in sizes if size <= run.max_num_seqs]
    splits = functools.partial(_splits, placement)
    if not run.estimate_cudagraphs:
        graphs = cases * (len(sizes) + len(whole))
        return round(GRAPHS_TAKEN + splits(whole) + graphs * nodes * GRAPHS_TAKEN_LAYER)
    looked_at = cases * len(sizes) + len(whole[-2:])
    seen = GRAPH_POOL + splits(whole[-2:]) + looked_at * nodes * GRAPH_LAYER
    if len(whole) < 2:  # noqa: PLR2004 - there is no second
        return round(seen)
    # What lies in a layer's splits when attention comes again makes the next layer take its own: where queries and
    # keys are normed, more is alive then than PyTorch's smaller segments hold. A feed-forward fits into the splits.
    feed_forward = 3 * whole[-2] * model.intermediate_size * run.activation_bytes // layout.tensor
    released = GRAPH_RELEASED + max(splits(whole[-2:-1]) * (2 if model.qk_norm else 1), feed_forward)
    return round(seen + released + (cases * len(whole) - 1) * MIB)


def _splits(placement: Placement, sizes: Sequence[int]) -> int:
    """Bytes of attention's partial results, in float32 and with a sum for each, in the largest graph that splits.

    FlashAttention 3 alone is given room for so many, on Hopper (v1/attention/backends/flash_attn.py). FLASHMLA, which
    reads FP8 where FLASH_ATTN_MLA does not, splits by multiprocessors (mla/flashmla.py).
    """
    model, run, layout = placement.model, placement.run_config, placement.layout
    if placement.generation is not Generation.HOPPER or (model.mla and kv_dtype(model, run).startswith("fp8")):
        return 0
    size = max((size for size in sizes if size <= SPLIT_REQUESTS), default=0)
    width = model.mla.kv_lora_rank if model.mla else model.head_dim
    return GRAPH_SPLITS * size * (model.heads // layout.tensor) * (width + 1) * 4
