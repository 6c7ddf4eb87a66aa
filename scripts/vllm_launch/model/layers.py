"""What each decoder layer keeps of the past: attention kinds and recurrent states, as vLLM 0.32.0 decides. Pure."""

from __future__ import annotations

import msgspec

from vllm_launch.model.config import Config
from vllm_launch.model.dtypes import SAFETENSORS_NAME
from vllm_launch.model.model import Layer, Mla

MLA_TYPES = {
    "axk1", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots3_note", "glm5_next", "glm5_next_text", "glm_moe_dsa",
    "glm4_moe_lite", "kimi_k2", "kimi_linear", "longcat_flash", "pangu_ultra_moe", "bailing_hybrid", "hy_v4",
}  # fmt: skip
"""vllm/transformers_utils/model_arch_config_convertor.py:is_deepseek_mla."""

ENCODER_TYPES = {"bert", "roberta", "xlm-roberta", "modernbert", "nomic_bert", "new", "gte", "openai_privacy_filter"}
"""Model types that read their whole input at once and keep nothing of it (vllm/model_executor/models:
EncoderOnlyAttention in bert.py, bert_with_rope.py, modernbert.py and openai_privacy_filter.py)."""

ENCODERS = {
    "LlamaBidirectionalModel", "LlamaBidirectionalForSequenceClassification", "VoyageQwen3BidirectionalEmbedModel",
    "DeepseekV3BidirectionalModel",
}  # fmt: skip
"""Architectures that make such an encoder of a decoder (vllm/model_executor/models/config.py sets ``is_causal``)."""

FULL_EVERY = {
    "gemma2": 2, "gemma3": 6, "gemma3_text": 6, "gemma3n": 5, "gemma3n_text": 5, "cohere2": 4, "gpt_oss": 2,
    "exaone4": 4, "olmo3": 4, "llama4": 4, "llama4_text": 4, "gemma4": 6, "gemma4_text": 6,
    "qwen3_next": 4, "qwen3_5_text": 4, "qwen3_5_moe_text": 4,
}  # fmt: skip
"""Of so many layers the last is full attention, where config.json gives no ``layer_types`` (transformers' configs)."""

KIND_OF = {
    "full_attention": "full", "attention": "full", "sliding_attention": "sliding", "chunked_attention": "chunked",
    "linear_attention": "mamba", "mamba": "mamba", "conv": "mamba", "hybrid": "hybrid",
}  # fmt: skip


def attention_heads(config: Config) -> int:
    """Query heads; 0 for a model without attention."""
    if attention_free(config):  # Mamba 2's ``num_heads`` are of its state
        return 0
    return config.whole("num_attention_heads", "n_head", "num_heads")


def attention_free(config: Config) -> bool:
    """Mamba alone."""
    return config.text("model_type") in {"mamba", "mamba2", "falcon_mamba"}


def encoder_only(config: Config) -> bool:
    """Attention looks both ways, so no keys and values are of use to a later step (models/llama.py: attn_type)."""
    model_type = config.text("model_type")
    if model_type in ENCODER_TYPES or not config.flag("is_causal", default=True):
        return True
    if model_type == "gemma3_text" and config.flag("use_bidirectional_attention"):
        return True
    return bool(ENCODERS & set(config.strings("architectures") or ()))


def kv_heads(config: Config) -> int:
    """Key-value heads (model_arch_config_convertor.py:get_total_num_kv_heads and its Falcon form)."""
    heads = attention_heads(config)
    model_type = config.text("model_type")
    if model_type in {"falcon", "RefinedWeb", "RefinedWebModel"}:
        if config.flag("new_decoder_architecture"):
            return config.whole("n_head_kv", "num_kv_heads", default=heads)
        return 1 if config.flag("multi_query", default=True) else heads
    if model_type == "gpt_bigcode" and config.flag("multi_query", default=True):
        return 1
    keys = ("n_head_kv", "num_kv_heads", "num_key_value_heads", "multi_query_group_num", "num_attention_groups")
    return config.whole(next((key for key in keys if config.has(key)), "num_key_value_heads"), default=heads, least=0)


