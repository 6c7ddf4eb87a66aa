"""What a model's weights take on the heaviest GPU of a layout: tensors, padding, tables, adapters. Bytes. Pure."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from vllm_launch.machine.generation import Generation
from vllm_launch.model.dtypes import COMPUTE_BITS
from vllm_launch.model.model import Model
from vllm_launch.model.quantization import is_ignored
from vllm_launch.sizing.parallel import Layout, expert_ranks, expert_width
from vllm_launch.sizing.placement import Placement
from vllm_launch.sizing.run_config import RunConfig
from vllm_launch.sizing.tensor_parts import FIRST, MXFP4_SPLITS, Fused, Part, fused_tensors
from vllm_launch.units import MIB

_MXFP4_TILES = (128, 256)
"""Marlin, which runs MXFP4 experts before Hopper, and TensorRT-LLM pad their inner channels on one GPU, and the outer
ones, to multiples of these (fused_moe/oracle/mxfp4.py:mxfp4_round_up_hidden_size_and_intermediate_size)."""

_TRITON_TILE, _TRITON_INPUTS = 64, 128
"""On Hopper the Triton kernels pad the inner channels to the first, and inputs to the second, for their value layout
(triton_kernels' HopperMXValueLayout). gpt-oss-20b, H200, 2026-11-22: 13.03 GiB, of which 0.20 are this padding."""

_HEADS_EVERYWHERE = {
    "bloom", "chatglm", "dbrx", "falcon", "gemma", "gemma2", "gemma3", "gemma3_text", "gemma4", "gemma4_text", "gpt2",
    "gptj", "gpt_oss", "granitemoe", "granitemoehybrid", "granitemoeshared", "internlm2", "jamba", "minicpm", "mixtral",
    "nemotron_h", "olmoe", "opt", "orion", "phimoe", "qwen2_moe", "qwen3_moe", "qwen3_next", "stablelm",
}  # fmt: skip
"""Model types that make their head, untied, on every pipeline rank and not on the last alone
(vllm/model_executor/models: ``lm_head = ParallelLMHead`` without ``is_last_rank`` before it)."""

_EMBEDS_EVERYWHERE = _HEADS_EVERYWHERE | {
    "cohere", "cohere2", "lfm2", "lfm2_moe", "qwen3_5_text", "qwen3_5_moe_text"
}  # fmt: skip
"""The same of their embedding and ``is_first_rank``."""


def weights(placement: Placement) -> int:
    """Bytes of weights on the heaviest GPU, as "Model loading took" counts them: PyTorch's allocated bytes."""
    return max(by_rank(placement))


def by_rank(placement: Placement) -> tuple[int, ...]:
    """Bytes of weights on a GPU of each pipeline rank; which kernels there are decides on padding."""
    model, run, layout = placement.model, placement.run_config, placement.layout
    counts, rank_of = placement.layers_by_rank, placement.rank_of_layer
    shrink, growth = _shrink(model, run), _growth(placement)
    sizes = [0] * layout.pipeline
    for fused in fused_tensors(model, run):
        size = allocated(
            sum(
                math.ceil(_share(part, layout) * (shrink if _shrinks(part, run) else 1) * growth.get(part.split, 1))
                for part in fused.parts
            )
        )
        for rank in _ranks(model, fused, rank_of, layout):
            sizes[rank] += size
    starts = [sum(counts[:rank]) for rank in range(layout.pipeline)]
    return tuple(
        size
        + _rope_cache(model, run)
        + _absorbed(placement, counts[rank])
        + _adapters(placement, range(starts[rank], starts[rank] + counts[rank]))
        for rank, size in enumerate(sizes)
    )


def _ranks(model: Model, fused: Fused, rank_of: Sequence[int], layout: Layout) -> Collection[int]:
    """The pipeline ranks that hold a tensor.

    With tied embeddings the last one computes logits with a copy of what the first one looks tokens up in.
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
    """What PyTorch's allocator sets aside for a tensor of ``size`` bytes while vLLM loads.

    512-byte steps; from 10 MiB on a tensor has a segment of its own, in steps of 2 MiB, whose rest is given to others
    only if it is larger than 1 MiB, and never from 20 MiB on, which is vLLM's max_split_size while loading.
    Source: c10/cuda/CUDACachingAllocator.cpp (kRoundLarge, should_split), v1/worker/gpu_worker.py:load_model.
    """
    size = -(-size // 512) * 512
    if size < 10 * MIB:
        return size
    segment = -(-size // (2 * MIB)) * 2 * MIB
    return size if segment < 20 * MIB and segment - size > MIB else segment


def _growth(placement: Placement) -> dict[str, float]:
    """By how much padding makes the tensors of each of MXFP4_SPLITS larger."""
    model, layout = placement.model, placement.layout
    if model.experts is None or not model.experts.intermediate_size:
        return {}
    outer = model.hidden_size
    inner = max(1, expert_width(model.experts, layout))
    if placement.generation in {None, Generation.HOPPER}:
        wide = _up(inner, _TRITON_TILE)
        up, down = wide * _up(outer, _TRITON_INPUTS), _up(wide, _TRITON_INPUTS) * outer
        sizes = (up, down, wide * outer, wide * outer)
    else:
        sizes = (_up(inner, _MXFP4_TILES[0]) * _up(outer, _MXFP4_TILES[1]),) * 4
    return {split: size / (inner * outer) for split, size in zip(MXFP4_SPLITS, sizes, strict=True)}


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _share(part: Part, layout: Layout) -> int:
    """Bytes of ``part`` on one GPU."""
    match part.split:
        case "tensor" | "vocab":
            return math.ceil(part.size / layout.tensor)
        case "kv":
            return math.ceil(part.size / min(layout.tensor, part.kv_heads))
        case "whole":
            return part.size
        case _:  # experts
            return math.ceil(part.size / expert_ranks(layout))


def _shrink(model: Model, run: RunConfig) -> float:
    """What is left of an unquantised linear layer's bytes when it is quantised at the start (--quantization)."""
    if run.quantization is None or model.quantization is not None:
        return 1.0
    wide = COMPUTE_BITS[run.dtype]
    if run.quantization == "bitsandbytes":
        return (4 + 32 / 64) / wide  # NF4, one float32 absmax for 64 weights
    if run.quantization.startswith(("fp8", "int8", "experts_int8", "mxfp8", "online")):
        return 8 / wide
    return 1.0


def _shrinks(part: Part, run: RunConfig) -> bool:
    """Whether quantising at the start reaches ``part``; experts_int8 leaves all but experts as they are."""
    return part.linear and (run.quantization != "experts_int8" or part.split == "expert")


def _rope_cache(model: Model, run: RunConfig) -> int:
    """Cosines and sines of every position (rotary_embedding/base.py:_compute_cos_sin_cache), once per GPU."""
    kinds = {layer.kind for layer in model.layers}
    if kinds <= {"mamba", "none"}:
        return 0
    width = model.mla.qk_rope_head_dim if model.mla else model.head_dim
    bits = COMPUTE_BITS[run.dtype]
    return allocated(max(model.rope_positions or model.max_model_len, run.max_model_len) * width * bits // 8)


def _absorbed(placement: Placement, layers: int) -> int:
    """MLA keeps a quantised kv_b_proj again in the model's dtype: the W_UV and W_UK_T that decoding multiplies by.

    Of one that is not quantised both are views. Source: layers/attention/mla_attention.py:split_kv_b_proj.
    """
    model, run, layout = placement.model, placement.run_config, placement.layout
    name = "model.layers.0.self_attn.kv_b_proj"
    stored = model.quantization is not None and not is_ignored(name, model.quantization)
    made = _shrink(model, run) < 1 and run.quantization != "experts_int8"
    if model.mla is None or not (stored or made):
        return 0
    bits = COMPUTE_BITS[run.dtype]
    width = model.mla.qk_nope_head_dim + model.mla.v_head_dim
    return layers * allocated(model.mla.kv_lora_rank * model.heads // layout.tensor * width * bits // 8)


def _adapters(placement: Placement, layers: range) -> int:
    """LoRA's A and B beside every linear layer of one rank, for as many adapters as may run at once.

    What is cut along its outputs keeps A whole on each GPU, what is cut along its inputs keeps B whole; experts have
    one of each. Source: vllm/lora/layers (create_lora_weights), whose slots are filled when the model is loaded.
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
        cut = expert_width(experts, layout)
        local = math.ceil(experts.count / expert_ranks(layout)) if layout.expert_parallel else experts.count
        shared = experts.shared_intermediate_size // tensor
        mixture = 3 * local * (hidden + cut) + (3 * (hidden + shared) if shared else 0)
    dense = 3 * (hidden + model.intermediate_size // tensor)
    total = sum(
        (attention if layer.kind != "mamba" else 0) + (mixture if layer.moe else dense)
        for layer in (model.layers[n] for n in layers)
    )
    ends = (layers.start == 0) + (layers.stop == len(model.layers))  # the embedding and the head
    total += ends * (hidden + model.vocab_size)
    bits = COMPUTE_BITS[run.dtype]
    return total * run.adapter_ranks * bits // 8
