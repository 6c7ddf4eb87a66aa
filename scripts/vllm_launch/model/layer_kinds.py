"""What each decoder layer is: full, sliding, chunked or no attention, or a recurrent state, as in vLLM 0.32.0. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_launch.model.config import Config

ENCODER_TYPES = {
    "bert", "roberta", "xlm-roberta", "modernbert", "nomic_bert", "new", "gte", "openai_privacy_filter",
    "embedding_gemma2_text", "siglip_text_model",
}  # fmt: skip
"""Model types that process their whole input at once and store no cache (vllm/model_executor/models:
EncoderOnlyAttention in bert.py, bert_with_rope.py, modernbert.py and openai_privacy_filter.py)."""

ENCODER_ARCHITECTURES = {
    "LlamaBidirectionalModel", "LlamaBidirectionalForSequenceClassification", "VoyageQwen3BidirectionalEmbedModel",
}  # fmt: skip
"""Architectures that run a decoder as such an encoder (vllm/model_executor/models/config.py sets ``is_causal``)."""

MIMO_V2 = {"mimo_v2", "mimo_v2_flash"}

DEEPSEEK_V4 = {"deepseek_v4", "deepseek_ref"}

ATTENTION_FREE = {"mamba", "mamba2", "falcon_mamba"}
"""Model types that have only layers of Mamba."""

OWN_WINDOWS = {
    "afmoe", "apertus", "cohere2", "cohere2_moe", "cohere_compass", "cwm", "diffusion_gemma_text",
    "embedding_gemma2", "exaone4", "exaone_moe",
    "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text", "gemma4", "gemma4_text",
    "gemma4_unified", "gemma4_unified_text", "gpt_oss", "granite",
    "granite_swa", "granitemoe", "granitemoe_swa", "laguna", "llama", "llama4_text", "mimo_v2", "mimo_v2_flash",
    "minimax_m2", "ministral", "mistral", "modernbert", "muse_glimmer_text", "nemotron_h", "olmo2", "olmo3", "plamo3",
    "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "rnj1", "step3p5", "step3p7", "vaultgemma",
}  # fmt: skip
"""Model types whose class in vLLM gives each layer its own window (model_executor/models: per_layer_sliding_window).
In other types with layers of several kinds no layer has a window (engine/arg_utils.py:create_engine_config)."""

KIND_OF = {
    "full_attention": "full", "attention": "full", "sliding_attention": "sliding", "chunked_attention": "chunked",
    "linear_attention": "mamba", "mamba": "mamba", "conv": "mamba", "hybrid": "hybrid", "moe": "none", "mlp": "none",
}  # fmt: skip
"""Kind of a layer by its name in ``layer_types`` or ``layers_block_type``."""


def attention_free(config: Config) -> bool:
    """Whether the model has only Mamba layers."""
    return config.text("model_type") in ATTENTION_FREE


def encoder_only(config: Config) -> bool:
    """Whether attention is bidirectional, so that no later step reuses keys and values (models/llama.py: attn_type)."""
    model_type = config.text("model_type")
    if model_type in ENCODER_TYPES or not config.flag("is_causal", default=True):
        return True
    if model_type == "gemma3_text" and config.flag("use_bidirectional_attention"):
        return True
    return bool(ENCODER_ARCHITECTURES & set(config.strings("architectures") or ()))


def searched_blocks(config: Config) -> list[Config]:
    """Return the entries of ``block_configs``: each layer's own sizes, found by architecture search (nemotron_nas.py).

    An empty list means a model whose layers are alike.
    """
    blocks = config.array("block_configs") or []
    where = f"{config.where} block_configs"
    return [Config(block if isinstance(block, dict) else {}, f"{where} {n}") for n, block in enumerate(blocks)]


def sliding_window(config: Config) -> int | None:
    """Return the sliding window in tokens, or None. ``use_sliding_window: false`` and a window of 0 switch it off."""
    if config.get("use_sliding_window") is False and not config.text("model_type").startswith("gemma"):
        return None
    window = config.optional_integer("sliding_window", "sliding_window_size", "window_size", minimum=0) or None
    if window and config.text("model_type") in {"cohere2", "cohere2_moe"}:
        return window + 1  # the window does not count the token itself (model_executor/models/commandr.py)
    return window


def layer_kinds(config: Config, count: int) -> list[str]:  # noqa: PLR0911 - one return for each format
    """Return each layer's kind: a value of KIND_OF, or "none" for a layer without a cache. Ignores window sizes."""
    model_type = config.text("model_type")
    if attention_free(config):
        return ["mamba"] * count
    if encoder_only(config):
        return ["none"] * count
    if blocks := searched_blocks(config):
        attends = [block.part("attention").flag("no_op") for block in blocks[:count]]
        return ["none" if no_op else "full" for no_op in attends] + ["full"] * (count - len(attends))
    pattern = config.get("hybrid_override_pattern")
    if isinstance(pattern, str):
        letters = {"M": "mamba", "*": "full"}
        return [letters.get(letter, "none") for letter in pattern[:count].ljust(count, "-")]
    if model_type in OWN_KINDS and (own := OWN_KINDS[model_type](config, count)) is not None:
        return own
    types = _layer_types(config, count)
    if types is None:
        return _kinds_without_types(config, model_type, count)
    kinds = [KIND_OF.get(layer_type, "full") for layer_type in types]
    if model_type not in OWN_WINDOWS and not all(kind == "sliding" for kind in kinds):
        return ["full" if kind == "sliding" else kind for kind in kinds]
    return kinds


