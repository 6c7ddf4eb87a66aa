"""The cache of each decoder layer: attention kinds and recurrent states, by the rules of vLLM 0.32.0. Pure."""

from __future__ import annotations

import msgspec

from vllm_launch.model.config import Config
from vllm_launch.model.dtypes import SAFETENSORS_NAME
from vllm_launch.model.model import Layer, Mla

MLA_TYPES = {
    "axk1", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots3_note", "glm5_next", "glm5_next_text", "glm_moe_dsa",
    "glm4_moe_lite", "kimi_k2", "kimi_linear", "longcat_flash", "pangu_ultra_moe", "bailing_hybrid", "hy_v4",
}  # fmt: skip
"""Model types with multi-head latent attention (vllm/transformers_utils/model_arch_config_convertor.py:
is_deepseek_mla)."""

ENCODER_TYPES = {"bert", "roberta", "xlm-roberta", "modernbert", "nomic_bert", "new", "gte", "openai_privacy_filter"}
"""Model types that process their whole input at once and store no cache (vllm/model_executor/models:
EncoderOnlyAttention in bert.py, bert_with_rope.py, modernbert.py and openai_privacy_filter.py)."""

ENCODER_ARCHITECTURES = {
    "LlamaBidirectionalModel", "LlamaBidirectionalForSequenceClassification", "VoyageQwen3BidirectionalEmbedModel",
    "DeepseekV3BidirectionalModel",
}  # fmt: skip
"""Architectures that run a decoder as such an encoder (vllm/model_executor/models/config.py sets ``is_causal``)."""

FULL_EVERY = {
    "gemma2": 2, "gemma3": 6, "gemma3_text": 6, "gemma3n": 5, "gemma3n_text": 5, "cohere2": 4, "gpt_oss": 2,
    "exaone4": 4, "olmo3": 4, "llama4": 4, "llama4_text": 4, "gemma4": 6, "gemma4_text": 6,
    "qwen3_next": 4, "qwen3_5_text": 4, "qwen3_5_moe_text": 4,
}  # fmt: skip
"""Period of full attention by model type, in layers: the last layer of each period is full. Applies if config.json has
no ``layer_types``. Source: transformers' config classes."""

KIND_OF = {
    "full_attention": "full", "attention": "full", "sliding_attention": "sliding", "chunked_attention": "chunked",
    "linear_attention": "mamba", "mamba": "mamba", "conv": "mamba", "hybrid": "hybrid",
}  # fmt: skip
"""Kind of a layer by its name in ``layer_types`` or ``layers_block_type``."""


def attention_heads(config: Config) -> int:
    """Return the number of query heads, or 0 for a model without attention."""
    if attention_free(config):  # Mamba 2's ``num_heads`` counts heads of its state
        return 0
    return config.integer("num_attention_heads", "n_head", "num_heads")


def attention_free(config: Config) -> bool:
    """Whether the model has only Mamba layers."""
    return config.text("model_type") in {"mamba", "mamba2", "falcon_mamba"}


def encoder_only(config: Config) -> bool:
    """Whether attention is bidirectional, so that no later step reuses keys and values (models/llama.py: attn_type)."""
    model_type = config.text("model_type")
    if model_type in ENCODER_TYPES or not config.flag("is_causal", default=True):
        return True
    if model_type == "gemma3_text" and config.flag("use_bidirectional_attention"):
        return True
    return bool(ENCODER_ARCHITECTURES & set(config.strings("architectures") or ()))


def kv_heads(config: Config) -> int:
    """Return the number of KV heads (model_arch_config_convertor.py:get_total_num_kv_heads and its Falcon version)."""
    heads = attention_heads(config)
    model_type = config.text("model_type")
    if model_type in {"falcon", "RefinedWeb", "RefinedWebModel"}:
        if config.flag("new_decoder_architecture"):
            return config.integer("n_head_kv", "num_kv_heads", default=heads)
        return 1 if config.flag("multi_query", default=True) else heads
    if model_type == "gpt_bigcode" and config.flag("multi_query", default=True):
        return 1
    keys = ("n_head_kv", "num_kv_heads", "num_key_value_heads", "multi_query_group_num", "num_attention_groups")
    return config.integer(
        next((key for key in keys if config.has(key)), "num_key_value_heads"), default=heads, minimum=0
    )


