"""Memory of a model's weights on one GPU, in bytes: tensors, padding, tables, adapters. Pure."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence

from vllm_launch.machine.generation import Generation
from vllm_launch.model.dtypes import COMPUTE_BITS
from vllm_launch.model.model import Model
from vllm_launch.model.schemes import schemes_of
from vllm_launch.sizing.offload import LayerTensor, Offloaded, offloaded
from vllm_launch.sizing.parallel import Layout, expert_ranks, expert_width
from vllm_launch.sizing.placement import Placement
from vllm_launch.sizing.run_config import RunConfig
from vllm_launch.sizing.tensor_parts import FIRST, MXFP4_SPLITS, Fused, Part, fused_tensors
from vllm_launch.units import MIB

_MXFP4_TILES = (128, 256)
"""Marlin and TensorRT-LLM pad the inner channels of MXFP4 experts on one GPU to a multiple of the first, and the outer
channels to a multiple of the second. Marlin runs them on GPUs before Hopper.
Source: fused_moe/oracle/mxfp4.py:mxfp4_round_up_hidden_size_and_intermediate_size."""

_TRITON_TILE, _TRITON_INPUTS = 64, 128
"""On Hopper the Triton kernels pad inner channels to a multiple of the first, and inputs to a multiple of the second.
Source: triton_kernels' HopperMXValueLayout. Measured: gpt-oss-20b, H200, 2026-11-22: 13.03 GiB, 0.20 of it padding."""

_HEADS_EVERYWHERE = {
    "bloom", "chatglm", "dbrx", "falcon", "gemma", "gemma2", "gemma3", "gemma3_text", "gemma4", "gemma4_text", "gpt2",
    "gptj", "gpt_oss", "granitemoe", "granitemoehybrid", "granitemoeshared", "internlm2", "jamba", "minicpm", "mixtral",
    "nemotron_h", "olmoe", "opt", "orion", "phimoe", "qwen2_moe", "qwen3_moe", "qwen3_next", "stablelm",
}  # fmt: skip
"""Model types whose untied head is on every pipeline rank, and not only on the last
(vllm/model_executor/models: ``lm_head = ParallelLMHead`` without ``is_last_rank`` before it)."""

_EMBEDS_EVERYWHERE = _HEADS_EVERYWHERE | {
    "cohere", "cohere2", "lfm2", "lfm2_moe", "qwen3_5_text", "qwen3_5_moe_text"
}  # fmt: skip
"""Model types whose embedding is on every pipeline rank, and not only on the first (no ``is_first_rank``)."""


def weights(placement: Placement) -> int:
    """Return the bytes of weights on the heaviest GPU: PyTorch's bytes, as in vLLM's log line "Model loading took"."""
    return max(weights_by_rank(placement))


def weights_by_rank(placement: Placement) -> tuple[int, ...]:
    """Return the bytes of weights on a GPU of each pipeline rank, without those that are in host memory instead."""
    model, run, layout = placement.model, placement.run_config, placement.layout
    counts, rank_of = placement.layers_by_rank, placement.rank_of_layer
    sizes = [0] * layout.pipeline
    for fused, size in _tensor_sizes(placement):
        for rank in _ranks_with(model, fused, rank_of, layout):
            sizes[rank] += size
    starts = [sum(counts[:rank]) for rank in range(layout.pipeline)]
    return tuple(
        size
        - moved.saved
        + _rope_cache(model, run)
        + _mla_copies(placement, counts[rank])
        + _adapters(placement, range(starts[rank], starts[rank] + counts[rank]))
        for rank, (size, moved) in enumerate(zip(sizes, offloaded_by_rank(placement), strict=True))
    )


def offloaded_by_rank(placement: Placement) -> tuple[Offloaded, ...]:
    """Return the weights that vLLM keeps in host memory, for a GPU of each pipeline rank. On the CPU engine: none."""
    offload, pipeline = placement.run_config.offload, placement.layout.pipeline
    if offload is None or placement.gpu is None:
        return (Offloaded(0, 0, 0),) * pipeline
    counts, rank_of = placement.layers_by_rank, placement.rank_of_layer
    tensors: list[list[LayerTensor]] = [[] for _ in range(pipeline)]
    for fused, size in _tensor_sizes(placement):
        if fused.place >= 0:
            rank = rank_of[fused.place]
            tensors[rank].append(LayerTensor(fused.place - sum(counts[:rank]), fused.path, size))
    return tuple(offloaded(offload, on_rank) for on_rank in tensors)


