"""The tensors of a mixture of experts, by each family's names in the checkpoint. Pure."""

from __future__ import annotations

import msgspec

from vllm_launch.model.config import Config
from vllm_launch.model.model import Experts
from vllm_launch.model.tensor_list import GATED, TensorList

COUNT_KEYS = ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts")
"""Keys of the number of experts (vllm/transformers_utils/model_arch_config_convertor.py:get_num_experts)."""

PER_TOKEN_KEYS = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")


WIDTH_KEYS = ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size")

SHARED_KEYS = ("n_shared_experts", "moe_num_shared_experts", "num_shared_expert", "num_shared_experts")


class Naming(msgspec.Struct, frozen=True, kw_only=True):
    """How a family names the modules of a mixture of experts. ``prefix`` is that of the mixture in its layer."""

    prefix: str = "mlp."
    router: str = "gate"
    names: tuple[str, str, str] = GATED
    shared: str = ""
    shared_gate: str = ""
    correction: str = ""  # the name of a float32 bias with one value per expert
    router_dtype: str | None = None  # None: the model's


QWEN = Naming()
SHARED = Naming(shared="shared_experts")
"""Of a family that is not in NAMINGS: shared experts count if config.json has them."""

QWEN_SHARED = Naming(shared="shared_expert", shared_gate="shared_expert_gate")
DEEPSEEK3 = Naming(shared="shared_experts", correction="gate.e_score_correction_bias")
MIXTRAL = Naming(prefix="block_sparse_moe.", names=("w1", "w3", "w2"))
NAMINGS = {
    "mixtral": MIXTRAL,
    "phimoe": MIXTRAL,
    **dict.fromkeys(("qwen2_moe", "qwen3_next"), QWEN_SHARED),
    **dict.fromkeys(("qwen3_moe", "olmoe"), QWEN),
    "deepseek_v2": Naming(shared="shared_experts"),
    **dict.fromkeys(("deepseek_v3", "deepseek_v32", "kimi_k2", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa"), DEEPSEEK3),
    **dict.fromkeys(("glm5_next_text", "sarvam_mla"), DEEPSEEK3),
    **dict.fromkeys(
        ("ernie4_5_moe", "ernie4_5_moe_vl"),
        Naming(shared="shared_experts", correction="moe_statics.e_score_correction_bias"),
    ),
    "jamba": Naming(prefix="feed_forward.", router="router"),
    "lfm2_moe": Naming(prefix="feed_forward.", names=("w1", "w3", "w2"), correction="expert_bias"),
    "kimi_linear": Naming(
        prefix="block_sparse_moe.", names=("w1", "w3", "w2"), shared="shared_experts",
        correction="gate.e_score_correction_bias",
    ),
    "longcat_flash": Naming(
        router="router.classifier", router_dtype="F32", correction="router.e_score_correction_bias"
    ),
    "step3_text": Naming(prefix="moe.", shared="share_expert"),
    "hunyuan_v1_moe": Naming(router="gate.wg", shared="shared_mlp"),
}  # fmt: skip


def is_moe(config: Config, layers: int) -> list[bool]:  # noqa: PLR0911 - one return for each format
    """Return whether each of ``layers`` layers has experts."""
    count = expert_count(config)
    if not count:
        return [False] * layers
    model_type = config.text("model_type")
    if model_type == "jamba":
        period, offset = (
            config.integer("expert_layer_period", default=2),
            config.integer("expert_layer_offset", default=1, minimum=0),
        )
        return [n % period == offset for n in range(layers)]
    if model_type == "llama4_text":
        moe_layers = config.integers("moe_layers")
        step = config.integer("interleave_moe_layer_step", default=1)
        return [n in moe_layers if moe_layers is not None else (n + 1) % step == 0 for n in range(layers)]
    pattern = config.get("hybrid_override_pattern")
    if isinstance(pattern, str):
        return [letter == "E" for letter in pattern[:layers].ljust(layers, "-")]
    if model_type == "nemotron_h":
        blocks = config.strings("layers_block_type") or []
        return [n < len(blocks) and blocks[n] == "moe" for n in range(layers)]
    if listed := config.text("moe_layers_enum"):  # Step 3.5: the numbers of the layers, with commas
        return [str(n) in listed.split(",") for n in range(layers)]
    types = config.strings("mlp_layer_types")
    if types:
        return [layer_type == "sparse" for layer_type in types[:layers]] + [True] * (layers - len(types))
    config, last = _one_range(config, layers)
    first = config.integer("first_k_dense_replace", "moe_layer_start_index", "num_dense_layers", default=0, minimum=0)
    frequency = config.get("moe_layer_freq")
    if isinstance(frequency, list):
        return [bool(frequency[n]) if n < len(frequency) else True for n in range(layers)]
    step = config.integer("decoder_sparse_step", "moe_layer_interval", "moe_layer_freq", default=1)
    dense_layers = config.integers("mlp_only_layers") or []
    shift = 1 if config.has("decoder_sparse_step", "moe_layer_interval") else 0
    return [first <= n <= last and n not in dense_layers and (n + shift) % step == 0 for n in range(layers)]


def _one_range(config: Config, layers: int) -> tuple[Config, int]:
    """Return ``config`` with one first layer with experts, and the last such layer.

    Ernie VL has two mixtures, for text and for images, each with a first and a last layer. The layers between the
    smallest and the largest number have both (vllm/model_executor/models/ernie45_vl_moe.py:Ernie4_5_VLMoeDecoderLayer).
    """
    if not isinstance(config.get("moe_layer_start_index"), list):
        return config, layers
    first = min(config.integers("moe_layer_start_index") or [0])
    last = max(config.integers("moe_layer_end_index") or [layers])
    return Config({**config.raw, "moe_layer_start_index": first}, config.where, config.defaults), last


def expert_count(config: Config) -> int:
    """Return the number of routed experts, or 0 for a dense model."""
    for key in COUNT_KEYS:
        value = config.raw.get(key, config.defaults.get(key))
        if isinstance(value, list):  # Ernie VL has equal numbers for text and images
            value = value[0] if value else None
            return Config({key: value}, config.where).integer(key, minimum=0, default=0)
        if value is not None:
            return config.integer(key, default=0, minimum=0)
    return 0


def read_experts(config: Config) -> Experts | None:
    """Return the mixture of experts, or None for a dense model."""
    count = expert_count(config)
    if not count:
        return None
    width = config.largest(*WIDTH_KEYS)
    shared = config.integer(
        "shared_expert_intermediate_size",
        "shared_intermediate_size",
        "moe_shared_expert_intermediate_size",
        "share_expert_dim",
        default=0,
        minimum=0,
    )
    if not shared:
        shared = width * config.largest(*SHARED_KEYS, default=0, minimum=0)
    if not shared and config.text("model_type") == "llama4_text":
        shared = width
    return Experts(
        count=count,
        per_token=config.largest(
            next((key for key in PER_TOKEN_KEYS if config.has(key)), PER_TOKEN_KEYS[0]), default=1
        ),
        intermediate_size=width,
        shared_intermediate_size=shared,
    )


def experts(tensor_list: TensorList, prefix: str, config: Config) -> None:
    """Append one layer's router, routed and shared experts. ``prefix`` is the layer's."""
    model_type, hidden, mixture = config.text("model_type"), config.integer("hidden_size"), read_experts(config)
    if mixture is None:
        return
    count, width, shared = mixture.count, mixture.intermediate_size, mixture.shared_intermediate_size
    if model_type == "gpt_oss":
        _gpt_oss(tensor_list, f"{prefix}mlp.", hidden, count, width)
    elif model_type.startswith("granitemoe"):
        moe = f"{prefix}block_sparse_moe."
        tensor_list.add(f"{moe}input_linear.weight", count, 2 * width, hidden)
        tensor_list.add(f"{moe}output_linear.weight", count, hidden, width)
        tensor_list.add(f"{moe}router.layer.weight", count, hidden)
        if shared:
            tensor_list.linear(f"{prefix}shared_mlp.input_linear", 2 * shared, hidden)
            tensor_list.linear(f"{prefix}shared_mlp.output_linear", hidden, shared)
    elif model_type == "llama4_text":
        moe = f"{prefix}feed_forward."
        if tensor_list.schemes.of(f"{moe}experts.0.gate_proj") is None:
            tensor_list.add(f"{moe}experts.gate_up_proj", count, hidden, 2 * width)
            tensor_list.add(f"{moe}experts.down_proj", count, width, hidden)
        else:  # quantised uploads have each expert by itself
            for expert in range(count):
                tensor_list.gated(f"{moe}experts.{expert}.", width, hidden)
        tensor_list.add(f"{moe}router.weight", count, hidden)
        tensor_list.gated(f"{moe}shared_expert.", shared, hidden)
    else:
        _separate_experts(tensor_list, prefix, config, NAMINGS.get(model_type, SHARED), mixture)


def _separate_experts(tensor_list: TensorList, prefix: str, config: Config, naming: Naming, mixture: Experts) -> None:
    """Append a mixture whose experts are separate modules."""
    hidden, prefix = config.integer("hidden_size"), prefix + naming.prefix
    choices = mixture.count + config.integer(
        "zero_expert_num", default=0, minimum=0
    )  # LongCat: experts without weights
    tensor_list.add(f"{prefix}{naming.router}.weight", choices, hidden, dtype=naming.router_dtype)
    if naming.correction:
        shape = (1, choices) if "moe_statics" in naming.correction else (choices,)
        tensor_list.add(prefix + naming.correction, *shape, dtype="F32")
    bias = config.flag("use_bias") and config.text("model_type") == "ernie4_5_moe"
    latent = config.integer("routed_expert_hidden_size", default=hidden)
    for n in range(mixture.count):
        tensor_list.gated(f"{prefix}experts.{n}.", mixture.intermediate_size, latent, naming.names, bias=bias)
    if isinstance(config.get("moe_num_experts"), list):
        _experts_for_images(tensor_list, prefix, config, mixture)
    if latent != hidden:
        tensor_list.linear(f"{prefix}routed_expert_down_proj", latent, hidden, quantized=False)
        tensor_list.norm(f"{prefix}routed_expert_norm", latent)
        tensor_list.linear(f"{prefix}routed_expert_up_proj", hidden, latent, quantized=False)
    if naming.shared and mixture.shared_intermediate_size:
        tensor_list.gated(f"{prefix}{naming.shared}.", mixture.shared_intermediate_size, hidden, bias=bias)
    if naming.shared_gate:
        tensor_list.add(f"{prefix}{naming.shared_gate}.weight", 1, hidden)


def _experts_for_images(tensor_list: TensorList, prefix: str, config: Config, mixture: Experts) -> None:
    """Append the second mixture of Ernie VL, whose experts have a width of their own."""
    hidden = config.integer("hidden_size")
    counts, widths = config.integers("moe_num_experts") or [], config.integers("moe_intermediate_size") or []
    for count, width in zip(counts[1:], widths[1:], strict=False):
        tensor_list.add(f"{prefix}gate.weight_1", count, hidden, dtype="F32")
        for n in range(mixture.count, mixture.count + count):
            tensor_list.gated(f"{prefix}experts.{n}.", width, hidden)


def _gpt_oss(tensor_list: TensorList, prefix: str, hidden: int, count: int, width: int) -> None:
    """Append the stacked experts of gpt-oss. In mxfp4, 32 values are a block of 16 bytes with a scale of one byte."""
    tensor_list.linear(f"{prefix}router", count, hidden, bias=True, quantized=False)
    method = tensor_list.quantization.method if tensor_list.quantization else ""
    for name, rows, columns in (("gate_up_proj", 2 * width, hidden), ("down_proj", hidden, width)):
        if method in {"mxfp4", "gpt_oss_mxfp4"}:
            blocks = -(-columns // 32)
            tensor_list.add(f"{prefix}experts.{name}_blocks", count, rows, blocks, 16, dtype="U8")
            tensor_list.add(f"{prefix}experts.{name}_scales", count, rows, blocks, dtype="U8")
        else:
            tensor_list.add(f"{prefix}experts.{name}", count, columns, rows)
        tensor_list.add(f"{prefix}experts.{name}_bias", count, rows)
