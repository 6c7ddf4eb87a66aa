"""Derives a checkpoint's tensors from its config.json: names, dtypes and shapes. Pure.

Most decoders share one structure with few differences. ``FAMILIES`` has the differences by model type. Tensor names are
those in the files that transformers' save_pretrained writes. Modules in memory can have other names.
"""

from __future__ import annotations

import msgspec

from vllm_launch.engine.compared import compared
from vllm_launch.model import tensors_moe, tensors_state
from vllm_launch.model.config import INTERMEDIATE_KEYS, VOCAB_KEYS, Config
from vllm_launch.model.dtypes import SAFETENSORS_NAME
from vllm_launch.model.layer_kinds import DEEPSEEK_V4
from vllm_launch.model.layers import GEMMA4, attention_heads, head_dim, kv_heads, latent_sizes, value_dim
from vllm_launch.model.model import Layer, Mla, Quantization, Tensor
from vllm_launch.model.tensor_list import GATED, TensorList
from vllm_launch.model.tensors_deepseek_v4 import deepseek_v4
from vllm_launch.model.tensors_gemma3n import GEMMA3N, gemma3n
from vllm_launch.model.tensors_gemma4 import gemma4
from vllm_launch.model.tensors_kimi import residual_attention
from vllm_launch.model.tensors_nas import nemotron_nas
from vllm_launch.model.tensors_whisper import whisper


class Family(msgspec.Struct, frozen=True, kw_only=True):
    """How a model type differs from Llama. ``norms`` are the norms with ``hidden_size`` weights in each layer."""

    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    norm_bias: bool = False
    qkv_bias: bool | None = None  # None: the value of ``attention_bias``
    o_bias: bool | None = None
    mlp_bias: bool | None = None  # None: the value of ``mlp_bias``
    qk_norm: str = ""  # "head": weights for one head, "all": for all heads, "each": one row per head
    qk_names: tuple[str, str] = ("q_norm", "k_norm")
    qkv: str = ""  # name of the fused query, key and value projection
    gate_up: str = ""  # name of the fused gate and up projection
    plain_mlp: tuple[str, str] | None = None  # names of up and down in a feed-forward without a gate
    mlp: str = "mlp"
    mlp_names: tuple[str, str, str] = GATED
    output: str = "o_proj"
    final_norm: str = "norm"
    final_norm_weight: bool = True
    positions: bool = False  # absolute positions have an embedding


PRE_POST = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
POST = ("post_attention_layernorm", "post_feedforward_layernorm")
LLAMA = Family()
BERT = Family(
    norm_bias=True, qkv_bias=True, o_bias=True, mlp_bias=True, plain_mlp=("up_proj", "down_proj"), positions=True
)  # fmt: skip
QWEN2 = Family(qkv_bias=True, o_bias=False, mlp_bias=False)
QWEN3 = Family(qk_norm="head")

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("llama", "mistral", "ministral", "gemma", "granite", "helium", "smollm3", "arcee"), LLAMA),
    **dict.fromkeys(("mixtral", "granitemoe", "granitemoeshared", "granitemoehybrid"), LLAMA),
    **dict.fromkeys(("ernie4_5", "ernie4_5_moe", "ernie4_5_moe_vl"), LLAMA),
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen2_vl_text", "qwen2_5_vl_text", "qwen2_vl", "qwen2_5_vl"), QWEN2),
    **dict.fromkeys(("qwen3", "qwen3_moe", "qwen3_vl_text", "qwen3_vl_moe_text"), QWEN3),
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), QWEN3),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2", "glm4_moe_lite", "glm_moe_dsa"), LLAMA),
    **dict.fromkeys(("glm5_next_text", "kimi_linear", "longcat_flash", "sarvam_mla", "step3_text"), LLAMA),
    "apertus": Family(
        norms=("attention_layernorm", "feedforward_layernorm"), qk_norm="head", plain_mlp=("up_proj", "down_proj")
    ),
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
                  plain_mlp=("fc1", "fc2"), output="dense", final_norm="final_layernorm"),
    "phimoe": Family(norm_bias=True),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "gpt2", "gpt_bigcode", "opt"), BERT),
    **dict.fromkeys(("gpt_neox", "jais2"), msgspec.structs.replace(BERT, positions=False)),
    "gptj": Family(norms=("ln_1",), norm_bias=True, qkv_bias=False, o_bias=False, mlp_bias=True,
                   plain_mlp=("up_proj", "down_proj")),
    "falcon": Family(norms=("input_layernorm",), norm_bias=True, plain_mlp=("up_proj", "down_proj")),
    "bailing_moe": LLAMA,
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
            mlp="feed_forward", mlp_names=("w1", "w3", "w2"), output="out_proj", final_norm="embedding_norm",
        ),
    ),
    }  # fmt: skip