def offloaded_on_host(placement: Placement) -> list[Offloaded]:
    """Return the weights in host memory of every GPU of the machine."""
    layout = placement.layout
    return [moved for moved in offloaded_by_rank(placement) for _ in range(layout.tensor * layout.data)]


def _tensor_sizes(placement: Placement) -> Iterator[tuple[Fused, int]]:
    """Yield each tensor of the model and its bytes on a GPU that holds it. Padding depends on the GPU's kernels."""
    model, run = placement.model, placement.run_config
    quantized_share, padding = _quantized_share(model, run), _padding_factors(placement)
    sizes: dict[tuple[Part, ...], int] = {}  # most layers have tensors of the same sizes
    for fused in fused_tensors(model, run):
        if fused.parts not in sizes:
            sizes[fused.parts] = allocated(
                sum(
                    math.ceil(
                        _bytes_per_gpu(part, placement)
                        * (quantized_share if _can_be_quantized(part, run) else 1)
                        * padding.get(part.split, 1)
                    )
                    for part in fused.parts
                )
            )
        yield fused, sizes[fused.parts]


def _ranks_with(model: Model, fused: Fused, rank_of: Sequence[int], layout: Layout) -> Collection[int]:
    """Return the pipeline ranks that hold a tensor.

    With tied embeddings the last rank has a copy of the first rank's embedding table and computes logits with it.
    """
    first, last = 0, layout.pipeline - 1
    if fused.place >= 0:
        return (rank_of[fused.place],)
    if not any(part.split == "vocab" for part in fused.parts):
        return (first if fused.place == FIRST else last,)
    if fused.place == FIRST:
        if model.model_type in _EMBEDS_EVERYWHERE:
            return range(layout.pipeline)
        return {first, last} if model.tie_word_embeddings else (first,)
    return range(layout.pipeline) if model.model_type in _HEADS_EVERYWHERE else (last,)