def head_dim(config: Config) -> int:
    """Width of one head; for MLA of the parts that are not latent."""
    heads = attention_heads(config)
    explicit = config.optional("head_dim", "hidden_size_per_head", "attention_head_dim", least=0)
    if explicit:
        return explicit
    hidden = config.whole("hidden_size", "n_embd", "d_model")
    if heads and hidden % heads and not config.has("kv_lora_rank"):
        raise config.wrong("num_attention_heads", f"is {heads}, which does not divide hidden_size {hidden}")
    return hidden // heads if heads else 0


def read_mla(config: Config) -> Mla | None:
    """Multi-head latent attention, where vLLM uses it for this model type."""
    if config.text("model_type") not in MLA_TYPES or not config.has("kv_lora_rank"):
        return None
    return Mla(
        kv_lora_rank=config.whole("kv_lora_rank"),
        qk_rope_head_dim=config.whole("qk_rope_head_dim", default=64),
        qk_nope_head_dim=config.whole("qk_nope_head_dim", default=128),
        v_head_dim=config.whole("v_head_dim", default=128),
        q_lora_rank=config.optional("q_lora_rank"),
    )


def sliding_window(config: Config) -> int | None:
    """The window; None where there is none. ``use_sliding_window: false`` and 0 switch it off."""
    if config.get("use_sliding_window") is False and not config.text("model_type").startswith("gemma"):
        return None
    return config.optional("sliding_window", "sliding_window_size", "window_size", least=0) or None