def _jamba_kinds(config: Config, count: int) -> list[str]:
    period = config.integer("attn_layer_period", default=8)
    offset = config.integer("attn_layer_offset", default=4, minimum=0)
    return ["full" if n % period == offset else "mamba" for n in range(count)]


def _kimi_linear_kinds(config: Config, count: int) -> list[str]:
    linear = Config(config.table("linear_attn_config") or {}, f"{config.where} linear_attn_config")
    recurrent = linear.integers("kda_layers") or []  # numbered from 1 (vLLM: KimiLinearConfig.is_kda_layer)
    return ["mamba" if n + 1 in recurrent else "full" for n in range(count)]


def _zamba2_kinds(config: Config, count: int) -> list[str] | None:
    blocks = config.strings("layers_block_type")
    if not blocks:
        return None
    blocks = _first_entries(config, "layers_block_type", blocks, count)
    return ["hybrid" if block == "hybrid" else "mamba" for block in blocks]


def _mimo_v2_kinds(config: Config, count: int) -> list[str]:
    key = "hybrid_layer_pattern"
    slides = _first_entries(config, key, config.array(key) or [], count)
    return ["sliding" if slide == 1 else "full" for slide in slides]


def _bailing_hybrid_kinds(config: Config, count: int) -> list[str]:
    group = config.integer("layer_group_size", default=1)
    # Version 3 has a convolution, and full attention after the last whole group (bailing_moe_v3.py:_is_kda_layer).
    grouped = count // group * group if config.has("short_conv_kernel_size") else count
    return ["full" if (n + 1) % group == 0 or n >= grouped else "mamba" for n in range(count)]


def _lfm2_kinds(config: Config, count: int) -> list[str] | None:
    if config.has("layer_types"):
        return None
    attention = config.integers("full_attn_idxs")
    return ["full" if attention is None or n in attention else "mamba" for n in range(count)]


def _llama4_kinds(config: Config, count: int) -> list[str] | None:
    if config.has("layer_types"):
        return None
    period = config.integer("no_rope_layer_interval", "nope_layer_interval", default=4)
    with_rope = config.array("no_rope_layers") or [(n + 1) % period for n in range(count)]  # 0: no RoPE
    return ["chunked" if n < len(with_rope) and with_rope[n] else "full" for n in range(count)]


OWN_KINDS: dict[str, Callable[[Config, int], list[str] | None]] = {
    "bailing_hybrid": _bailing_hybrid_kinds,
    "falcon_h1": lambda _, count: ["hybrid"] * count,
    "jamba": _jamba_kinds,
    "kimi_linear": _kimi_linear_kinds,
    "llama4_text": _llama4_kinds,
    "zamba2": _zamba2_kinds,
    **dict.fromkeys(DEEPSEEK_V4, lambda _, count: ["compressed"] * count),
    **dict.fromkeys(("lfm2", "lfm2_moe"), _lfm2_kinds),
    **dict.fromkeys(MIMO_V2, _mimo_v2_kinds),
}
"""Functions that return the kinds of a model type with keys of its own, or None if config.json does not have them."""


def _layer_types(config: Config, count: int) -> list[str] | None:
    """Return the type of each layer, or None if neither config.json nor the config class has types.

    A default of the config class is one period of the pattern. config.json can have another length of it.
    """
    for key in ("layer_types", "layers_block_type"):
        if config.has(key) and (types := config.strings(key)):
            return _first_entries(config, key, types, count)
    pattern = config.strings("layer_types")
    if not count or not pattern or len(set(pattern)) == 1:
        return None
    period = config.get("sliding_window_pattern", "full_attention_interval")
    if isinstance(period, int) and not isinstance(period, bool) and period > 0:
        pattern = [next(other for other in pattern if other != "full_attention")] * (period - 1) + ["full_attention"]
    types = [pattern[n % len(pattern)] for n in range(count)]
    return [*types[:-1], config.text("last_layer_type", types[-1])]


def _kinds_without_types(config: Config, model_type: str, count: int) -> list[str]:
    """Return the kinds of a model without layer types: all layers have a window or none has, except in Qwen."""
    if sliding_window(config) is None:
        return ["full"] * count
    if model_type.startswith("qwen") and config.flag("use_sliding_window"):
        first = config.integer("max_window_layers", default=count, minimum=0)
        return ["sliding" if n >= first else "full" for n in range(count)]
    full_layers = config.integers("full_attention_layers")
    return ["full" if full_layers and n in full_layers else "sliding" for n in range(count)]


def _first_entries(config: Config, key: str, entries: list[Any], count: int) -> list[Any]:
    if len(entries) < count:
        raise config.error(key, f"has {len(entries)} entries for {count} layers")
    return entries[:count]
