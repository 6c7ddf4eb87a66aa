"""The tensors of recurrent layers: Mamba, gated delta net and short convolution. Pure."""

from __future__ import annotations

from collections.abc import Callable

from vllm_launch.model.config import Config
from vllm_launch.model.model import Layer
from vllm_launch.model.tensor_list import TensorList
from vllm_launch.model.tensors_bailing import bailing_hybrid
from vllm_launch.model.tensors_kimi import kimi_delta


def mixer(tensor_list: TensorList, prefix: str, config: Config) -> None:
    """Append the block that replaces attention in a recurrent layer. ``prefix`` is the layer's."""
    if config.text("model_type") == "kimi_linear":
        kimi_delta(tensor_list, f"{prefix}self_attn.", config)
    elif config.text("model_type") == "bailing_hybrid":
        bailing_hybrid(tensor_list, f"{prefix}self_attn.", config)
    elif config.has("linear_num_heads"):  # GLM 5 Next
        linear = {
            "num_heads": config.integer("linear_num_heads"),
            "head_dim": config.integer("linear_head_dim"),
            "short_conv_kernel_size": config.integer("linear_conv_kernel_dim", default=4),
        }
        own = Config({**config.raw, "linear_attn_config": linear}, config.where, config.defaults)
        kimi_delta(tensor_list, f"{prefix}self_attn.", own)
    elif config.get("linear_num_value_heads") is not None:
        _delta_net(tensor_list, f"{prefix}linear_attn.", config)
    elif config.text("model_type") in {"lfm2", "lfm2_moe"}:
        hidden = config.integer("hidden_size")
        bias = config.flag("conv_bias")
        tensor_list.linear(f"{prefix}conv.in_proj", 3 * hidden, hidden, bias=bias)
        tensor_list.add(f"{prefix}conv.conv.weight", hidden, 1, config.integer("conv_L_cache", default=3))
        tensor_list.linear(f"{prefix}conv.out_proj", hidden, hidden, bias=bias)
        if bias:
            tensor_list.add(f"{prefix}conv.conv.bias", hidden)
    elif config.text("model_type") == "jamba":
        _mamba1(tensor_list, f"{prefix}mamba.", config, norms=True)
    else:
        _mamba2(tensor_list, f"{prefix}mamba.", config)


def _delta_net(tensor_list: TensorList, prefix: str, config: Config) -> None:
    hidden = config.integer("hidden_size")
    keys, values = config.integer("linear_num_key_heads"), config.integer("linear_num_value_heads")
    key, value = keys * config.integer("linear_key_head_dim"), values * config.integer("linear_value_head_dim")
    if config.text("model_type") == "qwen3_next":
        inputs = {"in_proj_qkvz": 2 * key + 2 * value, "in_proj_ba": 2 * values}
    else:  # Qwen 3.5 stores them apart, and quantises only the large ones
        inputs = {"in_proj_qkv": 2 * key + value, "in_proj_z": value, "in_proj_b": values, "in_proj_a": values}
    for name, rows in inputs.items():
        tensor_list.linear(prefix + name, rows, hidden)
    tensor_list.add(f"{prefix}conv1d.weight", 2 * key + value, 1, config.integer("linear_conv_kernel_dim", default=4))
    tensor_list.add(f"{prefix}dt_bias", values)
    tensor_list.add(f"{prefix}A_log", values)
    tensor_list.add(f"{prefix}norm.weight", config.integer("linear_value_head_dim"))
    tensor_list.linear(f"{prefix}out_proj", hidden, value)