def allocated(size: int) -> int:
    """Return the bytes that PyTorch's allocator reserves for a tensor of ``size`` bytes while vLLM loads weights.

    Sizes are rounded up to 512 bytes. From 10 MiB on a tensor has its own segment, rounded up to 2 MiB. Other tensors
    can use the rest of a segment only if it is larger than 1 MiB. From 20 MiB on, vLLM's max_split_size while loading,
    they cannot use it at all.
    Source: c10/cuda/CUDACachingAllocator.cpp (kRoundLarge, should_split), v1/worker/gpu_worker.py:load_model.
    """
    size = -(-size // 512) * 512
    if size < 10 * MIB:
        return size
    segment = -(-size // (2 * MIB)) * 2 * MIB
    return size if segment < 20 * MIB and segment - size > MIB else segment


def _padding_factors(placement: Placement) -> dict[str, float]:
    """Return the size with padding divided by the size without, for each of MXFP4_SPLITS."""
    model, layout = placement.model, placement.layout
    if model.experts is None or not model.experts.intermediate_size:
        return {}
    outer = model.hidden_size
    inner = max(1, expert_width(model.experts, layout))
    if placement.generation in {None, Generation.HOPPER}:
        padded = _round_up(inner, _TRITON_TILE)
        up, down = padded * _round_up(outer, _TRITON_INPUTS), _round_up(padded, _TRITON_INPUTS) * outer
        sizes = (up, down, padded * outer, padded * outer)
    else:
        sizes = (_round_up(inner, _MXFP4_TILES[0]) * _round_up(outer, _MXFP4_TILES[1]),) * 4
    return {split: size / (inner * outer) for split, size in zip(MXFP4_SPLITS, sizes, strict=True)}


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _bytes_per_gpu(part: Part, placement: Placement) -> int:
    """Return the bytes of ``part`` on one GPU. Redundant experts are as many more experts in each layer."""
    layout, experts = placement.layout, placement.model.experts
    match part.split:
        case "tensor" | "vocab":
            return math.ceil(part.size / layout.tensor)
        case "kv":
            return math.ceil(part.size / min(layout.tensor, part.kv_heads))
        case "whole":
            return part.size
        case _:  # experts
            redundant = placement.run_config.redundant_experts
            copies = 1 + redundant / experts.count if experts and redundant else 1
            return math.ceil(part.size * copies / expert_ranks(layout))


def _quantized_share(model: Model, run: RunConfig) -> float:
    """Return the share of a linear layer's bytes that remains after --quantization. 1.0 if it is not quantised."""
    if run.quantization is None or model.quantization is not None:
        return 1.0
    bits = COMPUTE_BITS[run.dtype]
    if run.quantization == "bitsandbytes":
        return (4 + 32 / 64) / bits  # NF4, and one float32 absmax for 64 weights
    if run.quantization.startswith(("fp8", "int8", "experts_int8", "mxfp8", "online")):
        return 8 / bits
    return 1.0


def _can_be_quantized(part: Part, run: RunConfig) -> bool:
    """Whether --quantization applies to ``part``. experts_int8 quantises only experts."""
    return part.linear and (run.quantization != "experts_int8" or part.split == "expert")


def _rope_cache(model: Model, run: RunConfig) -> int:
    """Return the bytes of the table of cosines and sines of all positions. Each GPU has one table.

    Source: rotary_embedding/base.py:_compute_cos_sin_cache.
    """
    kinds = {layer.kind for layer in model.layers}
    if kinds <= {"mamba", "none"}:
        return 0
    width = model.mla.qk_rope_head_dim if model.mla else model.head_dim
    bits = COMPUTE_BITS[run.dtype]
    return allocated(max(model.rope_positions or model.max_model_len, run.max_model_len) * width * bits // 8)


def _mla_copies(placement: Placement, layers: int) -> int:
    """Return the bytes of MLA's copies of kv_b_proj in the model's dtype: W_UV and W_UK_T, which decoding uses.

    Only a quantised kv_b_proj is copied. Otherwise both are views. Source:
    layers/attention/mla_attention.py:split_kv_b_proj.
    """
    model, run, layout = placement.model, placement.run_config, placement.layout
    name = "model.layers.0.self_attn.kv_b_proj"
    quantized_in_checkpoint = schemes_of(model.quantization).of(name) is not None
    quantized_at_start = _quantized_share(model, run) < 1 and run.quantization != "experts_int8"
    if model.mla is None or not (quantized_in_checkpoint or quantized_at_start):
        return 0
    bits = COMPUTE_BITS[run.dtype]
    width = model.mla.qk_nope_head_dim + model.mla.v_head_dim
    return layers * allocated(model.mla.kv_lora_rank * model.heads // layout.tensor * width * bits // 8)


def _adapters(placement: Placement, layers: range) -> int:
    """Return the bytes of LoRA's matrices A and B for every linear layer of one rank and all adapter slots.

    If a layer is split along its outputs, each GPU has the complete A. If it is split along its inputs, each GPU has
    the complete B. Each expert has its own A and B. vLLM allocates the slots when it loads the model.
    Source: vllm/lora/layers (create_lora_weights).
    """
    model, run, layout = placement.model, placement.run_config, placement.layout
    if not run.adapter_ranks:
        return 0
    hidden, tensor, mla, experts = model.hidden_size, layout.tensor, model.mla, model.experts
    queries = model.heads * model.head_dim // tensor
    keys = max(1, model.kv_heads // tensor) * model.head_dim
    attention = 3 * hidden + queries + 2 * keys + queries + hidden
    if mla:
        heads, rope, nope = model.heads // tensor, mla.qk_rope_head_dim, mla.qk_nope_head_dim
        down = hidden + mla.q_lora_rank if mla.q_lora_rank else 0
        query = down + (mla.q_lora_rank or hidden) + heads * (nope + rope)
        latent = hidden + mla.kv_lora_rank + rope + mla.kv_lora_rank + heads * (nope + mla.v_head_dim)
        attention = query + latent + heads * mla.v_head_dim + hidden
    mixture = 0
    if experts:
        shard = expert_width(experts, layout)
        local = math.ceil(experts.count / expert_ranks(layout)) if layout.expert_parallel else experts.count
        shared = experts.shared_intermediate_size // tensor
        mixture = 3 * local * (hidden + shard) + (3 * (hidden + shared) if shared else 0)
    dense = 3 * (hidden + model.intermediate_size // tensor)
    total = sum(
        (attention if layer.kind != "mamba" else 0) + (mixture if layer.moe else dense)
        for layer in (model.layers[n] for n in layers)
    )
    ends = (layers.start == 0) + (layers.stop == len(model.layers))  # the embedding and the head
    total += ends * (hidden + model.vocab_size)
    bits = COMPUTE_BITS[run.dtype]
    return total * run.adapter_ranks * bits // 8
