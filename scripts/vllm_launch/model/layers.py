"""The cache of each decoder layer: heads, latent vectors and recurrent states, by the rules of vLLM 0.32.0. Pure."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from vllm_launch.model.config import Config
from vllm_launch.model.dtypes import SAFETENSORS_NAME
from vllm_launch.model.layer_kinds import MIMO_V2, attention_free, layer_kinds, searched_blocks, sliding_window
from vllm_launch.model.model import Layer, Mla

MLA_TYPES = {
    "axk1", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots3_note", "glm5_next", "glm5_next_text", "glm_moe_dsa",
    "glm4_moe_lite", "kimi_k2", "kimi_linear", "longcat_flash", "pangu_ultra_moe", "bailing_hybrid", "hy_v4",
    "sarvam_mla",
}  # fmt: skip
"""Model types with multi-head latent attention (vllm/transformers_utils/model_arch_config_convertor.py:
is_deepseek_mla)."""

INDEXED_RATIO = 4
"""Tokens in one latent vector of those layers of DeepSeek V4 that have an indexer."""

GEMMA4 = {"gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text", "diffusion_gemma_text"}


def attention_heads(config: Config) -> int:
    """Return the number of query heads, or 0 for a model without attention."""
    if attention_free(config):  # Mamba 2's ``num_heads`` counts heads of its state
        return 0
    return config.integer("num_attention_heads", "n_head", "num_heads")


def kv_heads(config: Config) -> int:  # noqa: PLR0911 - one return for each kind of model
    """Return the number of KV heads (model_arch_config_convertor.py:get_total_num_kv_heads and its Falcon version)."""
    heads = attention_heads(config)
    model_type = config.text("model_type")
    for block in searched_blocks(config):
        if not block.part("attention").flag("no_op"):
            return heads // block.part("attention").integer("n_heads_in_group")
    if model_type == "dbrx":
        return Config(config.table("attn_config") or {}, f"{config.where} attn_config").integer("kv_n_heads", default=8)
    if model_type in {"falcon", "RefinedWeb", "RefinedWebModel"}:
        if config.flag("new_decoder_architecture"):
            return config.integer("n_head_kv", "num_kv_heads", default=heads)
        return 1 if config.flag("multi_query", default=True) else heads
    if model_type == "gpt_bigcode" and config.flag("multi_query", default=True):
        return 1
    if model_type == "chatglm" and not config.flag("multi_query_attention"):
        return heads
    keys = ("n_head_kv", "num_kv_heads", "num_key_value_heads", "multi_query_group_num", "num_attention_groups")
    return config.integer(
        next((key for key in keys if config.has(key)), "num_key_value_heads"), default=heads, minimum=0
    )


def head_dim(config: Config) -> int:
    """Return the size of one head. For MLA, that of the parts that are not latent."""
    heads = attention_heads(config)
    if config.has("qk_nope_dim"):
        return config.integer("qk_nope_dim") + config.integer("qk_rope_dim", minimum=0)
    explicit = config.optional_integer("head_dim", "hidden_size_per_head", "attention_head_dim", minimum=0)
    if explicit:
        return explicit
    hidden = config.integer("hidden_size", "n_embd", "d_model")
    if heads and hidden % heads and not config.has("kv_lora_rank"):
        raise config.error("num_attention_heads", f"is {heads}, which does not divide hidden_size {hidden}")
    return hidden // heads if heads else 0


def value_dim(config: Config) -> int:
    """Return the size of one head's value. Only openPangu has another than that of its key (openpangu.py)."""
    return config.integer("v_channels") if config.has("qk_nope_dim") else head_dim(config)


def read_mla(config: Config) -> Mla | None:
    """Return the sizes of multi-head latent attention, or None if vLLM does not use it for this model."""
    if config.text("model_type") not in MLA_TYPES or not config.has("kv_lora_rank"):
        return None
    return latent_sizes(config, v_head_dim=128)