def _mamba1(tensor_list: TensorList, prefix: str, config: Config, *, norms: bool) -> None:
    hidden = config.integer("hidden_size")
    channels = int((config.number("mamba_expand", "expand") or 2) * hidden)
    if config.text("model_type") != "jamba":
        channels = config.integer("intermediate_size", default=channels)
    size = config.integer("mamba_d_state", "state_size", default=16)
    rank = (
        config.integer("mamba_dt_rank", "time_step_rank")
        if isinstance(config.get("mamba_dt_rank", "time_step_rank"), int)
        else -(-hidden // 16)
    )
    bias = config.flag("mamba_proj_bias", "use_bias")
    tensor_list.linear(f"{prefix}in_proj", 2 * channels, hidden, bias=bias)
    tensor_list.add(f"{prefix}conv1d.weight", channels, 1, config.integer("mamba_d_conv", "conv_kernel", default=4))
    if config.flag("mamba_conv_bias", "use_conv_bias", default=True):
        tensor_list.add(f"{prefix}conv1d.bias", channels)
    tensor_list.linear(f"{prefix}x_proj", rank + 2 * size, channels)
    tensor_list.linear(f"{prefix}dt_proj", channels, rank, bias=True)
    tensor_list.add(f"{prefix}A_log", channels, size)
    tensor_list.add(f"{prefix}D", channels)
    tensor_list.linear(f"{prefix}out_proj", hidden, channels, bias=bias)
    if norms:
        for name, width in (("dt", rank), ("b", size), ("c", size)):
            tensor_list.add(f"{prefix}{name}_layernorm.weight", width)


def _mamba2(tensor_list: TensorList, prefix: str, config: Config) -> None:
    hidden = config.integer("hidden_size")
    heads = config.integer("mamba_n_heads", "n_mamba_heads", "mamba_num_heads", "num_heads")
    size = config.integer("mamba_d_state", "ssm_state_size", "state_size", default=128)
    groups = config.integer("mamba_n_groups", "mamba_ngroups", "n_groups", default=1)
    channels = config.optional_integer("mamba_d_ssm") or int((config.number("mamba_expand", "expand") or 2) * hidden)
    if config.text("model_type") == "nemotron_h":
        channels = heads * config.integer("mamba_head_dim")
    conv = channels + 2 * groups * size
    bias = config.flag("mamba_proj_bias", "use_bias")
    tensor_list.linear(f"{prefix}in_proj", channels + conv + heads, hidden, bias=bias)
    tensor_list.add(f"{prefix}conv1d.weight", conv, 1, config.integer("mamba_d_conv", "conv_kernel", default=4))
    if config.flag("mamba_conv_bias", "use_conv_bias", default=True):
        tensor_list.add(f"{prefix}conv1d.bias", conv)
    for name in ("dt_bias", "A_log", "D"):
        tensor_list.add(prefix + name, heads)
    if config.flag("mamba_rms_norm", default=config.text("model_type") != "falcon_h1"):
        tensor_list.add(f"{prefix}norm.weight", channels)
    tensor_list.linear(f"{prefix}out_proj", hidden, channels, bias=bias)


def _plain_mamba(tensor_list: TensorList, config: Config, layers: tuple[Layer, ...]) -> None:
    """Append the embeddings and layers of a Mamba or Mamba 2 model without attention."""
    hidden = config.integer("hidden_size")
    tensor_list.add("backbone.embeddings.weight", config.integer("vocab_size"), hidden)
    for n in range(len(layers)):
        prefix = f"backbone.layers.{n}."
        tensor_list.add(f"{prefix}norm.weight", hidden)
        if config.text("model_type") == "mamba2":
            _mamba2(tensor_list, f"{prefix}mixer.", config)
        else:
            _mamba1(tensor_list, f"{prefix}mixer.", config, norms=False)
    tensor_list.add("backbone.norm_f.weight", hidden)


def _nemotron_h(tensor_list: TensorList, config: Config, layers: tuple[Layer, ...]) -> None:
    """Append Nemotron-H's layers. Each is a norm and a block: Mamba 2, attention, a feed-forward or experts."""
    hidden = config.integer("hidden_size")
    tensor_list.add("backbone.embeddings.weight", config.integer("vocab_size"), hidden)
    for n, layer in enumerate(layers):
        prefix = f"backbone.layers.{n}.mixer."
        tensor_list.add(f"backbone.layers.{n}.norm.weight", hidden)
        if layer.kind == "mamba":
            _mamba2(tensor_list, prefix, config)
        elif layer.kind == "full":
            bias, kv_width = config.flag("attention_bias"), layer.kv_heads * layer.head_dim
            query = config.integer("num_attention_heads") * layer.head_dim
            for name, rows, columns in (
                ("q_proj", query, hidden), ("k_proj", kv_width, hidden), ("v_proj", kv_width, hidden),
                ("o_proj", hidden, query),
            ):  # fmt: skip
                tensor_list.linear(prefix + name, rows, columns, bias=bias)
        elif layer.moe:
            count = config.integer("n_routed_experts")
            latent = config.optional_integer("moe_latent_size") or hidden
            tensor_list.add(f"{prefix}gate.weight", count, hidden)
            tensor_list.add(f"{prefix}gate.e_score_correction_bias", count, dtype="F32")
            for expert in range(count):
                _up_down(
                    tensor_list,
                    f"{prefix}experts.{expert}.",
                    config.integer("moe_intermediate_size"),
                    latent,
                    bias=False,
                )
            shared = config.integer("moe_shared_expert_intermediate_size")
            _up_down(tensor_list, f"{prefix}shared_experts.", shared, hidden, bias=config.flag("mlp_bias"))
            if latent != hidden:
                tensor_list.linear(f"{prefix}fc1_latent_proj", latent, hidden)
                tensor_list.linear(f"{prefix}fc2_latent_proj", hidden, latent)
        else:
            _up_down(tensor_list, prefix, config.integer("intermediate_size"), hidden, bias=config.flag("mlp_bias"))
    tensor_list.add("backbone.norm_f.weight", hidden)


def _up_down(tensor_list: TensorList, prefix: str, channels: int, hidden: int, *, bias: bool) -> None:
    tensor_list.linear(f"{prefix}up_proj", channels, hidden, bias=bias)
    tensor_list.linear(f"{prefix}down_proj", hidden, channels, bias=bias)


BUILDERS: dict[str, Callable[[TensorList, Config, tuple[Layer, ...]], None]] = {
    "mamba": _plain_mamba,
    "mamba2": _plain_mamba,
    "falcon_mamba": _plain_mamba,
    "nemotron_h": _nemotron_h,
}
"""Functions that append the embeddings and layers of a model that consists of other blocks than Llama's."""