BUILDERS = tensors_state.BUILDERS | dict.fromkeys(GEMMA4, gemma4) | dict.fromkeys(DEEPSEEK_V4, deepseek_v4)
BUILDERS |= {"whisper": whisper, "nemotron-nas": nemotron_nas} | dict.fromkeys(GEMMA3N, gemma3n)
"""Functions that append the embeddings and layers of a model, for model types whose structure differs from Llama's."""


def tensors(
    config: Config,
    layers: tuple[Layer, ...],
    mla: Mla | None,
    dtype: str,
    quantization: Quantization | None,
    *,
    tied: bool,
    nested: bool = False,
    architecture: str = "",
) -> tuple[tuple[Tensor, ...], tuple[str, ...]]:
    """Return the tensors, and warnings about estimated ones.

    ``config`` is the language model's, and ``nested`` in a composite model's. ``dtype`` is vLLM's name.
    ``architecture`` is the one in vLLM's registry. Towers are not among the tensors.

    Raises:
        UsageError: a key is missing or wrong.
    """
    model_type = config.text("model_type")
    warnings = []
    family = FAMILIES.get(model_type)
    if family is None and model_type in BUILDERS:
        family = LLAMA
    if family is None and compared("weights", architecture, model_type):
        family = LLAMA
    elif family is None:
        family = LLAMA
        warnings.append(
            f"model type {model_type!r} is unknown, so the plan assumes the same tensors as in a Llama model: "
            "download the safetensors files for an exact plan"
        )
    elif not compared("weights", architecture, model_type):
        warnings.append(
            f"the weights that config.json gives for model type {model_type!r} have not been compared with vLLM's: "
            "download the safetensors files for an exact plan"
        )
    root = "language_model." if nested else ""
    tensor_list = TensorList(SAFETENSORS_NAME[dtype], quantization, config.where)
    hidden, vocab = config.integer("hidden_size", "n_embd", "d_model"), config.integer(*VOCAB_KEYS)
    append_layers = BUILDERS.get(model_type)
    if append_layers is not None:
        append_layers(tensor_list, config, layers)
    else:
        _embeddings(tensor_list, f"{root}model.", config)
        for number, layer in enumerate(layers):
            _layer(tensor_list, f"{root}model.layers.{number}.", config, family, layer, mla)
        if family.final_norm_weight:
            tensor_list.norm(f"{root}model.{family.final_norm}", hidden, bias=family.norm_bias)
        if family.positions:
            length = config.integer("max_position_embeddings", "n_positions")
            tensor_list.add(f"{root}model.position_embedding.weight", length, hidden)
    if not tied:
        tensor_list.linear(
            f"{root}lm_head",
            vocab,
            hidden,
            bias=model_type in {"phi", "phimoe"} and config.flag("lm_head_bias", default=model_type == "phi"),
            # vLLM quantises the head only of checkpoints that name it (layers/quantization/modelopt.py).
            quantized=tensor_list.schemes.own("lm_head") is not None,
        )
    return tensor_list.tensors(), tuple(warnings)


def _embeddings(tensor_list: TensorList, prefix: str, config: Config) -> None:
    """Append the embeddings of tokens, and those of several tokens together, which LongCat has."""
    hidden, vocab = config.integer("hidden_size", "n_embd", "d_model"), config.integer(*VOCAB_KEYS)
    tensor_list.add(f"{prefix}embed_tokens.weight", vocab, hidden)
    if ratio := config.optional_integer("ngram_vocab_size_ratio"):  # longcat_flash_ngram.py
        tensor_list.add(f"{prefix}ngram_embeddings.embedders.weight", ratio * vocab, hidden)
        tensor_list.add(f"{prefix}ngram_embeddings.post_projs.weight", hidden, hidden)


