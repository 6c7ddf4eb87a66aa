"""Makes a Model of what a checkpoint's files say. Pure; vLLM 0.32.0 is the authority."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_launch.engine.architectures import Architecture, config_defaults, resolve
from vllm_launch.model.checkpoint import Checkpoint
from vllm_launch.model.config import Config, language_config, shown
from vllm_launch.model.dtypes import ALIASES, NO_FLOAT16, SAFETENSORS_NAME
from vllm_launch.model.layers import (
    attention_heads,
    head_dim,
    kv_heads,
    layer_count,
    read_layers,
    read_mla,
)
from vllm_launch.model.model import Experts, Model, Quantization
from vllm_launch.model.quantization import DEPRECATED, read_quantization
from vllm_launch.model.tensors import tensors
from vllm_launch.model.tensors_moe import is_moe, read_experts

MOST_LAYERS = 10_000

MOST_EXPERTS = 100_000

LENGTH_KEYS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length", "max_target_positions",
    "max_sequence_length", "max_seq_length", "seq_len",
)  # fmt: skip
"""vllm/transformers_utils/model_arch_config_convertor.py:derive_max_model_len_and_key."""

ALREADY_SCALED = {"su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling"}
"""RoPE types whose factor vllm/config/model.py:_get_and_verify_max_len does not apply."""

QUERY_NORMS = (".q_norm.weight", ".q_layernorm.weight", ".query_layernorm.weight")
"""How the names of norms of an attention's queries end, in every family that has them (tensors.FAMILIES)."""


def build(name: str, checkpoint: Checkpoint, hf_overrides: Mapping[str, Any]) -> Model:
    """The model that ``checkpoint`` holds. Pure.

    Raises:
        UsageError: a key is missing or wrong, or vLLM does not run such a model.
    """
    where = str(checkpoint.path / "config.json") if checkpoint.path else f"{name} config.json"
    raw = _merged(checkpoint.files["config.json"], hf_overrides)
    whole = Config(raw, where)
    architecture, warnings = resolve(whole.strings("architectures") or [], where, custom_code=_custom_code(whole))
    config, nested = _language_model(raw, whole)
    count = _layer_count(config)
    _check_heads(config)
    quantization = read_quantization(raw, checkpoint.files.get("hf_quant_config.json"), where)
    dtype = _dtype(whole, config, checkpoint, architecture)
    experts, mla = _experts(config), read_mla(config)
    layers = read_layers(config, SAFETENSORS_NAME[dtype], is_moe(config, count))
    tied = _tied(whole, config)
    tower = whole.table("vision_config") if nested else None
    vision = None if tower is None else Config(tower, f"{where} vision_config")
    stored, guesses = checkpoint.tensors, tuple[str, ...]()
    if stored is None:
        stored, guesses = tensors(config, layers, mla, dtype, quantization, tied=tied, vision=vision)
    return Model(
        name=name,
        path=str(checkpoint.path) if checkpoint.path else None,
        architecture=architecture.name,
        model_type=config.text("model_type"),
        task=architecture.task,
        dtype=dtype,
        hidden_size=_hidden_size(config),
        intermediate_size=_intermediate_size(config),
        vocab_size=config.whole("vocab_size"),
        heads=attention_heads(config),
        head_dim=head_dim(config),
        kv_heads=kv_heads(config),
        layers=layers,
        max_model_len=max_model_len(whole, config, checkpoint.files, pooling=architecture.task == "pooling"),
        rope_positions=_rope_positions(config),
        tie_word_embeddings=tied,
        tensors=stored,
        tensors_from="config" if checkpoint.tensors is None else "safetensors",
        experts=experts,
        mla=mla,
        quantization=quantization,
        multimodal="multimodal" in architecture.flags or vision is not None,
        qk_norm=any(tensor.name.endswith(QUERY_NORMS) for tensor in stored),
        warnings=(*checkpoint.warnings, *warnings, *_deprecated(quantization), *guesses),
    )


def _language_model(raw: Mapping[str, Any], whole: Config) -> tuple[Config, bool]:
    """The language model's part of config.json with its class's defaults, and whether it is nested in the whole."""
    inner, where, nested = language_config(raw, whole.where)
    own_type = Config(inner, where).text("model_type") or whole.text("model_type")
    return Config({"model_type": own_type, **inner}, where, _defaults(own_type, nested=nested)), nested


def _layer_count(config: Config) -> int:
    count = layer_count(config)
    if count > MOST_LAYERS:
        raise config.wrong("num_hidden_layers", f"is {count}, which no model has")
    return count


def _experts(config: Config) -> Experts | None:
    experts = read_experts(config)
    if experts and experts.count > MOST_EXPERTS:
        raise config.wrong("num_experts", f"is {experts.count}, which no model has")
    return experts


def _hidden_size(config: Config) -> int:
    return config.whole("hidden_size", "n_embd", "d_model")


def _intermediate_size(config: Config) -> int:
    names = ("intermediate_size", "ffn_hidden_size", "n_inner", "ffn_dim", "moe_intermediate_size")
    return config.whole(*names, default=4 * _hidden_size(config), least=0)


def _deprecated(quantization: Quantization | None) -> tuple[str, ...]:
    if quantization is None or quantization.method not in DEPRECATED:
        return ()
    return (f"vLLM refuses {quantization.method} unless --allow-deprecated-quantization is given",)


