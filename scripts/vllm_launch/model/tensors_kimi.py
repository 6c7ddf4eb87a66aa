"""The tensors of Kimi Linear and Kimi K3 that other models do not have. Pure.

Source: vllm/models/kimi_k3/nvidia/model.py.
"""

from __future__ import annotations

from vllm_launch.model.config import Config
from vllm_launch.model.tensor_list import TensorList


def kimi_delta(tensor_list: TensorList, prefix: str, config: Config) -> None:
    """Append a block of Kimi delta attention. ``prefix`` is its module's."""
    hidden = config.integer("hidden_size")
    linear = Config(config.table("linear_attn_config") or {}, f"{config.where} linear_attn_config")
    heads, dim = linear.integer("num_heads"), linear.integer("head_dim")
    width = heads * dim
    for name in ("q_proj", "k_proj", "v_proj"):
        tensor_list.linear(prefix + name, width, hidden)
    kernel = linear.integer("short_conv_kernel_size", default=4)
    tensor_list.add(f"{prefix}conv1d.weight", 3 * width, 1, kernel, dtype="F32")
    tensor_list.linear(f"{prefix}f_a_proj", dim, hidden)
    tensor_list.linear(f"{prefix}f_b_proj", width, dim)
    tensor_list.linear(f"{prefix}b_proj", heads, hidden)
    if linear.flag("use_full_rank_gate"):
        tensor_list.linear(f"{prefix}g_proj", width, hidden)
    else:
        tensor_list.linear(f"{prefix}g_a_proj", dim, hidden)
        tensor_list.linear(f"{prefix}g_b_proj", width, dim)
    tensor_list.add(f"{prefix}dt_bias", width, dtype="F32")
    tensor_list.add(f"{prefix}A_log", heads, dtype="F32")
    tensor_list.add(f"{prefix}o_norm.weight", dim)
    tensor_list.linear(f"{prefix}o_proj", hidden, width)


def residual_attention(tensor_list: TensorList, prefix: str, config: Config) -> None:
    """Append the norms and scores with which a layer of Kimi K3 mixes the outputs of earlier layers."""
    if not config.has("attn_res_block_size"):
        return
    hidden = config.integer("hidden_size")
    for name in ("self_attention", "mlp"):
        tensor_list.norm(f"{prefix}{name}_res_norm", hidden)
        tensor_list.add(f"{prefix}{name}_res_proj.weight", 1, hidden)
