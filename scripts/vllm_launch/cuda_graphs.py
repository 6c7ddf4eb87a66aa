"""CUDA graphs: for which batches vLLM captures them, what it expects of them, and what they take. Bytes. Pure."""

from __future__ import annotations

from vllm_launch.gpus import Gpu
from vllm_launch.model import Model
from vllm_launch.parallel import Layout
from vllm_launch.run import Run

_MIB = 1 << 20

GRAPH_POOL, GRAPH_LAYER, GRAPH_SAMPLED = 143 * _MIB, 0.1333 * _MIB, 0.28 * _MIB
"""vLLM's estimate for CUDA graphs, beside attention's splits: the pool of the largest batch, each layer of a graph that
it captures to look, and each layer of a graph of a whole batch that it only extrapolates, by the second largest of
them, which is an accident of PyTorch's allocator: 0.08 (Llama-3-70B) to 0.43 MiB (DeepSeek-V2-Lite). H100 and H200,
2026-11-26, 32 layers: it captures 53 graphs, sees 0.61 GiB and says 0.92; 16 layers (PP=2): 0.50 and 0.81; 48: 0.72
and 1.28; 64: 1.14 and 2.2; 27 of which 26 have experts: 0.97 and 1.52."""

GRAPHS_TAKEN, GRAPHS_TAKEN_LAYER = 150 * _MIB, 0.0355 * _MIB
"""What CUDA graphs take, beside attention's splits, and each layer of a graph more; vLLM's own log, "CUDA graph pool
memory", 2026-11-26, H100 and H200, MiB for 102 graphs: 460 (32 layers), 310 (TP=2), 430 (16 layers, PP=2), 510 (48),
860 (64), 830 (27, 26 of them with experts), and 800 for 166 graphs of up to 1,024 requests. None of these is more than
is said here."""

GRAPH_EXPERTS = 0.75
"""How much more of a graph a layer of experts is than a dense one: it has so many more kernels (DeepSeek-V2-Lite, as
above: 0.24 MiB for each layer that vLLM looks at)."""

GRAPH_SPLITS = 32
"""Splits of a context that a graph of a whole batch has room for (config/attention.py:
flash_attn_max_num_splits_for_cuda_graph)."""

SPLIT_REQUESTS = 992
"""In larger batches FlashAttention 3 splits nothing (hopper/flash_api.cpp:PREPARE_VARLEN_MAX_BATCHES_1CTA)."""


def capture_sizes(run: Run, gpu: Gpu) -> list[int]:
    """The batch sizes that vLLM captures CUDA graphs for (vllm/config/vllm.py:_set_cudagraph_sizes)."""
    if run.enforce_eager:
        return []
    ceiling = 1024 if gpu.compute_capability[0] == 10 else 512  # noqa: PLR2004 - data-centre Blackwell
    most, full = run.max_cudagraph_capture_size, {run.max_num_batched_tokens}
    if most is None:
        most = min(2 * run.max_num_seqs, ceiling)
        full.add(run.max_num_seqs)
    sizes = {1, 2, 4, *range(8, 256, 8), *range(256, most + 1, 16), *full}
    return sorted(size for size in sizes if size <= min(most, run.max_num_batched_tokens))


def cuda_graphs(model: Model, run: Run, layout: Layout, gpu: Gpu, layers: int) -> int:
    """What vLLM's profile expects of CUDA graphs, or what they take where it is told not to count that.

    It captures those of parts of a batch, and of those of whole batches the largest two; from the second it guesses
    the others. Source: v1/worker/gpu/cudagraph_utils.py:profile_cudagraph_memory.
    """
    sizes = capture_sizes(run, gpu)
    if not sizes:
        return 0
    nodes = layers * (1 + GRAPH_EXPERTS * sum(layer.moe for layer in model.layers) / len(model.layers))
    cases = 2 if run.adapter_ranks else 1  # with adapters and without (v1/worker/gpu/lora_utils.py)
    whole = [size for size in sizes if size <= run.max_num_seqs]
    captured = whole[-2:] if run.estimate_cudagraphs else whole
    split = max((size for size in captured if size <= SPLIT_REQUESTS), default=0)
    width = model.mla.kv_lora_rank if model.mla else model.head_dim
    splits = GRAPH_SPLITS * split * (model.heads // layout.tensor) * (width + 1) * 4
    if not run.estimate_cudagraphs:
        return round(GRAPHS_TAKEN + splits + cases * (len(sizes) + len(whole)) * nodes * GRAPHS_TAKEN_LAYER)
    looked_at = cases * len(sizes) + len(captured)
    guessed = max(0, cases * len(whole) - len(captured))
    return round(GRAPH_POOL + splits + looked_at * nodes * GRAPH_LAYER + guessed * layers * GRAPH_SAMPLED)
