"""The tensors that a checkpoint with this config.json would hold: names, dtypes and shapes, without any weights. Pure.

Most decoders are one shape with switches; ``FAMILIES`` holds the switches by model type. Names are those of the files
(what transformers' save_pretrained writes), which is not always how the modules are named in memory.
"""

from __future__ import annotations

import msgspec

from vllm_launch.model import tensors_moe, tensors_state, tensors_vision
from vllm_launch.model.config import Config
from vllm_launch.model.dtypes import SAFETENSORS_NAME
from vllm_launch.model.layers import head_dim, kv_heads
from vllm_launch.model.model import Layer, Mla, Quantization, Tensor
from vllm_launch.model.tensor_list import TensorList


class Family(msgspec.Struct, frozen=True, kw_only=True):
    """How a model type differs from Llama. Norms are the names of those with ``hidden_size`` weights in each layer."""

    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    norm_bias: bool = False
    qkv_bias: bool | None = None  # None: as ``attention_bias`` says
    o_bias: bool | None = None
    mlp_bias: bool | None = None  # None: as ``mlp_bias`` says
    qk_norm: str = ""  # "head": one head's weights; "all": all heads'; "each": a row for each head
    qk_names: tuple[str, str] = ("q_norm", "k_norm")
    qkv: str = ""  # the name of fused query, key and value
    gate_up: str = ""  # the name of fused gate and up
    plain_mlp: tuple[str, str] | None = None  # a feed-forward without a gate: up and down
    mlp: str = "mlp"
    mlp_names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    out: str = "o_proj"
    final_norm: str = "norm"
    final_norm_weight: bool = True


PRE_POST = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
POST = ("post_attention_layernorm", "post_feedforward_layernorm")
LLAMA = Family()
QWEN2 = Family(qkv_bias=True, o_bias=False, mlp_bias=False)
QWEN3 = Family(qk_norm="head")

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("llama", "mistral", "ministral", "gemma", "granite", "helium", "smollm3", "arcee"), LLAMA),
    **dict.fromkeys(("mixtral", "granitemoe", "granitemoeshared", "granitemoehybrid"), LLAMA),
    **dict.fromkeys(("ernie4_5", "ernie4_5_moe"), LLAMA),
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen2_vl_text", "qwen2_5_vl_text", "qwen2_vl", "qwen2_5_vl"), QWEN2),
    **dict.fromkeys(("qwen3", "qwen3_moe", "qwen3_vl_text", "qwen3_vl_moe_text"), QWEN3),
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), QWEN3),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2", "glm4_moe_lite", "glm_moe_dsa"), LLAMA),
    "arcee": Family(plain_mlp=("up_proj", "down_proj")),
    "nemotron": Family(plain_mlp=("up_proj", "down_proj"), norm_bias=True),
    "ministral3": LLAMA,
    "gemma2": Family(norms=PRE_POST),
    "gemma3": Family(norms=PRE_POST, qk_norm="head"),
    "gemma3_text": Family(norms=PRE_POST, qk_norm="head"),
    "phi3": Family(qkv="qkv_proj", gate_up="gate_up_proj"),
    "olmo": Family(norms=(), final_norm_weight=False),
    "olmo2": Family(norms=POST, qk_norm="all"),
    "olmo3": Family(norms=POST, qk_norm="all"),
    "olmoe": Family(qk_norm="all"),
    "cohere": Family(norms=("input_layernorm",), qk_norm="each"),
    "cohere2": Family(norms=("input_layernorm",)),
    "glm": Family(o_bias=False, gate_up="gate_up_proj"),
    "glm4": Family(
        norms=("input_layernorm", "post_attention_layernorm", "post_self_attn_layernorm", "post_mlp_layernorm"),
        o_bias=False, gate_up="gate_up_proj",
    ),
    "glm4_moe": Family(o_bias=False),
    "exaone4": Family(norms=POST, qk_norm="head"),
    "seed_oss": Family(o_bias=None),
    "hunyuan_v1_dense": Family(qk_norm="head", qk_names=("query_layernorm", "key_layernorm")),
    "hunyuan_v1_moe": Family(qk_norm="head", qk_names=("query_layernorm", "key_layernorm")),
    "starcoder2": Family(norm_bias=True, plain_mlp=("c_fc", "c_proj")),
    "stablelm": Family(norm_bias=True, o_bias=False),
    "phi": Family(norms=("input_layernorm",), norm_bias=True, qkv_bias=True, o_bias=True, mlp_bias=True,
                  plain_mlp=("fc1", "fc2"), out="dense", final_norm="final_layernorm"),
    "phimoe": Family(norm_bias=True),
    "gpt_oss": LLAMA,
    "llama4_text": Family(mlp="feed_forward"),
    "jamba": Family(
        norms=("input_layernorm", "pre_ff_layernorm"), mlp="feed_forward", final_norm="final_layernorm"
    ),
    "falcon_h1": Family(
        norms=("input_layernorm", "pre_ff_layernorm"), mlp="feed_forward", final_norm="final_layernorm"
    ),
    **dict.fromkeys(
        ("lfm2", "lfm2_moe"),
        Family(
            norms=("operator_norm", "ffn_norm"), qk_norm="head", qk_names=("q_layernorm", "k_layernorm"),
            mlp="feed_forward", mlp_names=("w1", "w3", "w2"), out="out_proj", final_norm="embedding_norm",
        ),
    ),
    "mamba": LLAMA, "mamba2": LLAMA, "falcon_mamba": LLAMA, "nemotron_h": LLAMA,
}  # fmt: skip