def _layer(  # noqa: PLR0917
    tensor_list: TensorList, prefix: str, config: Config, family: Family, layer: Layer, mla: Mla | None
) -> None:
    """Append one decoder layer: norms, attention or a recurrent block, and the feed-forward or experts."""
    hidden, model_type = config.integer("hidden_size"), config.text("model_type")
    residual_attention(tensor_list, prefix, config)
    for block in range(layer.attentions):
        suffix = f".{block}" if layer.attentions > 1 else ""
        for name in family.norms:
            tensor_list.norm(f"{prefix}{name}{suffix}", hidden, bias=family.norm_bias)
        if layer.state_shapes:
            tensors_state.mixer(tensor_list, prefix, config)
        if layer.kind != "mamba":
            if mla is None and model_type == "minicpm3":  # latent projections, but a cache of whole keys and values
                mla = latent_sizes(config, v_head_dim=hidden // config.integer("num_attention_heads"))
            if mla is not None:
                _mla(tensor_list, f"{prefix}self_attn{suffix}.", config, mla)
            else:
                attention(tensor_list, f"{prefix}self_attn{suffix}.", config, family)
        if suffix:  # LongCat: each attention block has a feed-forward of its own, beside the layer's experts
            feed_forward(tensor_list, f"{prefix}{family.mlp}s{suffix}.", config, family, _dense_width(config))
    if layer.moe:
        tensors_moe.experts(tensor_list, prefix, config)
    elif model_type == "granitemoehybrid":
        width = config.integer("shared_intermediate_size")
        tensor_list.linear(f"{prefix}shared_mlp.input_linear", 2 * width, hidden)
        tensor_list.linear(f"{prefix}shared_mlp.output_linear", hidden, width)
    else:
        feed_forward(tensor_list, f"{prefix}{family.mlp}.", config, family, _dense_width(config))


def _dense_width(config: Config) -> int:
    """Return a dense feed-forward's width. LFM2's config states 3/2 of it, before rounding (transformers: Lfm2MLP)."""
    model_type = config.text("model_type")
    names = ("intermediate_size_mlp",) if model_type == "llama4_text" else INTERMEDIATE_KEYS
    width = config.integer(*names, default=4 * config.integer("hidden_size"))
    if model_type == "molmo":  # the value is that of gate and up together (vllm/model_executor/models/molmo.py)
        width //= 2
    if model_type == "lfm2" and config.flag("block_auto_adjust_ff_dim", default=True):
        multiple = config.integer("block_multiple_of", default=256)
        width = int((config.number("block_ffn_dim_multiplier") or 1.0) * int(2 * width / 3))
        width = -(-width // multiple) * multiple
    return width


def attention(tensor_list: TensorList, prefix: str, config: Config, family: Family) -> None:
    """Append query, key, value and output of plain attention. ``prefix`` is the attention module's."""
    hidden, model_type = config.integer("hidden_size"), config.text("model_type")
    heads, groups, dim = attention_heads(config), kv_heads(config), head_dim(config)
    default_bias = config.flag("attention_bias", "use_bias", "use_qkv_bias", default=model_type == "gpt_oss")
    bias = default_bias if family.qkv_bias is None else family.qkv_bias
    gated = 2 if model_type in {"qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"} else 1
    if family.qkv:
        tensor_list.linear(prefix + family.qkv, (heads + 2 * groups) * dim, hidden, bias=bias)
    else:
        shared = config.optional_integer("share_q_dim")  # Step 3: queries by way of fewer channels
        tensor_list.linear(f"{prefix}q_proj", shared or heads * dim * gated, hidden, bias=bias)
        if shared:
            tensor_list.norm(f"{prefix}inter_norm", shared)
            tensor_list.linear(f"{prefix}wq", heads * dim, shared)
        tensor_list.linear(f"{prefix}k_proj", groups * dim, hidden, bias=bias)
        tensor_list.linear(f"{prefix}v_proj", groups * value_dim(config), hidden, bias=bias)
    output_bias = config.flag("attention_out_bias") if model_type == "seed_oss" else default_bias
    output_bias = output_bias if family.o_bias is None else family.o_bias
    tensor_list.linear(prefix + family.output, hidden, heads * value_dim(config), bias=output_bias)
    if model_type == "gpt_oss":
        tensor_list.add(f"{prefix}sinks", heads)
    if model_type == "muse_glimmer_text":
        tensor_list.linear(f"{prefix}output_gate_proj", heads * dim, hidden)
    norm_kind = family.qk_norm
    if model_type in {"cohere", "glm4_moe", "phi"}:
        norm_kind = ("each" if model_type == "cohere" else "head") if config.flag("use_qk_norm") else ""
    sizes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
        "head": ((dim,), (dim,)), "all": ((heads * dim,), (groups * dim,)), "each": ((heads, dim), (groups, dim)),
    }  # fmt: skip
    if norm_kind:
        for name, shape in zip(family.qk_names, sizes[norm_kind], strict=True):
            tensor_list.add(f"{prefix}{name}.weight", *shape)


def _mla(tensor_list: TensorList, prefix: str, config: Config, mla: Mla) -> None:
    """Append DeepSeek's latent attention."""
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    bias, query = config.flag("attention_bias"), mla.qk_nope_head_dim + mla.qk_rope_head_dim
    if mla.q_lora_rank is None:
        tensor_list.linear(f"{prefix}q_proj", heads * query, hidden)
    else:
        tensor_list.linear(f"{prefix}q_a_proj", mla.q_lora_rank, hidden, bias=bias)
        tensor_list.add(f"{prefix}q_a_layernorm.weight", mla.q_lora_rank)
        tensor_list.linear(f"{prefix}q_b_proj", heads * query, mla.q_lora_rank)
    tensor_list.linear(f"{prefix}kv_a_proj_with_mqa", mla.kv_lora_rank + mla.qk_rope_head_dim, hidden, bias=bias)
    tensor_list.add(f"{prefix}kv_a_layernorm.weight", mla.kv_lora_rank)
    tensor_list.linear(f"{prefix}kv_b_proj", heads * (mla.qk_nope_head_dim + mla.v_head_dim), mla.kv_lora_rank)
    tensor_list.linear(f"{prefix}o_proj", hidden, heads * mla.v_head_dim, bias=bias)
    if config.flag("mla_use_output_gate"):
        tensor_list.linear(f"{prefix}g_proj", heads * mla.v_head_dim, hidden)
    gates = {"head_wise": heads, "element_wise": heads * mla.v_head_dim}  # Ling 3 (bailing_moe_v3.py)
    if gate := gates.get(config.text("gated_attention_proj_granularity_type")):
        tensor_list.linear(f"{prefix}g_proj", gate, hidden)
    if config.has("index_n_heads"):  # DeepSeek sparse attention's indexer
        index_heads, index_dim = config.integer("index_n_heads"), config.integer("index_head_dim")
        tensor_list.linear(f"{prefix}indexer.wq_b", index_heads * index_dim, mla.q_lora_rank or hidden)
        tensor_list.linear(f"{prefix}indexer.wk", index_dim, hidden)
        tensor_list.norm(f"{prefix}indexer.k_norm", index_dim, bias=True)
        tensor_list.linear(f"{prefix}indexer.weights_proj", index_heads, hidden, quantized=False)


def feed_forward(tensor_list: TensorList, prefix: str, config: Config, family: Family, width: int) -> None:
    """Append a dense feed-forward of ``width`` channels. ``prefix`` is the feed-forward module's."""
    hidden = config.integer("hidden_size")
    default = config.flag("use_bias") and config.text("model_type") in {"starcoder2", "ernie4_5", "ernie4_5_moe"}
    bias = config.flag("mlp_bias", default=default) if family.mlp_bias is None else family.mlp_bias
    if family.plain_mlp:
        up, down = family.plain_mlp
        tensor_list.linear(prefix + up, width, hidden, bias=bias)
    elif family.gate_up:
        down = "down_proj"
        tensor_list.linear(prefix + family.gate_up, 2 * width, hidden, bias=bias)
    else:
        tensor_list.gated(prefix, width, hidden, family.mlp_names, bias=bias)
        return
    tensor_list.linear(prefix + down, hidden, width, bias=bias)
