"""The tensors of linear attention in Ling and Ring 2.5 and 3. Pure.

Source: vllm/model_executor/layers/mamba/linear/bailing_linear_attn.py, models/bailing_moe_v3.py.
"""

from __future__ import annotations

from vllm_launch.model.config import Config
from vllm_launch.model.layers import attention_heads, head_dim
from vllm_launch.model.tensor_list import TensorList


def bailing_hybrid(tensor_list: TensorList, prefix: str, config: Config) -> None:
    """Append a block of linear attention. ``prefix`` is its module's. Only version 3 has a convolution."""
    hidden, heads, dim = config.integer("hidden_size"), attention_heads(config), head_dim(config)
    width, bias = heads * dim, config.flag("use_bias")
    kernel = config.optional_integer("short_conv_kernel_size")
    if kernel is None:
        tensor_list.linear(f"{prefix}query_key_value", 3 * width, hidden, bias=bias or config.flag("use_qkv_bias"))
        if config.flag("use_qk_norm"):
            tensor_list.norm(f"{prefix}query_layernorm", dim)
            tensor_list.norm(f"{prefix}key_layernorm", dim)
        tensor_list.linear(f"{prefix}g_proj", width, hidden)
        tensor_list.norm(f"{prefix}g_norm", width)
        tensor_list.linear(f"{prefix}dense", hidden, width, bias=bias)
        return
    for name in ("q", "k", "v"):
        tensor_list.linear(f"{prefix}{name}_proj", width, hidden)
        tensor_list.add(f"{prefix}{name}_conv1d.weight", width, 1, kernel, dtype="F32")
    tensor_list.linear(f"{prefix}b_proj", heads, hidden)
    tensor_list.linear(f"{prefix}f_proj", width, hidden)
    tensor_list.linear(f"{prefix}g_proj", width, hidden)
    tensor_list.add(f"{prefix}dt_bias", width, dtype="F32")
    tensor_list.add(f"{prefix}A_log", heads, dtype="F32")
    tensor_list.norm(f"{prefix}o_norm", dim)
    tensor_list.linear(f"{prefix}o_proj", hidden, width)
