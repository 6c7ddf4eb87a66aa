"""What a model's weights take on the heaviest GPU of a layout, from the names of its tensors. Pure.

vLLM fuses what the checkpoint keeps apart (query, key and value; gate and up; a layer's experts) and splits each by
the parallel linear layer that holds it; which one that is can be told from the name.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Collection, Sequence

import msgspec

from vllm_launch.machine.gpus import Gpu
from vllm_launch.model.model import Model, Tensor
from vllm_launch.model.quantization import is_ignored
from vllm_launch.sizing.parallel import Layout, expert_ranks, expert_width, layer_split, padded_vocab
from vllm_launch.sizing.run_config import Run
from vllm_launch.units import MIB

_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8, "BOOL": 8,
    "U16": 16, "U32": 32, "U64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4,
}  # fmt: skip
_MODEL_BITS = {"float32": 32, "float16": 16, "bfloat16": 16}

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)\.")
_VISION = re.compile(r"(?:^|\.)(?:visual|vision|vision_tower|vision_model|vision_encoder|image_newline|"
                     r"multi_modal_projector|mm_projector|audio_tower|patch_embed|aligner|mlp1)(?:\.|_|$)")  # fmt: skip
_SKIPPED = re.compile(r"rotary_emb\.inv_freq$|(?:^|\.)mtp\.|\.g_idx$|attn\.(?:masked_)?bias$|_(?:output|input)_scale$")
_QKV = re.compile(r"\.(?:q_proj|k_proj|v_proj|qkv_proj|query_key_value|c_attn|Wqkv|wqkv|W_pack)\.")
_KV = re.compile(r"\.(?:k_proj|v_proj)\.")
_GATE_UP = re.compile(r"\.(?:gate_proj|up_proj|gate_up_proj|w1|w3)\.")
_ROW = re.compile(r"\.(?:o_proj|down_proj|w2|out_proj|dense|dense_4h_to_h|c_proj|fc2|wo|attention\.dense)\.")
_REPLICATED = re.compile(
    r"norm|\.(?:gate|router|shared_expert_gate|q_a_proj|kv_a_proj_with_mqa|fused_qkv_a_proj|e_score_correction_bias|"
    r"sinks?_bias|wk|weights_proj|wq_a)\.|layernorm|\.ln_|position_embedding|\.wpe\.|e_score_correction_bias|"
    r"\.indexer\."
)
_VOCAB = re.compile(
    r"(?:^|\.)(?:embed_tokens|wte|word_embeddings|embedding|embed_in|tok_embeddings|embeddings)\.weight$"
)
_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out|output)\.")

_MXFP4_SPLITS = (
    "mxfp4 gate_up_proj_blocks",
    "mxfp4 down_proj_blocks",
    "mxfp4 gate_up_proj_scales",
    "mxfp4 down_proj_scales",
)
"""How the tensors of an MXFP4 expert are cut, by their kind: over ranks like other experts, then padded."""

_MXFP4_TILES = (128, 256)
"""Marlin, which runs MXFP4 experts before Hopper, and TensorRT-LLM pad their inner channels on one GPU, and the outer
ones, to multiples of these (fused_moe/oracle/mxfp4.py:mxfp4_round_up_hidden_size_and_intermediate_size)."""

_TRITON_TILE, _TRITON_INPUTS = 64, 128
"""On Hopper the Triton kernels pad the inner channels to the first, and inputs to the second, for their value layout
(triton_kernels' HopperMXValueLayout). gpt-oss-20b, H200, 2026-11-22: 13.03 GiB, of which 0.20 are this padding."""

_FIRST, _LAST = -1, -2

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


class _Part(msgspec.Struct, frozen=True):
    """One checkpoint tensor inside a fused one: ``size`` bytes, cut as ``split`` says."""

    split: str  # "tensor", "kv", "expert", one of _MXFP4_SPLITS, "vocab" or "whole"
    size: int
    linear: bool  # a matrix that quantising at the start would shrink
    kv_heads: int = 0


class _Fused(msgspec.Struct, frozen=True):
    """A tensor as vLLM allocates it. ``place`` is a layer's index, or _FIRST or _LAST: before or after all of them."""

    place: int
    parts: tuple[_Part, ...]


class _Fusing(msgspec.Struct):
    model: Model
    fused: tuple[_Fused, ...]


_FUSED: dict[tuple[int, bool, str | None], _Fusing] = {}
"""Last few results by the model's identity: plans try many layouts of one model, whose names stay the same."""
_REMEMBERED = 8


def weights(model: Model, run: Run, layout: Layout, gpu: Gpu | None = None) -> int:
    """Bytes of weights on the heaviest GPU, as "Model loading took" counts them: PyTorch's allocated bytes."""
    return max(by_rank(model, run, layout, gpu))


def by_rank(model: Model, run: Run, layout: Layout, gpu: Gpu | None = None) -> tuple[int, ...]:
    """Bytes of weights on a GPU of each pipeline rank; which kernels there are decides on padding."""
    counts = layer_split(len(model.layers), layout.pipeline)
    rank_of = [rank for rank, count in enumerate(counts) for _ in range(count)]
    shrink, growth = _shrink(model, run), _growth(model, layout, gpu)
    sizes = [0] * layout.pipeline
    for fused in _fuse(model, run):
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
        + _absorbed(model, run, layout, counts[rank])
        + _adapters(model, run, layout, range(starts[rank], starts[rank] + counts[rank]))
        for rank, size in enumerate(sizes)
    )


