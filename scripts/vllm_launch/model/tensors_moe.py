"""The tensors of a mixture of experts, as each family names them on disk. Pure."""

from __future__ import annotations

import msgspec

from vllm_launch.model.config import Config
from vllm_launch.model.model import Experts
from vllm_launch.model.tensor_list import TensorList

COUNT = ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts")
"""vllm/transformers_utils/model_arch_config_convertor.py:get_num_experts."""

PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")


class Naming(msgspec.Struct, frozen=True, kw_only=True):
    """Where the experts are and what is beside them."""

    at: str = "mlp."
    router: str = "gate"
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared: str = ""
    shared_gate: str = ""
    correction: str = ""  # a float32 bias for each expert


QWEN = Naming()
QWEN_SHARED = Naming(shared="shared_expert", shared_gate="shared_expert_gate")
DEEPSEEK3 = Naming(shared="shared_experts", correction="gate.e_score_correction_bias")
MIXTRAL = Naming(at="block_sparse_moe.", names=("w1", "w3", "w2"))
NAMINGS = {
    "mixtral": MIXTRAL,
    "phimoe": MIXTRAL,
    **dict.fromkeys(("qwen2_moe", "qwen3_next"), QWEN_SHARED),
    **dict.fromkeys(("qwen3_moe", "olmoe"), QWEN),
    "deepseek_v2": Naming(shared="shared_experts"),
    **dict.fromkeys(("deepseek_v3", "deepseek_v32", "kimi_k2", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa"), DEEPSEEK3),
    "ernie4_5_moe": Naming(shared="shared_experts", correction="moe_statics.e_score_correction_bias"),
    "jamba": Naming(at="feed_forward.", router="router"),
    "lfm2_moe": Naming(at="feed_forward.", names=("w1", "w3", "w2"), correction="expert_bias"),
    "hunyuan_v1_moe": Naming(router="gate.wg", shared="shared_mlp"),
}


def is_moe(config: Config, layers: int) -> list[bool]:  # noqa: PLR0911 - one return for each way to say it
    """Which layers have experts."""
    count = expert_count(config)
    if not count:
        return [False] * layers
    model_type = config.text("model_type")
    if model_type == "jamba":
        period, offset = (
            config.whole("expert_layer_period", default=2),
            config.whole("expert_layer_offset", default=1, least=0),
        )
        return [n % period == offset for n in range(layers)]
    if model_type == "llama4_text":
        chosen = config.wholes("moe_layers")
        step = config.whole("interleave_moe_layer_step", default=1)
        return [n in chosen if chosen is not None else (n + 1) % step == 0 for n in range(layers)]
    pattern = config.get("hybrid_override_pattern")
    if isinstance(pattern, str):
        return [letter == "E" for letter in pattern[:layers].ljust(layers, "-")]
    if model_type == "nemotron_h":
        return [word == "moe" for word in config.strings("layers_block_type") or []]
    words = config.strings("mlp_layer_types")
    if words:
        return [word == "sparse" for word in words[:layers]] + [True] * (layers - len(words))
    first = config.whole("first_k_dense_replace", "moe_layer_start_index", "num_dense_layers", default=0, least=0)
    frequency = config.get("moe_layer_freq")
    if isinstance(frequency, list):
        return [bool(frequency[n]) if n < len(frequency) else True for n in range(layers)]
    step = config.whole("decoder_sparse_step", "moe_layer_interval", "moe_layer_freq", default=1)
    dense = config.wholes("mlp_only_layers") or []
    shift = 1 if config.has("decoder_sparse_step", "moe_layer_interval") else 0
    return [n >= first and n not in dense and (n + shift) % step == 0 for n in range(layers)]


def expert_count(config: Config) -> int:
    """Routed experts; 0 for a dense model."""
    for key in COUNT:
        value = config.raw.get(key, config.defaults.get(key))
        if isinstance(value, list):  # Ernie VL gives one number for text and one for images, the same
            value = value[0] if value else None
            return Config({key: value}, config.where).whole(key, least=0, default=0)
        if value is not None:
            return config.whole(key, default=0, least=0)
    return 0


def read_experts(config: Config) -> Experts | None:
    """The mixture, None for a dense model."""
    count = expert_count(config)
    if not count:
        return None
    wide = config.whole("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size")
    shared = config.whole(
        "shared_expert_intermediate_size",
        "shared_intermediate_size",
        "moe_shared_expert_intermediate_size",
        default=0,
        least=0,
    )
    if not shared:
        shared = wide * config.whole(
            "n_shared_experts", "moe_num_shared_experts", "num_shared_expert", default=0, least=0
        )
    if not shared and config.text("model_type") == "llama4_text":
        shared = wide
    return Experts(
        count=count,
        per_token=config.whole(next((key for key in PER_TOKEN if config.has(key)), PER_TOKEN[0]), default=1),
        intermediate_size=wide,
        shared_intermediate_size=shared,
    )


def experts(out: TensorList, at: str, config: Config) -> None:
    """One layer's router, routed and shared experts under the layer's prefix ``at``."""
    model_type, hidden, mixture = config.text("model_type"), config.whole("hidden_size"), read_experts(config)
    if mixture is None:
        return
    count, wide, shared = mixture.count, mixture.intermediate_size, mixture.shared_intermediate_size
    if model_type == "gpt_oss":
        _gpt_oss(out, f"{at}mlp.", hidden, count, wide)
    elif model_type.startswith("granitemoe"):
        moe = f"{at}block_sparse_moe."
        out.add(f"{moe}input_linear.weight", count, 2 * wide, hidden)
        out.add(f"{moe}output_linear.weight", count, hidden, wide)
        out.add(f"{moe}router.layer.weight", count, hidden)
        if shared:
            out.linear(f"{at}shared_mlp.input_linear", 2 * shared, hidden)
            out.linear(f"{at}shared_mlp.output_linear", hidden, shared)
    elif model_type == "llama4_text":
        moe = f"{at}feed_forward."
        out.add(f"{moe}experts.gate_up_proj", count, hidden, 2 * wide)
        out.add(f"{moe}experts.down_proj", count, wide, hidden)
        out.add(f"{moe}router.weight", count, hidden)
        for name, rows, columns in (
            ("gate_proj", shared, hidden),
            ("up_proj", shared, hidden),
            ("down_proj", hidden, shared),
        ):
            out.linear(f"{moe}shared_expert.{name}", rows, columns)
    else:
        _named(out, at, config, NAMINGS.get(model_type, QWEN), mixture)


def _named(out: TensorList, at: str, config: Config, naming: Naming, mixture: Experts) -> None:
    """One module for each expert."""
    hidden, at = config.whole("hidden_size"), at + naming.at
    out.add(f"{at}{naming.router}.weight", mixture.count, hidden)
    if naming.correction:
        shape = (1, mixture.count) if "moe_statics" in naming.correction else (mixture.count,)
        out.add(at + naming.correction, *shape, dtype="F32")
    groups = [(f"{at}experts.{n}.", mixture.intermediate_size) for n in range(mixture.count)]
    if naming.shared and mixture.shared_intermediate_size:
        groups.append((f"{at}{naming.shared}.", mixture.shared_intermediate_size))
    bias = config.flag("use_bias") and config.text("model_type") == "ernie4_5_moe"
    for prefix, wide in groups:
        names = naming.names if ".experts." in prefix else ("gate_proj", "up_proj", "down_proj")
        for name, rows, columns in zip(names, (wide, wide, hidden), (hidden, hidden, wide), strict=True):
            out.linear(prefix + name, rows, columns, bias=bias)
    if naming.shared_gate:
        out.add(f"{at}{naming.shared_gate}.weight", 1, hidden)


def _gpt_oss(out: TensorList, at: str, hidden: int, count: int, wide: int) -> None:
    """Experts stacked; in mxfp4, blocks of 32 values in 16 bytes with one scale byte each."""
    out.linear(f"{at}router", count, hidden, bias=True, quantized=False)
    method = out.quantization.method if out.quantization else ""
    for name, rows, columns in (("gate_up_proj", 2 * wide, hidden), ("down_proj", hidden, wide)):
        if method in {"mxfp4", "gpt_oss_mxfp4"}:
            blocks = -(-columns // 32)
            out.add(f"{at}experts.{name}_blocks", count, rows, blocks, 16, dtype="U8")
            out.add(f"{at}experts.{name}_scales", count, rows, blocks, dtype="U8")
        else:
            out.add(f"{at}experts.{name}", count, columns, rows)
        out.add(f"{at}experts.{name}_bias", count, rows)
