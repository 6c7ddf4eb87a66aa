"""Builds a Model from the files of a checkpoint, by the rules of vLLM 0.32.0. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from vllm_launch.engine.architectures import Architecture, config_defaults, is_known_type, resolve
from vllm_launch.engine.compared import compared
from vllm_launch.model import pooling
from vllm_launch.model.chat import UserChat, read_chat
from vllm_launch.model.checkpoint import Checkpoint
from vllm_launch.model.config import INTERMEDIATE_KEYS, VOCAB_KEYS, Config, language_config, short_repr
from vllm_launch.model.dtypes import ALIASES, NO_FLOAT16, SAFETENSORS_NAME
from vllm_launch.model.encoder import read_media, tower_tensors
from vllm_launch.model.layer_kinds import encoder_only
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
from vllm_launch.model.worst_layers import worst_layers

NO_CHOICE = UserChat()

MAX_LAYERS = 10_000
MAX_EXPERTS = 100_000
"""Upper limits for the numbers of layers and experts in config.json. A larger number is a typo."""

LENGTH_KEYS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length", "max_target_positions",
    "max_sequence_length", "max_seq_length", "seq_len",
)  # fmt: skip
"""Keys of the maximum length (vllm/transformers_utils/model_arch_config_convertor.py:derive_max_model_len_and_key)."""

ALREADY_SCALED = {"longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling"}
"""RoPE types whose factor vLLM does not apply to the length (vllm/config/model.py:_get_and_verify_max_len)."""

REQUIRED_KEYS = {"hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"}
"""Keys whose default in a config class is not taken for a config.json that is not nested."""

EMBEDDING_GEMMA_LENGTH = 8192
"""Tokens (vllm/model_executor/models/config.py)."""

STATES_IN_MODEL_DTYPE = {
    "NemotronH_Nano_Omni_Reasoning_V3", "NemotronH_Omni_Reasoning_V3", "NemotronH_Super_Omni_Reasoning_V3",
}  # fmt: skip
"""Architectures of Nemotron-H for which vLLM does not read the dtype of the recurrent states in config.json
(vllm/model_executor/models/config.py: MODELS_CONFIG_MAP)."""

QUERY_NORMS = (".q_norm.weight", ".q_layernorm.weight", ".query_layernorm.weight")
"""Endings of the names of query norms, in all families that have them (tensors.FAMILIES)."""


def build(
    name: str,
    checkpoint: Checkpoint,
    hf_overrides: Mapping[str, Any],
    *,
    runner: str | None = None,
    convert: str | None = None,
    pessimistic: bool = True,
    pooler_config: Mapping[str, Any] | None = None,
    user_chat: UserChat = NO_CHOICE,
    processor_options: Mapping[str, Any] | None = None,
) -> Model:
    """Return the model that ``checkpoint`` describes. ``processor_options``: --mm-processor-kwargs. Pure.

    ``pessimistic``: count layers at their worst if their reading was not compared with vLLM's.

    Raises:
        UsageError: a key is missing or wrong, or vLLM does not run this model.
    """
    where = str(checkpoint.path / "config.json") if checkpoint.path else f"{name} config.json"
    raw = _merge(checkpoint.files["config.json"], hf_overrides)
    root = Config(raw, where)
    architecture, warnings = resolve(root.strings("architectures") or [], where, custom_code=_custom_code(root))
    config, nested = _language_model(raw, root)
    if architecture.name in STATES_IN_MODEL_DTYPE:
        config = Config({**config.raw, "mamba_ssm_cache_dtype": "auto"}, config.where, config.defaults)
    count = _layer_count(config)
    _check_heads(config)
    quantization = read_quantization(raw, checkpoint.files.get("hf_quant_config.json"), where)
    task = pooling.task(architecture, checkpoint.files, runner, convert)
    dtype = _dtype(root, config, checkpoint, task)
    experts, mla = _experts(config), read_mla(config)
    moe = is_moe(config, count)
    unsure = tuple[str, ...]()
    if pessimistic and not compared("layers", architecture.registered, config.text("model_type")):
        layers, unsure = worst_layers(config, SAFETENSORS_NAME[dtype], moe), (_not_compared(architecture, config),)
    else:
        layers = read_layers(config, SAFETENSORS_NAME[dtype], moe)
    tied = _ties_embeddings(root, config, nested=nested)
    in_composite = nested and root.table("vision_config") is not None
    multimodal = "multimodal" in architecture.flags or in_composite
    media, unknown = None, tuple[str, ...]()
    if multimodal:
        media, unknown = read_media(architecture.name, root, config, checkpoint.files, processor_options or {})
    model_tensors, estimates = checkpoint.tensors, tuple[str, ...]()
    if model_tensors is None:
        model_tensors, estimates = tensors(
            config, layers, mla, dtype, quantization,
            tied=tied, nested=in_composite, architecture=architecture.registered,
        )  # fmt: skip
        if multimodal:
            tower, guessed = tower_tensors(architecture.name, root, _hidden_size(config), dtype)
            model_tensors, estimates = (*model_tensors, *tower), (*estimates, *guessed)
    return Model(
        name=name,
        path=str(checkpoint.path) if checkpoint.path else None,
        architecture=architecture.name,
        model_type=config.text("model_type"),
        task=task,
        dtype=dtype,
        hidden_size=_hidden_size(config),
        intermediate_size=_intermediate_size(config),
        vocab_size=config.integer(*VOCAB_KEYS),
        heads=attention_heads(config),
        head_dim=head_dim(config),
        kv_heads=kv_heads(config),
        layers=layers,
        chunked_prefill=task != "pooling" or not _pools_whole_prompts(architecture, checkpoint, config, pooler_config),
        config_code=_config_code(root),
        max_model_len=max_model_len(root, config, checkpoint.files, pooling=task == "pooling"),
        rope_positions=_rope_positions(config),
        tie_word_embeddings=tied,
        keeps_head={"generate", "pooling", "multimodal"} <= set(architecture.flags)
        and not architecture.name.endswith("ForTokenClassification"),  # it has a smaller head instead
        tensors=model_tensors,
        tensors_from="config" if checkpoint.tensors is None else "safetensors",
        experts=experts,
        mla=mla,
        quantization=quantization,
        multimodal=multimodal,
        media=media,
        index_topk=config.integer("index_topk", default=0, minimum=0),
        residual_copies=config.integer("hc_mult", default=1),
        qk_norm=any(tensor.name.endswith(QUERY_NORMS) for tensor in model_tensors),
        chat=None
        if task == "pooling"
        else read_chat(checkpoint.files, checkpoint.names, architecture, root.text("model_type"), user_chat),
        warnings=(*checkpoint.warnings, *warnings, *unsure, *_deprecation(quantization), *estimates, *unknown),
    )


def _pools_whole_prompts(
    architecture: Architecture, checkpoint: Checkpoint, config: Config, pooler_config: Mapping[str, Any] | None
) -> bool:
    """Whether this pooling model needs a whole prompt in one batch, so that vLLM does not split prompts."""
    causal = not encoder_only(config) and checkpoint.files["config.json"].get("is_causal") is not False
    return not pooling.splits_prompts(architecture, checkpoint.files, pooler_config, causal=causal)


def _config_code(root: Config) -> Literal["vllm", "repository", "unknown"]:
    """Return where the code is that reads config.json: in vLLM or transformers, or in the model's repository.

    Source: vllm/transformers_utils/config.py:HFConfigParser, transformers' AutoConfig.from_pretrained.
    """
    model_type = root.text("model_type")
    if not model_type or is_known_type(model_type):
        return "vllm"
    return "repository" if "AutoConfig" in (root.table("auto_map") or {}) else "unknown"


def _language_model(raw: Mapping[str, Any], root: Config) -> tuple[Config, bool]:
    """Return the language model's config with the defaults of its class, and whether it is nested in config.json."""
    inner, where, nested = language_config(raw, root.where)
    outer_type = root.text("model_type")
    own_type = Config(inner, where).text("model_type") or config_defaults(outer_type).get(
        "nested_model_type", outer_type
    )
    defaults = config_defaults(own_type)
    if not nested:  # such a config.json states its sizes: without them it is not complete
        defaults = {key: value for key, value in defaults.items() if key not in REQUIRED_KEYS}
    return Config({"model_type": own_type, **inner}, where, defaults), nested