def head_dim(config: Config) -> int:
    """Return the size of one head. For MLA, that of the parts that are not latent."""
    heads = attention_heads(config)
    explicit = config.optional_integer("head_dim", "hidden_size_per_head", "attention_head_dim", minimum=0)
    if explicit:
        return explicit
    hidden = config.integer("hidden_size", "n_embd", "d_model")
    if heads and hidden % heads and not config.has("kv_lora_rank"):
        raise config.error("num_attention_heads", f"is {heads}, which does not divide hidden_size {hidden}")
    return hidden // heads if heads else 0


def read_mla(config: Config) -> Mla | None:
    """Return the sizes of multi-head latent attention, or None if vLLM does not use it for this model."""
    if config.text("model_type") not in MLA_TYPES or not config.has("kv_lora_rank"):
        return None
    return Mla(
        kv_lora_rank=config.integer("kv_lora_rank"),
        qk_rope_head_dim=config.integer("qk_rope_head_dim", default=64),
        qk_nope_head_dim=config.integer("qk_nope_head_dim", default=128),
        v_head_dim=config.integer("v_head_dim", default=128),
        q_lora_rank=config.optional_integer("q_lora_rank"),
    )


def sliding_window(config: Config) -> int | None:
    """Return the sliding window in tokens, or None. ``use_sliding_window: false`` and a window of 0 switch it off."""
    if config.get("use_sliding_window") is False and not config.text("model_type").startswith("gemma"):
        return None
    return config.optional_integer("sliding_window", "sliding_window_size", "window_size", minimum=0) or None