def _merged(raw: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """``--hf-overrides`` laid over the config, nested objects key by key as vLLM does."""
    merged = dict(raw)
    for key, value in overrides.items():
        inner = merged.get(key)
        merged[key] = _merged(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return merged


def _custom_code(whole: Config) -> bool:
    return any(str(key).startswith("AutoModel") for key in whole.table("auto_map") or {})


def _defaults(model_type: str, *, nested: bool) -> dict[str, Any]:
    """A whole config.json states its sizes; a nested one leaves out what its class says anyway."""
    found = config_defaults(model_type)
    if nested:
        return found
    optional = {
        "tie_word_embeddings",
        "sliding_window",
        "use_sliding_window",
        "max_window_layers",
        "head_dim",
        "mlp_bias",
        "attention_bias",
        "attention_chunk_size",
        "intermediate_size_mlp",
        "interleave_moe_layer_step",
        "num_kv_shared_layers",
        "use_qk_norm",
    }
    return {key: value for key, value in found.items() if key.startswith("@") or key in optional}


def _check_heads(config: Config) -> None:
    heads, groups = attention_heads(config), kv_heads(config)
    if groups and heads % groups:
        raise config.wrong("num_key_value_heads", f"is {groups}, which does not divide the {heads} attention heads")


def _tied(whole: Config, config: Config) -> bool:
    if "tie_word_embeddings" in config.raw:
        return config.flag("tie_word_embeddings")
    if "tie_word_embeddings" in whole.raw:
        return whole.flag("tie_word_embeddings")
    return config.flag("tie_word_embeddings", default=False)


def _dtype(whole: Config, config: Config, checkpoint: Checkpoint, architecture: Architecture) -> str:
    """What ``--dtype auto`` gives on a GPU that has bfloat16 (vllm/config/model.py:_resolve_auto_dtype)."""
    stated = None
    for part in (
        whole,
        config,
        *(
            Config(t, where)
            for k in ("vision_config", "encoder_config")
            if (t := whole.table(k))
            for where in [whole.where]
        ),
    ):
        stated = stated or part.text("dtype") or part.text("torch_dtype")
    stated = (stated or "").removeprefix("torch.")
    stated = ALIASES.get(stated, stated)
    if not stated and checkpoint.tensors:
        words = {tensor.dtype for tensor in checkpoint.tensors} & set(SAFETENSORS_NAME.values())
        back = {word: dtype for dtype, word in SAFETENSORS_NAME.items()}
        stated = back[words.pop()] if len(words) == 1 else "float32"
    stated = stated or "float32"
    no_half = config.text("model_type") in NO_FLOAT16 or whole.text("model_type") in NO_FLOAT16
    preferred = "float16" if architecture.task == "pooling" and not no_half else "bfloat16"
    if stated == "float32" or (stated == "float16" and no_half) or stated not in SAFETENSORS_NAME:
        return preferred
    return stated


def max_model_len(whole: Config, config: Config, files: Mapping[str, Mapping[str, Any]], *, pooling: bool) -> int:
    """The longest context, as vllm/config/model.py:_get_and_verify_max_len derives it without --max-model-len.

    The tokenizer's limit counts for pooling models of absolute positions alone (ModelConfig.get_and_verify_max_len).
    """
    lengths = [value for key in LENGTH_KEYS if (value := config.number(key)) is not None]
    length = config.number("model_max_length") or min(lengths, default=None)
    tokenizer = files.get("tokenizer_config.json", {}).get("model_max_length")
    if not pooling or whole.get("position_embedding_type") != "absolute":
        tokenizer = None
    if isinstance(tokenizer, int | float) and not isinstance(tokenizer, bool) and 0 < tokenizer < 2**40:
        length = min(length, tokenizer) if length is not None else float(tokenizer)
    if length is None:
        length = 2048.0
    ropes = _ropes(config)
    if "gemma3" not in whole.text("model_type"):
        factor = 1.0
        for rope in ropes:
            if rope.text("rope_type") not in ALREADY_SCALED:
                factor = rope.number("factor") or factor
        length *= factor
    sentence = files.get("sentence_bert_config.json", {}).get("max_seq_length")
    if isinstance(sentence, int) and sentence > 0:
        length = float(sentence)
    if any(rope.text("rope_type") == "longrope" for rope in ropes):
        rope = next(rope for rope in ropes if rope.text("rope_type") == "longrope")
        length = (
            whole.number("original_max_position_embeddings")
            or rope.number("original_max_position_embeddings")
            or length
        )
    return max(1, int(length))


def _rope_positions(config: Config) -> int | None:
    """Rows of both tables of a model that turns local and global layers by different ones (Gemma 3), else None.

    The global one is as long as scaling stretches it, although the model's length is not.
    Source: model_executor/layers/rotary_embedding/linear_scaling_rope.py.
    """
    length = config.optional("max_position_embeddings")
    if length is None or not config.has("rope_local_base_freq"):
        return None
    factors = (rope.number("factor") for rope in _ropes(config) if rope.text("rope_type") == "linear")
    return int(length * (next(factors, None) or 1)) + length


def _ropes(config: Config) -> list[Config]:
    """Every set of RoPE parameters, with ``rope_type`` (vllm/transformers_utils/config.py:patch_rope_parameters)."""
    raw = config.table("rope_parameters") or config.table("rope_scaling") or {}
    nested = [
        value
        for value in raw.values()
        if isinstance(value, Mapping) and ("rope_type" in value or "rope_theta" in value)
    ]
    found = []
    for rope in nested or [raw]:
        kind = rope.get("rope_type", rope.get("type", "default"))
        if not isinstance(kind, str):
            raise config.wrong("rope_scaling", f"has the type {shown(kind)}")
        found.append(Config({**rope, "rope_type": kind}, f"{config.where} rope_scaling"))
    return found