def _not_compared(architecture: Architecture, config: Config) -> str:
    return (
        f"the plan has not been compared with vLLM for architecture {architecture.name} with model type "
        f"{config.text('model_type')!r}: it assumes the most memory for every layer: full attention and the "
        "largest heads"
    )


def _layer_count(config: Config) -> int:
    count = layer_count(config)
    if count > MAX_LAYERS:
        raise config.error("num_hidden_layers", f"is {count}, more than the limit of {MAX_LAYERS:,}")
    return count


def _experts(config: Config) -> Experts | None:
    experts = read_experts(config)
    if experts and experts.count > MAX_EXPERTS:
        raise config.error("num_experts", f"is {experts.count}, more than the limit of {MAX_EXPERTS:,}")
    return experts


def _hidden_size(config: Config) -> int:
    return config.integer("hidden_size", "n_embd", "d_model")


def _intermediate_size(config: Config) -> int:
    keys = (*INTERMEDIATE_KEYS, "moe_intermediate_size")
    return config.largest(*keys, default=4 * _hidden_size(config), minimum=0)


def _deprecation(quantization: Quantization | None) -> tuple[str, ...]:
    if quantization is None or quantization.method not in DEPRECATED:
        return ()
    return (f"vLLM refuses {quantization.method} without --allow-deprecated-quantization",)