def _ranks(model: Model, fused: _Fused, rank_of: Sequence[int], layout: Layout) -> Collection[int]:
    """The pipeline ranks that hold a tensor.

    With tied embeddings the last one computes logits with a copy of what the first one looks tokens up in.
    """
    first, last = 0, layout.pipeline - 1
    if fused.place >= 0:
        return (rank_of[fused.place],)
    if not any(part.split == "vocab" for part in fused.parts):
        return (first if fused.place == _FIRST else last,)
    if fused.place == _FIRST:
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


def _fuse(model: Model, run: Run) -> tuple[_Fused, ...]:
    key = (id(model), run.language_model_only, run.dtype)
    known = _FUSED.get(key)
    if known is None or known.model is not model:
        if len(_FUSED) >= _REMEMBERED:
            _FUSED.clear()
        known = _FUSED[key] = _Fusing(model=model, fused=_fuse_names(model, run))
    return known.fused


def _fuse_names(model: Model, run: Run) -> tuple[_Fused, ...]:
    parts: defaultdict[tuple[int, str], list[_Part]] = defaultdict(list)
    bits = _MODEL_BITS[run.dtype if run.dtype in _MODEL_BITS else model.dtype]
    for tensor in model.tensors:
        if _SKIPPED.search(tensor.name):
            continue
        vision = bool(_VISION.search(tensor.name))
        if vision and run.language_model_only:
            continue
        if model.tie_word_embeddings and _HEAD.search(tensor.name) and "layers." not in tensor.name:
            continue
        found = None if vision else _LAYER.search(tensor.name)
        if found and int(found[1]) >= len(model.layers):
            continue  # multi-token prediction layers, loaded only for speculative decoding
        place = int(found[1]) if found else _LAST if _is_last(tensor.name) and not vision else _FIRST
        key, part = _classify(model, tensor, bits, vision=vision)
        parts[place, key].append(part)
    return tuple(_Fused(place, _merged(found)) for (place, _), found in parts.items())


def _is_last(name: str) -> bool:
    """On the last pipeline rank: the head and the final norm."""
    return bool(_HEAD.search(name)) or bool(re.search(r"(?:^|\.)(?:norm|final_layernorm|ln_f|norm_f)\.", name))


def _merged(parts: list[_Part]) -> tuple[_Part, ...]:
    """Parts that are cut alike become one; a layer's many experts would otherwise be added up in every plan."""
    sizes: defaultdict[tuple[str, bool, int], int] = defaultdict(int)
    for part in parts:
        sizes[part.split, part.linear, part.kv_heads] += part.size
    return tuple(_Part(split, size, linear, heads) for (split, linear, heads), size in sizes.items())