def tensors(
    config: Config,
    layers: tuple[Layer, ...],
    mla: Mla | None,
    dtype: str,
    quantization: Quantization | None,
    *,
    tied: bool,
    vision: Config | None = None,
) -> tuple[tuple[Tensor, ...], tuple[str, ...]]:
    """The tensors and the warnings for what is a guess.

    ``config`` is the language model's, ``vision`` the vision tower's; ``dtype`` is vLLM's word. Raises UsageError.
    """
    model_type = config.text("model_type")
    warnings = []
    family = FAMILIES.get(model_type)
    if family is None:
        family = LLAMA
        warnings.append(
            f"tensors of model type {model_type!r} are guessed as Llama's: download the safetensors for an exact plan"
        )
    root = "language_model." if vision is not None else ""
    out = TensorList(SAFETENSORS_NAME[dtype], quantization, config.where)
    hidden, vocab = config.whole("hidden_size"), config.whole("vocab_size")
    style = tensors_state.STYLES.get(model_type)
    if style is not None:
        style(out, config, layers)
    else:
        out.add(f"{root}model.embed_tokens.weight", vocab, hidden)
        for number, layer in enumerate(layers):
            _layer(out, f"{root}model.layers.{number}.", config, family, layer, mla)
        if family.final_norm_weight:
            _norm(out, f"{root}model.{family.final_norm}", hidden, bias=family.norm_bias)
    if not tied:
        out.linear(
            f"{root}lm_head",
            vocab,
            hidden,
            bias=model_type in {"phi", "phimoe"} and config.flag("lm_head_bias", default=model_type == "phi"),
            quantized=False,
        )
    if vision is not None:
        tensors_vision.vision(out, vision, hidden)
        warnings.append(
            "the vision tower's tensors follow from vision_config as a plain ViT: a few per cent may differ"
        )
    return out.tensors(), tuple(warnings)


def _norm(out: TensorList, name: str, width: int, *, bias: bool) -> None:
    out.add(f"{name}.weight", width)
    if bias:
        out.add(f"{name}.bias", width)


def _layer(out: TensorList, at: str, config: Config, family: Family, layer: Layer, mla: Mla | None) -> None:  # noqa: PLR0917
    """Attention, or what stands in its place, then the feed-forward."""
    hidden, model_type = config.whole("hidden_size"), config.text("model_type")
    for name in family.norms:
        _norm(out, at + name, hidden, bias=family.norm_bias)
    if layer.state_shapes:
        tensors_state.mixer(out, at, config)
    if layer.kind != "mamba":
        if mla is not None:
            _mla(out, f"{at}self_attn.", config, mla)
        else:
            attention(out, f"{at}self_attn.", config, family)
    if layer.moe:
        tensors_moe.experts(out, at, config)
    elif model_type == "granitemoehybrid":
        wide = config.whole("shared_intermediate_size")
        out.linear(f"{at}shared_mlp.input_linear", 2 * wide, hidden)
        out.linear(f"{at}shared_mlp.output_linear", hidden, wide)
    else:
        feed_forward(out, f"{at}{family.mlp}.", config, family, _dense_width(config))


