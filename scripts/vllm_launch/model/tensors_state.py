"""The tensors of recurrent layers: Mamba, gated delta net, short convolution. Pure."""

from __future__ import annotations

from collections.abc import Callable

from vllm_launch.model.config import Config
from vllm_launch.model.model import Layer
from vllm_launch.model.tensor_list import TensorList


def mixer(out: TensorList, at: str, config: Config) -> None:
    """What stands in the place of attention in a recurrent layer, under the layer's prefix ``at``."""
    if config.has("linear_num_value_heads"):
        _delta_net(out, f"{at}linear_attn.", config)
    elif config.text("model_type") in {"lfm2", "lfm2_moe"}:
        hidden = config.whole("hidden_size")
        bias = config.flag("conv_bias")
        out.linear(f"{at}conv.in_proj", 3 * hidden, hidden, bias=bias)
        out.add(f"{at}conv.conv.weight", hidden, 1, config.whole("conv_L_cache", default=3))
        out.linear(f"{at}conv.out_proj", hidden, hidden, bias=bias)
        if bias:
            out.add(f"{at}conv.conv.bias", hidden)
    elif config.text("model_type") == "jamba":
        _mamba1(out, f"{at}mamba.", config, norms=True)
    else:
        _mamba2(out, f"{at}mamba.", config)


def _delta_net(out: TensorList, at: str, config: Config) -> None:
    hidden = config.whole("hidden_size")
    keys, values = config.whole("linear_num_key_heads"), config.whole("linear_num_value_heads")
    key, value = keys * config.whole("linear_key_head_dim"), values * config.whole("linear_value_head_dim")
    out.linear(f"{at}in_proj_qkvz", 2 * key + 2 * value, hidden)
    out.linear(f"{at}in_proj_ba", 2 * values, hidden)
    out.add(f"{at}conv1d.weight", 2 * key + value, 1, config.whole("linear_conv_kernel_dim", default=4))
    out.add(f"{at}dt_bias", values)
    out.add(f"{at}A_log", values)
    out.add(f"{at}norm.weight", config.whole("linear_value_head_dim"))
    out.linear(f"{at}out_proj", hidden, value)