def _classify(model: Model, tensor: Tensor, model_bits: int, *, vision: bool) -> tuple[str, _Part]:  # noqa: PLR0911 - one return for each way to cut
    """The fused tensor that ``tensor`` goes into, and how it is cut."""
    name = tensor.name
    kind = name.rsplit(".", 1)[-1]
    stored = _BITS.get(tensor.dtype, 16)
    scale = "scale" in kind or kind in {"A_log", "absmax", "e_score_correction_bias"}
    bits = model_bits if tensor.dtype in {"F32", "F16", "BF16", "F64"} and not scale else stored
    size = math.ceil(math.prod(tensor.shape) * bits / 8)
    linear = kind == "weight" and len(tensor.shape) == 2 and tensor.dtype in {"F32", "F16", "BF16"}  # noqa: PLR2004
    path = f".{name}"
    if vision:
        return name, _Part("tensor" if len(tensor.shape) > 1 else "whole", size, linear=False)
    if _VOCAB.search(name) or (_HEAD.search(name) and ".layers." not in path):
        rows = tensor.shape[0] if tensor.shape else 1
        return name, _Part("vocab", size // rows * padded_vocab(rows) if rows else 0, linear=False)
    if ".experts." in path or re.search(r"\.experts_", path):
        down = re.search(r"\.(?:down_proj|w2|w_out)", path)
        split = f"mxfp4 {kind}" if f"mxfp4 {kind}" in _MXFP4_SPLITS else "expert"
        return f"{'w2' if down else 'w13'}.{_suffix(kind)}", _Part(split, size, linear or len(tensor.shape) == 3)  # noqa: PLR2004
    if _REPLICATED.search(path):
        return name, _Part("whole", size, linear=bool(linear and "_a_proj" in path))
    if _QKV.search(path):
        heads = _layer_kv_heads(model, name)
        split = "kv" if _KV.search(path) and heads else "tensor"
        return f"qkv.{kind}", _Part(split, size, linear, heads if split == "kv" else 0)
    if _GATE_UP.search(path):
        shared = "shared" if "shared_expert" in path else ""
        return f"gate_up{shared}.{kind}", _Part("tensor", size, linear)
    if _ROW.search(path):
        return name, _Part("whole" if kind == "bias" else "tensor", size, linear)
    return name, _Part("tensor", size, linear)


def _suffix(kind: str) -> str:
    """What the experts' tensors of one fused parameter have in common: weights apart from scales and biases."""
    for word in ("scale", "bias", "zeros"):
        if word in kind:
            return word
    return "weight"


def _growth(model: Model, layout: Layout, gpu: Gpu | None) -> dict[str, float]:
    """By how much padding makes the tensors of each of _MXFP4_SPLITS larger."""
    if model.experts is None or not model.experts.intermediate_size:
        return {}
    outer = model.hidden_size
    inner = max(1, expert_width(model.experts, layout))
    if gpu is None or gpu.compute_capability[0] == 9:  # noqa: PLR2004 - Hopper
        wide = _up(inner, _TRITON_TILE)
        up, down = wide * _up(outer, _TRITON_INPUTS), _up(wide, _TRITON_INPUTS) * outer
        sizes = (up, down, wide * outer, wide * outer)
    else:
        sizes = (_up(inner, _MXFP4_TILES[0]) * _up(outer, _MXFP4_TILES[1]),) * 4
    return {split: size / (inner * outer) for split, size in zip(_MXFP4_SPLITS, sizes, strict=True)}


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _layer_kv_heads(model: Model, name: str) -> int:
    found = _LAYER.search(name)
    layer = model.layers[int(found[1])] if found and int(found[1]) < len(model.layers) else None
    return layer.kv_heads if layer and layer.kv_heads else model.kv_heads


def _share(part: _Part, layout: Layout) -> int:
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


def _shrink(model: Model, run: Run) -> float:
    """What is left of an unquantised linear layer's bytes when it is quantised at the start (--quantization)."""
    if run.quantization is None or model.quantization is not None:
        return 1.0
    wide = _MODEL_BITS[run.dtype if run.dtype in _MODEL_BITS else model.dtype]
    if run.quantization == "bitsandbytes":
        return (4 + 32 / 64) / wide  # NF4, one float32 absmax for 64 weights
    if run.quantization.startswith(("fp8", "int8", "experts_int8", "mxfp8", "online")):
        return 8 / wide
    return 1.0


def _shrinks(part: _Part, run: Run) -> bool:
    """Whether quantising at the start reaches ``part``; experts_int8 leaves all but experts as they are."""
    return part.linear and (run.quantization != "experts_int8" or part.split == "expert")


def _rope_cache(model: Model, run: Run) -> int:
    """Cosines and sines of every position (rotary_embedding/base.py:_compute_cos_sin_cache), once per GPU."""
    kinds = {layer.kind for layer in model.layers}
    if kinds <= {"mamba", "none"}:
        return 0
    width = model.mla.qk_rope_head_dim if model.mla else model.head_dim
    bits = _MODEL_BITS[run.dtype if run.dtype in _MODEL_BITS else model.dtype]
    return allocated(max(model.rope_positions or model.max_model_len, run.max_model_len) * width * bits // 8)


def _absorbed(model: Model, run: Run, layout: Layout, layers: int) -> int:
    """MLA keeps a quantised kv_b_proj again in the model's dtype: the W_UV and W_UK_T that decoding multiplies by.

    Of one that is not quantised both are views. Source: layers/attention/mla_attention.py:split_kv_b_proj.
    """
    name = "model.layers.0.self_attn.kv_b_proj"
    stored = model.quantization is not None and not is_ignored(name, model.quantization)
    made = _shrink(model, run) < 1 and run.quantization != "experts_int8"
    if model.mla is None or not (stored or made):
        return 0
    bits = _MODEL_BITS[run.dtype if run.dtype in _MODEL_BITS else model.dtype]
    width = model.mla.qk_nope_head_dim + model.mla.v_head_dim
    return layers * allocated(model.mla.kv_lora_rank * model.heads // layout.tensor * width * bits // 8)


def _adapters(model: Model, run: Run, layout: Layout, layers: range) -> int:
    """LoRA's A and B beside every linear layer of one rank, for as many adapters as may run at once.

    What is cut along its outputs keeps A whole on each GPU, what is cut along its inputs keeps B whole; experts have
    one of each. Source: vllm/lora/layers (create_lora_weights), whose slots are filled when the model is loaded.
    """
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
    bits = _MODEL_BITS[run.dtype if run.dtype in _MODEL_BITS else model.dtype]
    return total * run.adapter_ranks * bits // 8