def _merge(raw: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``raw`` with ``--hf-overrides`` applied. Nested objects are merged key by key, as vLLM does."""
    merged = dict(raw)
    for key, value in overrides.items():
        inner = merged.get(key)
        merged[key] = _merge(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return merged


def _custom_code(root: Config) -> bool:
    return any(str(key).startswith("AutoModel") for key in root.table("auto_map") or {})


def _check_heads(config: Config) -> None:
    heads, groups = attention_heads(config), kv_heads(config)
    if groups and heads % groups:
        raise config.error("num_key_value_heads", f"is {groups}, which does not divide the {heads} attention heads")


def _ties_embeddings(root: Config, config: Config, *, nested: bool) -> bool:
    """Return whether the head is the embedding. The outer config decides, if it or its class has a value.

    Source: vllm/config/vllm.py:with_hf_config.
    """
    outer = Config(root.raw, root.where, config_defaults(root.text("model_type")) if nested else None)
    return outer.flag("tie_word_embeddings", default=config.flag("tie_word_embeddings"))


def _dtype(root: Config, config: Config, checkpoint: Checkpoint, task: str) -> str:
    """Return what ``--dtype auto`` selects on a GPU with bfloat16 (vllm/config/model.py:_resolve_auto_dtype)."""
    dtype = None
    for part in (
        root,
        config,
        *(Config(table, root.where) for key in ("vision_config", "encoder_config") if (table := root.table(key))),
    ):
        dtype = dtype or part.text("dtype") or part.text("torch_dtype")
    dtype = (dtype or "").removeprefix("torch.")
    dtype = ALIASES.get(dtype, dtype)
    if not dtype and checkpoint.tensors:
        stored_dtypes = {tensor.dtype for tensor in checkpoint.tensors} & set(SAFETENSORS_NAME.values())
        vllm_name = {stored_dtype: name for name, stored_dtype in SAFETENSORS_NAME.items()}
        dtype = vllm_name[stored_dtypes.pop()] if len(stored_dtypes) == 1 else "float32"
    dtype = dtype or "float32"
    no_float16 = config.text("model_type") in NO_FLOAT16 or root.text("model_type") in NO_FLOAT16
    preferred = "float16" if task == "pooling" and not no_float16 else "bfloat16"
    if dtype == "float32" or (dtype == "float16" and no_float16) or dtype not in SAFETENSORS_NAME:
        return preferred
    return dtype


def max_model_len(root: Config, config: Config, files: Mapping[str, Mapping[str, Any]], *, pooling: bool) -> int:
    """Return the maximum model length in tokens, as vLLM derives it without --max-model-len.

    The tokenizer's limit counts only for pooling models with absolute positions (ModelConfig.get_and_verify_max_len).
    Source: vllm/config/model.py:_get_and_verify_max_len.
    """
    lengths = [value for key in LENGTH_KEYS if (value := config.number(key)) is not None]
    length = config.number("model_max_length") or min(lengths, default=None)
    tokenizer = files.get("tokenizer_config.json", {}).get("model_max_length")
    if not pooling or root.get("position_embedding_type") != "absolute":
        tokenizer = None
    if isinstance(tokenizer, int | float) and not isinstance(tokenizer, bool) and 0 < tokenizer < 2**40:
        length = min(length, tokenizer) if length is not None else float(tokenizer)
    if length is None:
        length = 2048.0
    if config.text("model_type") == "embedding_gemma2_text":
        return min(int(length), EMBEDDING_GEMMA_LENGTH)
    ropes = _ropes(config)
    if "gemma3" not in root.text("model_type"):
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
            root.number("original_max_position_embeddings") or rope.number("original_max_position_embeddings") or length
        )
    return max(1, int(length))


def _rope_positions(config: Config) -> int | None:
    """Return the rows of both RoPE tables of a model with a local and a global one (Gemma 3), else None.

    Linear scaling makes the global table longer, but not the model's maximum length.
    Source: model_executor/layers/rotary_embedding/linear_scaling_rope.py.
    """
    length = config.optional_integer("max_position_embeddings")
    if length is None or not config.has("rope_local_base_freq"):
        return None
    factors = (rope.number("factor") for rope in _ropes(config) if rope.text("rope_type") == "linear")
    return int(length * (next(factors, None) or 1)) + length


def _ropes(config: Config) -> list[Config]:
    """Return every RoPE parameter set, with ``rope_type`` (vllm/transformers_utils/config.py:patch_rope_parameters)."""
    raw = config.table("rope_parameters") or config.table("rope_scaling") or {}
    nested = [
        value
        for value in raw.values()
        if isinstance(value, Mapping) and ("rope_type" in value or "rope_theta" in value)
    ]
    ropes = []
    for rope in nested or [raw]:
        kind = rope.get("rope_type", rope.get("type", "default"))
        kind = "longrope" if kind == "su" else kind
        if not isinstance(kind, str):
            raise config.error("rope_scaling", f"has the type {short_repr(kind)}, not a string")
        ropes.append(Config({**rope, "rope_type": kind}, f"{config.where} rope_scaling"))
    return ropes