def layer_count(config: Config) -> int:
    """Decoder layers. Nemotron-H may give their list alone."""
    blocks = config.strings("layers_block_type") or config.get("hybrid_override_pattern")
    if config.text("model_type") == "nemotron_h" and isinstance(blocks, list | str):
        return len(blocks)
    return config.whole("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def layer_words(config: Config, count: int) -> list[str]:  # noqa: PLR0911 - one return for each way to say it
    """One of KIND_OF's values, "none" or "moe"/"mlp" (no cache) for each layer, before windows are looked at."""
    model_type = config.text("model_type")
    if attention_free(config):
        return ["mamba"] * count
    if encoder_only(config):
        return ["none"] * count
    if model_type == "falcon_h1":
        return ["hybrid"] * count
    if model_type == "jamba":
        period, offset = (
            config.whole("attn_layer_period", default=8),
            config.whole("attn_layer_offset", default=4, least=0),
        )
        return ["full" if n % period == offset else "mamba" for n in range(count)]
    pattern = config.get("hybrid_override_pattern")
    if isinstance(pattern, str):
        kinds = {"M": "mamba", "*": "full"}
        return [kinds.get(letter, "none") for letter in pattern[:count].ljust(count, "-")]
    if model_type == "kimi_linear":
        linear = Config(config.table("linear_attn_config") or {}, f"{config.where} linear_attn_config")
        recurrent = linear.wholes("kda_layers") or []  # counted from 1 (vLLM: KimiLinearConfig.is_kda_layer)
        return ["mamba" if n + 1 in recurrent else "full" for n in range(count)]
    blocks = config.strings("layers_block_type")
    if model_type == "zamba2" and blocks:
        return [
            "hybrid" if block == "hybrid" else "mamba"
            for block in _of_length(config, "layers_block_type", blocks, count)
        ]
    words = config.strings("layer_types") or blocks
    if words:
        key = "layer_types" if config.has("layer_types") else "layers_block_type"
        return [
            KIND_OF.get(word, "none" if word in {"moe", "mlp"} else "full")
            for word in _of_length(config, key, words, count)
        ]
    if model_type in {"lfm2", "lfm2_moe"}:
        attention = config.wholes("full_attn_idxs")
        return ["full" if attention is None or n in attention else "mamba" for n in range(count)]
    return _patterned(config, model_type, count)


def _patterned(config: Config, model_type: str, count: int) -> list[str]:
    """The kinds of a model whose config class makes ``layer_types`` by itself."""
    full = config.wholes("full_attention_layers")
    period = FULL_EVERY.get(model_type)
    if period is not None:
        period = (
            config.whole("sliding_window_pattern", "full_attention_interval", default=period)
            if not isinstance(config.get("sliding_window_pattern"), str)
            else period
        )
        other = (
            "chunked" if model_type.startswith("llama4") else "mamba" if model_type.startswith("qwen3_") else "sliding"
        )
        if other == "chunked" and (rope := config.items("no_rope_layers")):
            return ["chunked" if n < len(rope) and rope[n] else "full" for n in range(count)]
        return ["full" if (n + 1) % period == 0 else other for n in range(count)]
    if sliding_window(config) is None:
        return ["full"] * count
    if model_type.startswith("qwen") and config.flag("use_sliding_window"):
        first = config.whole("max_window_layers", default=count, least=0)
        return ["sliding" if n >= first else "full" for n in range(count)]
    return ["full" if full and n in full else "sliding" for n in range(count)]


def _of_length(config: Config, key: str, words: list[str], count: int) -> list[str]:
    if len(words) < count:
        raise config.wrong(key, f"has {len(words)} entries for {count} layers")
    return words[:count]


def read_layers(config: Config, dtype: str, moe: list[bool]) -> tuple[Layer, ...]:
    """Every layer's cache. ``moe`` says which layers have experts; ``dtype`` is the model's."""
    count = len(moe)
    mla, heads, dim, window = read_mla(config), kv_heads(config), head_dim(config), sliding_window(config)
    shared_from = count - config.whole("num_kv_shared_layers", default=0, least=0)
    layers = []
    for n, word in enumerate(layer_words(config, count)):
        if word in {"mamba", "hybrid"}:
            layer = _recurrent(config, dtype)
            if word == "hybrid":  # attention beside the recurrent state: two caches, one layer
                layer = msgspec.structs.replace(layer, kind="full", kv_heads=heads, head_dim=dim, head_dim_v=dim)
            layers.append(msgspec.structs.replace(layer, moe=moe[n]))
        elif word == "none" or n >= shared_from:
            layers.append(Layer(kind="none", moe=moe[n]))
        elif mla is not None:
            wide = mla.kv_lora_rank + mla.qk_rope_head_dim
            index = _index_bytes(config) if _has_indexer(config, n) else 0
            layers.append(Layer(kind="mla", kv_heads=1, head_dim=wide, head_dim_v=0, index_bytes=index, moe=moe[n]))
        elif word == "sliding" and window:
            layers.append(
                Layer(kind="sliding", kv_heads=heads, head_dim=dim, head_dim_v=dim, window=window, moe=moe[n])
            )
        elif word == "chunked":
            chunk = config.whole("attention_chunk_size", default=8192)
            layers.append(Layer(kind="chunked", kv_heads=heads, head_dim=dim, head_dim_v=dim, window=chunk, moe=moe[n]))
        else:
            layers.append(Layer(kind="full", kv_heads=heads, head_dim=dim, head_dim_v=dim, moe=moe[n]))
    return tuple(layers)


def _has_indexer(config: Config, n: int) -> bool:
    """Whether layer ``n`` of DeepSeek's sparse attention chooses tokens itself, or takes those of a layer before.

    Source: vllm/model_executor/models/deepseek_v2.py:DeepseekV2MLAAttention.
    """
    if not config.has("index_topk"):
        return False
    pattern = config.get("index_topk_pattern")
    if isinstance(pattern, str | list):
        return not (n < len(pattern) and pattern[n] == "S")
    offset = config.whole("index_skip_topk_offset", default=2, least=0)
    return max(n - offset + 1, 0) % config.whole("index_topk_freq", default=1) == 0


def _index_bytes(config: Config) -> int:
    """FP8 values, and a float32 scale for 128 of them (deepseek_v2.py:Indexer)."""
    wide = config.whole("index_head_dim", default=128)
    return wide + wide // 128 * 4


def _recurrent(config: Config, dtype: str) -> Layer:
    """One request's recurrent state in one layer, the whole of it on one GPU.

    The first is the convolution's, (kernel - 1, channels), the second the recurrent one, (heads, ...). Tensor
    parallelism divides the last number of the first and the first of the second; where ``n_groups`` is not a multiple
    of it, Mamba 2's groups are copied (vllm/model_executor/layers/mamba/mamba_utils.py:MambaStateShapeCalculator).
    Mamba 2 alone keeps a checkpoint of its prefill (mamba_mixer2.py:get_kv_cache_spec).
    """
    model_type = config.text("model_type")
    if model_type in {"lfm2", "lfm2_moe"}:
        channels = config.whole("conv_dim", "hidden_size")
        return _kept(((config.whole("conv_L_cache", default=3) - 1, channels),), (dtype,))
    if config.has("linear_num_value_heads"):  # gated delta net
        keys, values = config.whole("linear_num_key_heads"), config.whole("linear_num_value_heads")
        key, value = config.whole("linear_key_head_dim"), config.whole("linear_value_head_dim")
        conv = (config.whole("linear_conv_kernel_dim", default=4) - 1, 2 * key * keys + value * values)
        ssm = SAFETENSORS_NAME.get(config.text("mamba_ssm_dtype"), dtype)
        return _kept((conv, (values, value, key)), (dtype, ssm))
    if model_type == "kimi_linear":
        linear = Config(config.table("linear_attn_config") or {}, f"{config.where} linear_attn_config")
        heads, dim = linear.whole("num_heads"), linear.whole("head_dim")
        kernel = linear.whole("short_conv_kernel_size", default=4)
        return _kept(((kernel - 1, 3 * heads * dim), (heads, dim, dim)), (dtype, "F32"))
    hidden = config.whole("hidden_size", "d_model")
    size = config.whole("mamba_d_state", "ssm_state_size", "state_size", default=16)
    kernel = config.whole("mamba_d_conv", "conv_kernel", default=4)
    expand = config.number("mamba_expand", "expand") or 2
    if model_type in {"jamba", "mamba", "falcon_mamba"}:
        wide = (
            int(expand * hidden)
            if model_type == "jamba"
            else config.whole("intermediate_size", default=int(expand * hidden))
        )
        return _kept(((kernel - 1, wide), (wide, size)), (dtype, dtype))
    heads = config.whole("mamba_n_heads", "n_mamba_heads", "mamba_num_heads", "num_heads")
    wide = config.optional("mamba_d_ssm") or int(expand * hidden)
    computed = config.get("mamba_d_head") == "auto"
    stated = None if computed else config.optional("mamba_d_head", "mamba_headdim", "mamba_head_dim")
    dim = stated or (config.whole("head_dim") if model_type == "mamba2" else wide // heads)
    if model_type == "nemotron_h":
        wide = heads * dim
    groups = config.whole("mamba_n_groups", "mamba_ngroups", "n_groups", default=1)
    ssm = SAFETENSORS_NAME.get(config.text("mamba_ssm_cache_dtype"), "F32") if model_type == "nemotron_h" else dtype
    return _kept(((kernel - 1, wide + 2 * groups * size), (heads, dim, size)), (dtype, ssm), checkpoints=1)


def _kept(shapes: tuple[tuple[int, ...], ...], dtypes: tuple[str, ...], checkpoints: int = 0) -> Layer:
    return Layer(kind="mamba", state_shapes=shapes, state_dtypes=dtypes, state_checkpoints=checkpoints)