def layer_count(config: Config) -> int:
    """Return the number of decoder layers. Nemotron-H may give only the list of its layers."""
    blocks = config.strings("layers_block_type") or config.get("hybrid_override_pattern")
    if config.text("model_type") == "nemotron_h" and isinstance(blocks, list | str):
        return len(blocks)
    return config.integer("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def layer_kinds(config: Config, count: int) -> list[str]:  # noqa: PLR0911 - one return for each format
    """Return each layer's kind: a value of KIND_OF, or "none" for a layer without a cache. Ignores window sizes."""
    model_type = config.text("model_type")
    if attention_free(config):
        return ["mamba"] * count
    if encoder_only(config):
        return ["none"] * count
    if model_type == "falcon_h1":
        return ["hybrid"] * count
    if model_type == "jamba":
        period, offset = (
            config.integer("attn_layer_period", default=8),
            config.integer("attn_layer_offset", default=4, minimum=0),
        )
        return ["full" if n % period == offset else "mamba" for n in range(count)]
    pattern = config.get("hybrid_override_pattern")
    if isinstance(pattern, str):
        kinds = {"M": "mamba", "*": "full"}
        return [kinds.get(letter, "none") for letter in pattern[:count].ljust(count, "-")]
    if model_type == "kimi_linear":
        linear = Config(config.table("linear_attn_config") or {}, f"{config.where} linear_attn_config")
        recurrent = linear.integers("kda_layers") or []  # numbered from 1 (vLLM: KimiLinearConfig.is_kda_layer)
        return ["mamba" if n + 1 in recurrent else "full" for n in range(count)]
    blocks = config.strings("layers_block_type")
    if model_type == "zamba2" and blocks:
        return [
            "hybrid" if block == "hybrid" else "mamba"
            for block in _first_entries(config, "layers_block_type", blocks, count)
        ]
    types = config.strings("layer_types") or blocks
    if types:
        key = "layer_types" if config.has("layer_types") else "layers_block_type"
        return [
            KIND_OF.get(layer_type, "none" if layer_type in {"moe", "mlp"} else "full")
            for layer_type in _first_entries(config, key, types, count)
        ]
    if model_type in {"lfm2", "lfm2_moe"}:
        attention = config.integers("full_attn_idxs")
        return ["full" if attention is None or n in attention else "mamba" for n in range(count)]
    return _periodic_kinds(config, model_type, count)


def _periodic_kinds(config: Config, model_type: str, count: int) -> list[str]:
    """Return the kinds of the layers of a model whose config class computes ``layer_types``."""
    full_layers = config.integers("full_attention_layers")
    period = FULL_EVERY.get(model_type)
    if period is not None:
        period = (
            config.integer("sliding_window_pattern", "full_attention_interval", default=period)
            if not isinstance(config.get("sliding_window_pattern"), str)
            else period
        )
        other = (
            "chunked" if model_type.startswith("llama4") else "mamba" if model_type.startswith("qwen3_") else "sliding"
        )
        if other == "chunked" and (with_rope := config.array("no_rope_layers")):  # 1: the layer has RoPE
            return ["chunked" if n < len(with_rope) and with_rope[n] else "full" for n in range(count)]
        return ["full" if (n + 1) % period == 0 else other for n in range(count)]
    if sliding_window(config) is None:
        return ["full"] * count
    if model_type.startswith("qwen") and config.flag("use_sliding_window"):
        first = config.integer("max_window_layers", default=count, minimum=0)
        return ["sliding" if n >= first else "full" for n in range(count)]
    return ["full" if full_layers and n in full_layers else "sliding" for n in range(count)]


def _first_entries(config: Config, key: str, entries: list[str], count: int) -> list[str]:
    if len(entries) < count:
        raise config.error(key, f"has {len(entries)} entries for {count} layers")
    return entries[:count]


def read_layers(config: Config, dtype: str, moe: list[bool]) -> tuple[Layer, ...]:
    """Return every layer's cache. ``dtype``: the model's, by safetensors' name. ``moe``: which layers have experts."""
    count = len(moe)
    mla, heads, dim, window = read_mla(config), kv_heads(config), head_dim(config), sliding_window(config)
    shared_from = count - config.integer("num_kv_shared_layers", default=0, minimum=0)
    layers = []
    for n, kind in enumerate(layer_kinds(config, count)):
        if kind in {"mamba", "hybrid"}:
            layer = _recurrent_layer(config, dtype)
            if kind == "hybrid":  # the layer has two caches: attention and a recurrent state
                layer = msgspec.structs.replace(layer, kind="full", kv_heads=heads, head_dim=dim, head_dim_v=dim)
            layers.append(msgspec.structs.replace(layer, moe=moe[n]))
        elif kind == "none" or n >= shared_from:
            layers.append(Layer(kind="none", moe=moe[n]))
        elif mla is not None:
            width = mla.kv_lora_rank + mla.qk_rope_head_dim
            index = _index_bytes(config) if _has_indexer(config, n) else 0
            layers.append(Layer(kind="mla", kv_heads=1, head_dim=width, head_dim_v=0, index_bytes=index, moe=moe[n]))
        elif kind == "sliding" and window:
            layers.append(
                Layer(kind="sliding", kv_heads=heads, head_dim=dim, head_dim_v=dim, window=window, moe=moe[n])
            )
        elif kind == "chunked":
            chunk = config.integer("attention_chunk_size", default=8192)
            layers.append(Layer(kind="chunked", kv_heads=heads, head_dim=dim, head_dim_v=dim, window=chunk, moe=moe[n]))
        else:
            layers.append(Layer(kind="full", kv_heads=heads, head_dim=dim, head_dim_v=dim, moe=moe[n]))
    return tuple(layers)


def _has_indexer(config: Config, n: int) -> bool:
    """Whether layer ``n`` of DeepSeek's sparse attention chooses tokens. Other layers use an earlier layer's choice.

    Source: vllm/model_executor/models/deepseek_v2.py:DeepseekV2MLAAttention.
    """
    if not config.has("index_topk"):
        return False
    pattern = config.get("index_topk_pattern")
    if isinstance(pattern, str | list):
        return not (n < len(pattern) and pattern[n] == "S")
    offset = config.integer("index_skip_topk_offset", default=2, minimum=0)
    return max(n - offset + 1, 0) % config.integer("index_topk_freq", default=1) == 0


def _index_bytes(config: Config) -> int:
    """Return the indexer's bytes per token: FP8 values and a float32 scale per 128 values (deepseek_v2.py:Indexer)."""
    width = config.integer("index_head_dim", default=128)
    return width + width // 128 * 4


def _recurrent_layer(config: Config, dtype: str) -> Layer:
    """Return a layer with the recurrent state of one request, before tensor parallelism.

    The first shape is the convolution's, (kernel - 1, channels). The second is the recurrent state's, (heads, ...).
    Tensor parallelism divides the last number of the first shape and the first number of the second. If ``n_groups`` is
    not a multiple of the tensor parallel size, vLLM copies Mamba 2's groups.
    Only Mamba 2 keeps a checkpoint of its prefill (mamba_mixer2.py:get_kv_cache_spec).
    Source: vllm/model_executor/layers/mamba/mamba_utils.py:MambaStateShapeCalculator.
    """
    model_type = config.text("model_type")
    if model_type in {"lfm2", "lfm2_moe"}:
        channels = config.integer("conv_dim", "hidden_size")
        return _state_layer(((config.integer("conv_L_cache", default=3) - 1, channels),), (dtype,))
    if config.has("linear_num_value_heads"):  # gated delta net
        keys, values = config.integer("linear_num_key_heads"), config.integer("linear_num_value_heads")
        key, value = config.integer("linear_key_head_dim"), config.integer("linear_value_head_dim")
        conv = (config.integer("linear_conv_kernel_dim", default=4) - 1, 2 * key * keys + value * values)
        ssm = SAFETENSORS_NAME.get(config.text("mamba_ssm_dtype"), dtype)
        return _state_layer((conv, (values, value, key)), (dtype, ssm))
    if model_type == "kimi_linear":
        linear = Config(config.table("linear_attn_config") or {}, f"{config.where} linear_attn_config")
        heads, dim = linear.integer("num_heads"), linear.integer("head_dim")
        kernel = linear.integer("short_conv_kernel_size", default=4)
        return _state_layer(((kernel - 1, 3 * heads * dim), (heads, dim, dim)), (dtype, "F32"))
    hidden = config.integer("hidden_size", "d_model")
    size = config.integer("mamba_d_state", "ssm_state_size", "state_size", default=16)
    kernel = config.integer("mamba_d_conv", "conv_kernel", default=4)
    expand = config.number("mamba_expand", "expand") or 2
    if model_type in {"jamba", "mamba", "falcon_mamba"}:
        width = (
            int(expand * hidden)
            if model_type == "jamba"
            else config.integer("intermediate_size", default=int(expand * hidden))
        )
        return _state_layer(((kernel - 1, width), (width, size)), (dtype, dtype))
    heads = config.integer("mamba_n_heads", "n_mamba_heads", "mamba_num_heads", "num_heads")
    width = config.optional_integer("mamba_d_ssm") or int(expand * hidden)
    is_auto = config.get("mamba_d_head") == "auto"
    explicit_dim = None if is_auto else config.optional_integer("mamba_d_head", "mamba_headdim", "mamba_head_dim")
    dim = explicit_dim or (config.integer("head_dim") if model_type == "mamba2" else width // heads)
    if model_type == "nemotron_h":
        width = heads * dim
    groups = config.integer("mamba_n_groups", "mamba_ngroups", "n_groups", default=1)
    ssm = SAFETENSORS_NAME.get(config.text("mamba_ssm_cache_dtype"), "F32") if model_type == "nemotron_h" else dtype
    return _state_layer(((kernel - 1, width + 2 * groups * size), (heads, dim, size)), (dtype, ssm), checkpoints=1)


def _state_layer(shapes: tuple[tuple[int, ...], ...], dtypes: tuple[str, ...], checkpoints: int = 0) -> Layer:
    return Layer(kind="mamba", state_shapes=shapes, state_dtypes=dtypes, state_checkpoints=checkpoints)