def _dense_width(config: Config) -> int:
    """Channels of a dense feed-forward. LFM2's config states 3/2 of them, before rounding (Lfm2MLP in transformers)."""
    model_type = config.text("model_type")
    wide = config.whole("intermediate_size_mlp" if model_type == "llama4_text" else "intermediate_size")
    if model_type == "lfm2" and config.flag("block_auto_adjust_ff_dim", default=True):
        multiple = config.whole("block_multiple_of", default=256)
        wide = int((config.number("block_ffn_dim_multiplier") or 1.0) * int(2 * wide / 3))
        wide = -(-wide // multiple) * multiple
    return wide


def attention(out: TensorList, at: str, config: Config, family: Family) -> None:
    """Query, key, value and output of plain attention under the prefix ``at``."""
    hidden, model_type = config.whole("hidden_size"), config.text("model_type")
    heads, groups, dim = config.whole("num_attention_heads"), kv_heads(config), head_dim(config)
    said = config.flag("attention_bias", "use_bias", "use_qkv_bias", default=model_type == "gpt_oss")
    bias = said if family.qkv_bias is None else family.qkv_bias
    gated = 2 if model_type in {"qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"} else 1
    if family.qkv:
        out.linear(at + family.qkv, (heads + 2 * groups) * dim, hidden, bias=bias)
    else:
        out.linear(f"{at}q_proj", heads * dim * gated, hidden, bias=bias)
        out.linear(f"{at}k_proj", groups * dim, hidden, bias=bias)
        out.linear(f"{at}v_proj", groups * dim, hidden, bias=bias)
    out_bias = config.flag("attention_out_bias") if model_type == "seed_oss" else said
    out.linear(at + family.out, hidden, heads * dim, bias=out_bias if family.o_bias is None else family.o_bias)
    if model_type == "gpt_oss":
        out.add(f"{at}sinks", heads)
    kind = family.qk_norm
    if model_type in {"cohere", "glm4_moe", "phi"}:
        kind = ("each" if model_type == "cohere" else "head") if config.flag("use_qk_norm") else ""
    sizes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
        "head": ((dim,), (dim,)), "all": ((heads * dim,), (groups * dim,)), "each": ((heads, dim), (groups, dim)),
    }  # fmt: skip
    if kind:
        for name, shape in zip(family.qk_names, sizes[kind], strict=True):
            out.add(f"{at}{name}.weight", *shape)


def _mla(out: TensorList, at: str, config: Config, mla: Mla) -> None:
    """DeepSeek's latent attention."""
    hidden, heads = config.whole("hidden_size"), config.whole("num_attention_heads")
    bias, query = config.flag("attention_bias"), mla.qk_nope_head_dim + mla.qk_rope_head_dim
    if mla.q_lora_rank is None:
        out.linear(f"{at}q_proj", heads * query, hidden)
    else:
        out.linear(f"{at}q_a_proj", mla.q_lora_rank, hidden, bias=bias)
        out.add(f"{at}q_a_layernorm.weight", mla.q_lora_rank)
        out.linear(f"{at}q_b_proj", heads * query, mla.q_lora_rank)
    out.linear(f"{at}kv_a_proj_with_mqa", mla.kv_lora_rank + mla.qk_rope_head_dim, hidden, bias=bias)
    out.add(f"{at}kv_a_layernorm.weight", mla.kv_lora_rank)
    out.linear(f"{at}kv_b_proj", heads * (mla.qk_nope_head_dim + mla.v_head_dim), mla.kv_lora_rank)
    out.linear(f"{at}o_proj", hidden, heads * mla.v_head_dim, bias=bias)
    if config.has("index_n_heads"):  # DeepSeek sparse attention's indexer
        index_heads, index_dim = config.whole("index_n_heads"), config.whole("index_head_dim")
        out.linear(f"{at}indexer.wq_b", index_heads * index_dim, mla.q_lora_rank or hidden)
        out.linear(f"{at}indexer.wk", index_dim, hidden)
        _norm(out, f"{at}indexer.k_norm", index_dim, bias=True)
        out.linear(f"{at}indexer.weights_proj", index_heads, hidden, quantized=False)


def feed_forward(out: TensorList, at: str, config: Config, family: Family, wide: int) -> None:
    """A dense feed-forward of ``wide`` channels under the prefix ``at``."""
    hidden = config.whole("hidden_size")
    default = config.flag("use_bias") and config.text("model_type") in {"starcoder2", "ernie4_5", "ernie4_5_moe"}
    bias = config.flag("mlp_bias", default=default) if family.mlp_bias is None else family.mlp_bias
    if family.plain_mlp:
        up, down = family.plain_mlp
        out.linear(at + up, wide, hidden, bias=bias)
    elif family.gate_up:
        down = "down_proj"
        out.linear(at + family.gate_up, 2 * wide, hidden, bias=bias)
    else:
        gate, up, down = family.mlp_names
        out.linear(at + gate, wide, hidden, bias=bias)
        out.linear(at + up, wide, hidden, bias=bias)
    out.linear(at + down, hidden, wide, bias=bias)
