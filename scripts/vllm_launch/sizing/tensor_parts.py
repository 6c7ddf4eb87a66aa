"""A checkpoint's tensors as vLLM allocates them: fused, and each part with its split. Pure.

vLLM fuses tensors that are separate in the checkpoint: query, key and value; gate and up; the experts of a layer. The
parallel linear layer that holds a tensor decides on its split. The name of the tensor identifies this layer.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict

import msgspec

from vllm_launch.model.dtypes import COMPUTE_BITS, STORED_BITS
from vllm_launch.model.model import Model, Tensor, TowerPart
from vllm_launch.sizing.parallel import padded_vocab
from vllm_launch.sizing.run_config import RunConfig

_EXPERT = re.compile(r"\.experts\.\d+\.")
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)\.")

_VISION = re.compile(
    r"(?:^|\.)(?:visual|vision|vision_tower|vision_model|vision_encoder|vision_adapter|vision_embed_tokens|image_newline|"
    r"multi_modal_projector|mm_projector|audio_tower|audio_encoder|patch_embed|aligner|mlp1|vpm|apm|connector|"
    r"embed_tokens_extend)(?:\.|_|$)"
)

_SKIPPED = re.compile(r"rotary_emb\.inv_freq$|(?:^|\.)mtp\.|\.g_idx$|attn\.(?:masked_)?bias$|_(?:output|input)_scale$")

_QKV = re.compile(r"\.(?:q_proj|k_proj|v_proj|qkv_proj|query_key_value|c_attn|Wqkv|wqkv|W_pack)\.")

_KV = re.compile(r"\.(?:k_proj|v_proj)\.")

_GATE_UP = re.compile(r"\.(?:gate_proj|up_proj|gate_up_proj|w1|w3)\.")

_ROW = re.compile(r"\.(?:o_proj|down_proj|w2|out_proj|dense|dense_4h_to_h|c_proj|fc2|wo|attention\.dense)\.")

_REPLICATED = re.compile(
    r"norm|\.(?:gate|router|shared_expert_gate|q_a_proj|kv_a_proj_with_mqa|fused_qkv_a_proj|e_score_correction_bias|"
    r"sinks?_bias|wk|weights_proj|wq_a)\.|layernorm|\.ln_|position_embedding|\.wpe\.|e_score_correction_bias|"
    r"\.indexer\.|\.hc_|_res_proj\."
)

_VOCAB = re.compile(
    r"(?:^|\.)(?:embed_tokens|wte|word_embeddings|embedding|embed_in|tok_embeddings|embeddings)\.weight$"
)

_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out|output)\.")

MXFP4_SPLITS = (
    "mxfp4 gate_up_proj_blocks",
    "mxfp4 down_proj_blocks",
    "mxfp4 gate_up_proj_scales",
    "mxfp4 down_proj_scales",
)
"""Splits of the tensors of MXFP4 experts, by kind: over ranks like other experts, then padded."""

FIRST, _LAST = -1, -2
"""Values of ``Fused.place`` for tensors before and after all layers."""


class Part(msgspec.Struct, frozen=True):
    """A checkpoint tensor, or several with the same split, inside a fused tensor. ``size`` is in bytes."""

    split: str  # "tensor", "kv", "expert", one of MXFP4_SPLITS, "vocab" or "whole"
    size: int
    linear: bool  # a matrix that --quantization would make smaller
    kv_heads: int = 0


class Fused(msgspec.Struct, frozen=True):
    """A tensor as vLLM allocates it.

    ``place`` is a layer's index, or FIRST or _LAST. ``path`` is the parameter's name, in a layer its name in the layer.
    """

    place: int
    parts: tuple[Part, ...]
    path: str = ""


class _CacheEntry(msgspec.Struct):
    model: Model
    fused: tuple[Fused, ...]


_CACHE: dict[tuple[int, bool, frozenset[str], bool, str | None], _CacheEntry] = {}
"""Cache keyed by model: a plan evaluates many layouts of one model, and tensor names do not change between them."""

_MAX_CACHED_MODELS = 8


def fused_tensors(model: Model, run: RunConfig) -> tuple[Fused, ...]:
    """Return the tensors that vLLM allocates for ``model``."""
    whole_towers = run.mm_encoder_tp_mode == "data"
    key = (id(model), run.language_model_only, run.disabled_modalities, whole_towers, run.dtype)
    entry = _CACHE.get(key)
    if entry is None or entry.model is not model:
        if len(_CACHE) >= _MAX_CACHED_MODELS:
            _CACHE.clear()
        entry = _CACHE[key] = _CacheEntry(model=model, fused=_fuse_names(model, run))
    return entry.fused


def _fuse_names(model: Model, run: RunConfig) -> tuple[Fused, ...]:
    parts: defaultdict[tuple[int, str], list[Part]] = defaultdict(list)
    names: dict[tuple[int, str], str] = {}
    places: dict[tuple[str, str, tuple[int, ...]], tuple[int, str, Part] | None] = {}
    for tensor in model.tensors:
        # The experts of a layer are many and alike: look at one of them.
        alike = (_EXPERT.sub(".experts.0.", tensor.name), tensor.dtype, tensor.shape)
        if alike not in places:
            places[alike] = _place(model, run, tensor)
        if (found := places[alike]) is not None:
            place, key, part = found
            parts[place, key].append(part)
            names.setdefault((place, key), tensor.name)
    return tuple(
        Fused(place, _merged(same_tensor), _path(names[place, key], key)) for (place, key), same_tensor in parts.items()
    )


def _place(model: Model, run: RunConfig, tensor: Tensor) -> tuple[int, str, Part] | None:
    """Return the layer of ``tensor``, the fused tensor that it belongs to, and its part of it. None: not loaded."""
    if _SKIPPED.search(tensor.name):
        return None
    supported = model.media is None or model.media.encoder_tp_data  # else vLLM splits the tower and warns
    tower = _tower_of(tensor, data_parallel=run.mm_encoder_tp_mode == "data" and supported)
    if tower is not None and not _is_loaded(tower, run):
        return None
    # Most pooling models have no head (model_executor/models/adapters.py:_create_pooling_model_cls).
    headless = model.tie_word_embeddings or (model.task == "pooling" and not model.keeps_head)
    if headless and _HEAD.search(tensor.name) and "layers." not in tensor.name:
        return None
    layer = None if tower is not None else _LAYER.search(tensor.name)
    if layer and int(layer[1]) >= len(model.layers):
        return None  # multi-token prediction layers, loaded only for speculative decoding
    place = int(layer[1]) if layer else _LAST if _is_last(tensor.name) and tower is None else FIRST
    return place, *_classify(model, tensor, COMPUTE_BITS[run.dtype], tower)


def _path(name: str, key: str) -> str:
    """Return vLLM's name of the parameter that holds the checkpoint's tensor ``name``, without the layer's prefix.

    ``key``: of ``_classify``. Source: the packed_modules_mapping of vLLM's models, fused_moe/layer.py (w13, w2).
    """
    layer = _LAYER.search(name)
    path = name[layer.end() :] if layer else name
    if key.startswith(("w13.", "w2.")):
        kind = path.rsplit(".", 1)[-1]
        return f"{path.partition('experts')[0]}experts.{key.partition('.')[0]}_{kind}"
    if key.startswith("qkv."):
        return re.sub(r"\b[qkv]_proj\b", "qkv_proj", path)
    if key.startswith("gate_up"):
        return re.sub(r"\b(?:gate_proj|up_proj|w1|w3)\b", "gate_up_proj", path)
    return path


def _tower_of(tensor: Tensor, *, data_parallel: bool) -> TowerPart | None:
    """Return what vLLM does with a tensor of a tower, or None for the language model's.

    For tensors from safetensors headers it is guessed from their names. ``data_parallel``: each rank has all tensors
    (--mm-encoder-tp-mode data).
    """
    tower = tensor.tower
    if tower is None and _VISION.search(tensor.name):
        modalities = ("audio",) if "audio" in tensor.name else ("image", "video")
        tower = TowerPart(modalities=modalities, split=len(tensor.shape) > 1)
    return msgspec.structs.replace(tower, split=False) if tower and data_parallel else tower


def _is_loaded(tower: TowerPart, run: RunConfig) -> bool:
    """Whether vLLM loads a tensor of a tower (model_executor/models/interfaces.py:_mark_tower_model)."""
    if not tower.modalities:
        return True
    return not run.language_model_only and not run.disabled_modalities.issuperset(tower.modalities)


def _is_last(name: str) -> bool:
    """Whether a tensor is on the last pipeline rank: the head and the final norm."""
    return bool(_HEAD.search(name)) or bool(re.search(r"(?:^|\.)(?:norm|final_layernorm|ln_f|norm_f)\.", name))


def _merged(parts: list[Part]) -> tuple[Part, ...]:
    """Return ``parts`` with one part for each split, so that a plan does not add up the many experts of a layer."""
    sizes: defaultdict[tuple[str, bool, int], int] = defaultdict(int)
    for part in parts:
        sizes[part.split, part.linear, part.kv_heads] += part.size
    return tuple(Part(split, size, linear, heads) for (split, linear, heads), size in sizes.items())


def _classify(model: Model, tensor: Tensor, model_bits: int, tower: TowerPart | None) -> tuple[str, Part]:  # noqa: PLR0911 - one return for each split
    """Return the name of the fused tensor that ``tensor`` belongs to, and its part of it."""
    name = tensor.name
    kind = name.rsplit(".", 1)[-1]
    stored = STORED_BITS[tensor.dtype]
    scale = "scale" in kind or kind in {"A_log", "absmax", "e_score_correction_bias"}
    bits = model_bits if tensor.dtype in {"F32", "F16", "BF16", "F64"} and not scale else stored
    size = math.ceil(math.prod(tensor.shape) * bits / 8)
    linear = kind == "weight" and len(tensor.shape) == 2 and tensor.dtype in {"F32", "F16", "BF16"}  # noqa: PLR2004
    path = f".{name}"
    if tower is not None:
        return name, Part("tensor" if tower.split else "whole", size, linear=False)
    if _VOCAB.search(name) or (_HEAD.search(name) and ".layers." not in path):
        rows = tensor.shape[0] if tensor.shape else 1
        return name, Part("vocab", size // rows * padded_vocab(rows) if rows else 0, linear=False)
    if ".experts." in path or re.search(r"\.experts_", path):
        down = re.search(r"\.(?:down_proj|w2|w_out)", path)
        split = f"mxfp4 {kind}" if f"mxfp4 {kind}" in MXFP4_SPLITS else "expert"
        return f"{'w2' if down else 'w13'}.{_suffix(kind)}", Part(split, size, linear or len(tensor.shape) == 3)  # noqa: PLR2004
    if _REPLICATED.search(path):
        return name, Part("whole", size, linear=bool(linear and "_a_proj" in path))
    if _QKV.search(path):
        heads = _layer_kv_heads(model, name)
        split = "kv" if _KV.search(path) and heads else "tensor"
        return f"qkv.{kind}", Part(split, size, linear, heads if split == "kv" else 0)
    if _GATE_UP.search(path):
        shared = "shared" if "shared_expert" in path else ""
        return f"gate_up{shared}.{kind}", Part("tensor", size, linear)
    if _ROW.search(path):
        return name, Part("whole" if kind == "bias" else "tensor", size, linear)
    return name, Part("tensor", size, linear)


def _suffix(kind: str) -> str:
    """Return the common name of the experts' tensors that vLLM fuses: scales, biases and zeros, or else weights."""
    for word in ("scale", "bias", "zeros"):
        if word in kind:
            return word
    return "weight"


def _layer_kv_heads(model: Model, name: str) -> int:
    match = _LAYER.search(name)
    layer = model.layers[int(match[1])] if match and int(match[1]) < len(model.layers) else None
    return layer.kv_heads if layer and layer.kv_heads else model.kv_heads