def latent_sizes(config: Config, v_head_dim: int) -> Mla:
    """Return the sizes of the projections to and from latent vectors. ``v_head_dim``: the default of that key."""
    return Mla(
        kv_lora_rank=config.integer("kv_lora_rank"),
        qk_rope_head_dim=config.integer("qk_rope_head_dim", default=64, minimum=0),
        qk_nope_head_dim=config.integer("qk_nope_head_dim", default=128),
        v_head_dim=config.integer("v_head_dim", default=v_head_dim),
        q_lora_rank=config.optional_integer("q_lora_rank"),
    )


def layer_count(config: Config) -> int:
    """Return the number of decoder layers. Nemotron-H may give only the list of its layers."""
    blocks = config.strings("layers_block_type") or config.get("hybrid_override_pattern")
    if config.text("model_type") == "nemotron_h" and isinstance(blocks, list | str):
        return len(blocks)
    if config.text("model_type") == "whisper":
        return config.integer("decoder_layers")
    return config.integer("num_hidden_layers", "n_layer", "n_layers", "num_layers")


class Heads(NamedTuple):
    """The KV heads of one layer, and the values that a head stores of a token as its key and as its value."""

    kv_heads: int
    key: int
    value: int


def layer_heads(config: Config, kind: str, n: int = -1) -> Heads:
    """Return the KV heads of layer ``n``, which is of ``kind``. In some models they depend on either.

    Source: vllm/model_executor/models/gemma4.py and transformers' Gemma4TextConfig (per_layer_config), mimo_v2.py,
    minicpm3.py (keys and values are padded to the width of a query), openpangu.py.
    """
    model_type, count, dim = config.text("model_type"), kv_heads(config), head_dim(config)
    blocks = searched_blocks(config)
    if 0 <= n < len(blocks):
        return Heads(attention_heads(config) // blocks[n].part("attention").integer("n_heads_in_group"), dim, dim)
    if own := _own_config(config, n):
        dim = own.integer("head_dim", default=dim)
        return Heads(own.integer("num_key_value_heads", default=count), dim, dim)
    if model_type in GEMMA4 and kind == "full":
        if config.flag("attention_k_eq_v", default=True):
            count = config.optional_integer("num_global_key_value_heads") or count
        dim = config.integer("global_head_dim", default=512)
        return Heads(count, dim, dim)
    if model_type in MIMO_V2:
        prefix = "swa_" if kind == "sliding" else ""
        key = config.integer(f"{prefix}head_dim", default=dim)
        value = config.integer(f"{prefix}v_head_dim", default=key)
        return Heads(config.integer(f"{prefix}num_key_value_heads", default=count), key, value)
    if model_type == "minicpm3":
        query = config.integer("qk_nope_head_dim") + config.integer("qk_rope_head_dim")
        return Heads(attention_heads(config), query, query)
    return Heads(count, dim, value_dim(config))


def _own_config(config: Config, n: int) -> Config | None:
    """Return the values that transformers' ``per_layer_config`` has for layer ``n``, or None."""
    for key, value in (config.table("per_layer_config") or {}).items():
        if key.isdecimal() and int(key) == n and isinstance(value, dict):
            return Config(value, f"{config.where} per_layer_config {key}")
    return None


def read_layers(config: Config, dtype: str, moe: list[bool]) -> tuple[Layer, ...]:
    """Return every layer's cache. ``dtype``: the model's, by safetensors' name. ``moe``: which layers have experts."""
    count = len(moe)
    mla, window = read_mla(config), sliding_window(config)
    shared_from = count - config.integer("num_kv_shared_layers", default=0, minimum=0)
    layers = []
    for n, kind in enumerate(layer_kinds(config, count)):
        if kind == "none" or (n >= shared_from and kind not in {"mamba", "hybrid"}):
            layers.append(Layer(kind="none", moe=moe[n]))
            continue
        if kind == "mamba":
            layers.append(msgspec.structs.replace(_recurrent_layer(config, dtype), moe=moe[n]))
            continue
        if mla is not None:
            width = mla.kv_lora_rank + mla.qk_rope_head_dim
            index = _index_bytes(config) if _has_indexer(config, n) else 0
            layer = Layer(
                kind="mla", kv_heads=1, head_dim=width, head_dim_v=0, index_bytes=index, moe=moe[n],
                attentions=2 if config.text("model_type") == "longcat_flash" else 1,
            )  # fmt: skip
            layers.append(_with_ring(layer, config))
            continue
        if kind == "compressed":
            layers.append(msgspec.structs.replace(_compressed_layer(config, n), moe=moe[n]))
            continue
        heads = layer_heads(config, kind, n)
        layer = Layer(
            kind="full", kv_heads=heads.kv_heads, head_dim=heads.key, head_dim_v=heads.value, moe=moe[n],
            cross=config.text("model_type") == "whisper", index_bytes=_block_index_bytes(config, n),
            loop_windows=_loop_windows(config),
        )  # fmt: skip
        layer = _with_ring(layer, config)
        if kind == "hybrid":  # the layer has two caches: attention and a recurrent state
            state = _recurrent_layer(config, dtype)
            layer = msgspec.structs.replace(
                layer, state_shapes=state.state_shapes, state_dtypes=state.state_dtypes,
                state_checkpoints=state.state_checkpoints,
            )  # fmt: skip
        elif kind == "chunked":
            chunk = config.integer("attention_chunk_size", default=8192)
            layer = msgspec.structs.replace(layer, kind="chunked", window=chunk)
        elif kind == "sliding" and window:
            layer = msgspec.structs.replace(layer, kind="sliding", window=window)
        layers.append(layer)
    return tuple(layers)


def _loop_windows(config: Config) -> tuple[int, ...]:
    """Return the window of each further pass through a layer (iquest_loopcoder.py). Other models have one pass."""
    if config.text("model_type") != "iquestloopcoder":
        return ()
    return (config.integer("loop_window_size", default=64),) * (config.integer("loop_num", default=2) - 1)


def _has_indexer(config: Config, n: int) -> bool:
    """Whether layer ``n`` of DeepSeek's sparse attention chooses tokens. Other layers use an earlier layer's choice.

    Source: vllm/model_executor/models/deepseek_v2.py:DeepseekV2MLAAttention.
    """
    if not config.has("index_topk") or config.text("model_type") == "hy_v4":
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


def _block_index_bytes(config: Config, n: int) -> int:
    """Return the bytes of an indexer's key in layer ``n`` of MiniMax M3: one for each token, in bfloat16.

    Source: vllm/models/minimax_m3.
    """
    sparse = Config(config.table("sparse_attention_config") or {}, f"{config.where} sparse_attention_config")
    layers = sparse.array("sparse_attention_freq") or []
    used = sparse.flag("use_sparse_attention") and (n >= len(layers) or bool(layers[n]))
    return 2 * sparse.integer("sparse_index_dim", default=128) if used else 0


def _with_ring(layer: Layer, config: Config) -> Layer:
    """Return ``layer`` with an indexer that has one key for several tokens, and a ring of keys until they are one.

    In the ring GLM 5 Next has two vectors for each token. Qwen 4 has one, and three positions if the model's positions
    have three axes. Source: vllm/models/glm5next/common/sparse_indexer.py, vllm/models/qwen4_exp/common/qsa_cache.py.
    """
    if layer.index_bytes and config.has("index_kpool"):
        ratio, width = config.integer("index_kpool"), config.integer("index_head_dim", default=128)
        return msgspec.structs.replace(layer, compression=ratio, index_ring=ratio * 2 * 2 * width)
    if not config.has("indexer_compress_ratio"):
        return layer
    width, ratio = 2 * config.integer("indexer_head_dim"), config.integer("indexer_compress_ratio")
    positions = 24 if "mrope_section" in (config.table("rope_parameters") or {}) else 0
    return msgspec.structs.replace(
        layer, index_bytes=width, compression=ratio, index_ring=ratio * (-(-width // 8) * 8 + positions)
    )


def _compressed_layer(config: Config, n: int) -> Layer:
    """Return a layer of DeepSeek V4: a window, and latent vectors of several tokens each in most layers.

    Layers that compress few tokens choose vectors with an indexer (vllm/models/deepseek_v4/attention.py).
    """
    ratios = config.integers("compress_ratios") or []
    ratio = ratios[n] if n < len(ratios) else 0
    return Layer(
        kind="compressed", kv_heads=1, head_dim=config.integer("head_dim", default=512),
        window=config.integer("sliding_window", default=128), compression=ratio,
        index_bytes=_index_bytes(config) if ratio == INDEXED_RATIO else 0,
    )  # fmt: skip


def _recurrent_layer(config: Config, dtype: str) -> Layer:
    """Return a layer with the recurrent state of one request, before tensor parallelism.

    The first shape is the convolution's, (kernel - 1, channels). The second is the recurrent state's, (heads, ...).
    Tensor parallelism divides the last number of the first shape and the first number of the second. If ``n_groups`` is
    not a multiple of the tensor parallel size, vLLM copies Mamba 2's groups.
    Mamba 2 keeps a checkpoint of its prefill (mamba_mixer2.py:get_kv_cache_spec), and so does Kimi K3.
    Source: vllm/model_executor/layers/mamba/mamba_utils.py:MambaStateShapeCalculator.
    """
    model_type = config.text("model_type")
    if model_type in {"lfm2", "lfm2_moe"}:
        channels = config.integer("conv_dim", "hidden_size")
        return _state_layer(((config.integer("conv_L_cache", default=3) - 1, channels),), (dtype,))
    if config.has("linear_num_heads"):  # Kimi delta attention of GLM 5 Next
        heads, dim = config.integer("linear_num_heads"), config.integer("linear_head_dim")
        kernel = config.integer("linear_conv_kernel_dim", default=4)
        shapes = ((kernel - 1, 3 * heads * dim), (heads, dim, dim))
        return _state_layer(shapes, (dtype, "F32"), int(config.get("linear_lower_bound") is not None))
    if config.get("linear_num_value_heads") is not None:  # gated delta net
        keys, values = config.integer("linear_num_key_heads"), config.integer("linear_num_value_heads")
        key, value = config.integer("linear_key_head_dim"), config.integer("linear_value_head_dim")
        conv = (config.integer("linear_conv_kernel_dim", default=4) - 1, 2 * key * keys + value * values)
        ssm = SAFETENSORS_NAME.get(config.text("mamba_ssm_dtype"), dtype)
        return _state_layer((conv, (values, value, key)), (dtype, ssm))
    if model_type in {"kimi_linear", "bailing_hybrid"}:
        return _linear_attention_layer(config, dtype)
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
    own, ssm = config.text("mamba_ssm_cache_dtype"), dtype
    if model_type == "nemotron_h" and own != "auto":
        ssm = SAFETENSORS_NAME.get(own, "F32")
    return _state_layer(((kernel - 1, width + 2 * groups * size), (heads, dim, size)), (dtype, ssm), checkpoints=1)


def _linear_attention_layer(config: Config, dtype: str) -> Layer:
    """Return a layer of Kimi delta attention, or of linear attention in Ling and Ring 2.5, which has no convolution."""
    if config.text("model_type") == "kimi_linear":
        linear = config.part("linear_attn_config")
        heads, dim = linear.integer("num_heads"), linear.integer("head_dim")
        kernel = linear.integer("short_conv_kernel_size", default=4)
        # A prefill stores a checkpoint only with kernels that need the bound (vllm/models/kimi_k3/nvidia/kda.py).
        checkpoints = int(linear.get("gate_lower_bound") is not None)
    else:
        heads, dim, checkpoints = attention_heads(config), head_dim(config), 0
        if not config.has("short_conv_kernel_size"):
            return _state_layer(((heads, dim, dim),), (dtype,))
        kernel = config.integer("short_conv_kernel_size")
    return _state_layer(((kernel - 1, 3 * heads * dim), (heads, dim, dim)), (dtype, "F32"), checkpoints)


def _state_layer(shapes: tuple[tuple[int, ...], ...], dtypes: tuple[str, ...], checkpoints: int = 0) -> Layer:
    return Layer(kind="mamba", state_shapes=shapes, state_dtypes=dtypes, state_checkpoints=checkpoints)