def _mamba1(out: TensorList, at: str, config: Config, *, norms: bool) -> None:
    hidden = config.whole("hidden_size")
    wide = int((config.number("mamba_expand", "expand") or 2) * hidden)
    if config.text("model_type") != "jamba":
        wide = config.whole("intermediate_size", default=wide)
    size = config.whole("mamba_d_state", "state_size", default=16)
    rank = (
        config.whole("mamba_dt_rank", "time_step_rank")
        if isinstance(config.get("mamba_dt_rank", "time_step_rank"), int)
        else -(-hidden // 16)
    )
    bias = config.flag("mamba_proj_bias", "use_bias")
    out.linear(f"{at}in_proj", 2 * wide, hidden, bias=bias)
    out.add(f"{at}conv1d.weight", wide, 1, config.whole("mamba_d_conv", "conv_kernel", default=4))
    if config.flag("mamba_conv_bias", "use_conv_bias", default=True):
        out.add(f"{at}conv1d.bias", wide)
    out.linear(f"{at}x_proj", rank + 2 * size, wide)
    out.linear(f"{at}dt_proj", wide, rank, bias=True)
    out.add(f"{at}A_log", wide, size)
    out.add(f"{at}D", wide)
    out.linear(f"{at}out_proj", hidden, wide, bias=bias)
    if norms:
        for name, width in (("dt", rank), ("b", size), ("c", size)):
            out.add(f"{at}{name}_layernorm.weight", width)


def _mamba2(out: TensorList, at: str, config: Config) -> None:
    hidden = config.whole("hidden_size")
    heads = config.whole("mamba_n_heads", "n_mamba_heads", "mamba_num_heads", "num_heads")
    size = config.whole("mamba_d_state", "ssm_state_size", "state_size", default=128)
    groups = config.whole("mamba_n_groups", "mamba_ngroups", "n_groups", default=1)
    wide = config.optional("mamba_d_ssm") or int((config.number("mamba_expand", "expand") or 2) * hidden)
    if config.text("model_type") == "nemotron_h":
        wide = heads * config.whole("mamba_head_dim")
    conv = wide + 2 * groups * size
    bias = config.flag("mamba_proj_bias", "use_bias")
    out.linear(f"{at}in_proj", wide + conv + heads, hidden, bias=bias)
    out.add(f"{at}conv1d.weight", conv, 1, config.whole("mamba_d_conv", "conv_kernel", default=4))
    if config.flag("mamba_conv_bias", "use_conv_bias", default=True):
        out.add(f"{at}conv1d.bias", conv)
    for name in ("dt_bias", "A_log", "D"):
        out.add(at + name, heads)
    if config.flag("mamba_rms_norm", default=config.text("model_type") != "falcon_h1"):
        out.add(f"{at}norm.weight", wide)
    out.linear(f"{at}out_proj", hidden, wide, bias=bias)


def _plain_mamba(out: TensorList, config: Config, layers: tuple[Layer, ...]) -> None:
    """Mamba and Mamba 2 without attention."""
    hidden = config.whole("hidden_size")
    out.add("backbone.embeddings.weight", config.whole("vocab_size"), hidden)
    for n in range(len(layers)):
        at = f"backbone.layers.{n}."
        out.add(f"{at}norm.weight", hidden)
        if config.text("model_type") == "mamba2":
            _mamba2(out, f"{at}mixer.", config)
        else:
            _mamba1(out, f"{at}mixer.", config, norms=False)
    out.add("backbone.norm_f.weight", hidden)


def _nemotron_h(out: TensorList, config: Config, layers: tuple[Layer, ...]) -> None:
    """Nemotron-H: each layer is a norm and one block, which is Mamba 2, attention, a feed-forward or experts."""
    hidden = config.whole("hidden_size")
    out.add("backbone.embeddings.weight", config.whole("vocab_size"), hidden)
    for n, layer in enumerate(layers):
        at = f"backbone.layers.{n}.mixer."
        out.add(f"backbone.layers.{n}.norm.weight", hidden)
        if layer.kind == "mamba":
            _mamba2(out, at, config)
        elif layer.kind == "full":
            bias, wide, narrow = config.flag("attention_bias"), layer.head_dim, layer.kv_heads * layer.head_dim
            query = config.whole("num_attention_heads") * wide
            for name, rows, columns in (
                ("q_proj", query, hidden), ("k_proj", narrow, hidden), ("v_proj", narrow, hidden),
                ("o_proj", hidden, query),
            ):  # fmt: skip
                out.linear(at + name, rows, columns, bias=bias)
        elif layer.moe:
            count = config.whole("n_routed_experts")
            latent = config.optional("moe_latent_size") or hidden
            out.add(f"{at}gate.weight", count, hidden)
            out.add(f"{at}gate.e_score_correction_bias", count, dtype="F32")
            for expert in range(count):
                _up_down(out, f"{at}experts.{expert}.", config.whole("moe_intermediate_size"), latent, bias=False)
            shared = config.whole("moe_shared_expert_intermediate_size")
            _up_down(out, f"{at}shared_experts.", shared, hidden, bias=config.flag("mlp_bias"))
            if latent != hidden:
                out.linear(f"{at}fc1_latent_proj", latent, hidden)
                out.linear(f"{at}fc2_latent_proj", hidden, latent)
        else:
            _up_down(out, at, config.whole("intermediate_size"), hidden, bias=config.flag("mlp_bias"))
    out.add("backbone.norm_f.weight", hidden)


def _up_down(out: TensorList, at: str, wide: int, hidden: int, *, bias: bool) -> None:
    out.linear(f"{at}up_proj", wide, hidden, bias=bias)
    out.linear(f"{at}down_proj", hidden, wide, bias=bias)


STYLES: dict[str, Callable[[TensorList, Config, tuple[Layer, ...]], None]] = {
    "mamba": _plain_mamba,
    "mamba2": _plain_mamba,
    "falcon_mamba": _plain_mamba,
    "nemotron_h": _nemotron_h,
}
"""Families whose whole body is unlike Llama's."""
