"""The tensors of a model whose layers have sizes of their own, found by architecture search (Nemotron). Pure.

Source: vllm/model_executor/models/nemotron_nas.py.
"""

from __future__ import annotations

from vllm_launch.model.config import Config
from vllm_launch.model.layer_kinds import searched_blocks
from vllm_launch.model.layers import attention_heads, head_dim
from vllm_launch.model.model import Layer
from vllm_launch.model.tensor_list import TensorList

WIDTH_MULTIPLE = 256
"""vLLM rounds the width of a feed-forward up to a multiple of this."""


def nemotron_nas(tensor_list: TensorList, config: Config, layers: tuple[Layer, ...]) -> None:
    """Append the embeddings and layers. A layer may lack attention, its feed-forward or both."""
    hidden = config.integer("hidden_size")
    tensor_list.add("model.embed_tokens.weight", config.integer("vocab_size"), hidden)
    for n, (layer, block) in enumerate(zip(layers, searched_blocks(config), strict=False)):
        prefix = f"model.layers.{n}."
        if not block.part("attention").flag("no_op"):
            _attention(tensor_list, f"{prefix}self_attn.", config, layer)
            tensor_list.norm(f"{prefix}input_layernorm", hidden)
        if not block.part("ffn").flag("no_op"):
            width = _width(block.part("ffn"), hidden)
            tensor_list.gated(f"{prefix}mlp.", width, hidden, bias=config.flag("mlp_bias"))
            tensor_list.norm(f"{prefix}post_attention_layernorm", hidden)
    tensor_list.norm("model.norm", hidden)


def _attention(tensor_list: TensorList, prefix: str, config: Config, layer: Layer) -> None:
    hidden, dim, bias = config.integer("hidden_size"), head_dim(config), config.flag("attention_bias", "bias")
    query, values = attention_heads(config) * dim, layer.kv_heads * dim
    for name, rows in (("q_proj", query), ("k_proj", values), ("v_proj", values)):
        tensor_list.linear(prefix + name, rows, hidden, bias=config.flag("qkv_bias", default=bias))
    tensor_list.linear(f"{prefix}o_proj", hidden, query, bias=bias)


def _width(feed_forward: Config, hidden: int) -> int:
    factor = feed_forward.number("ffn_mult")
    if factor is None:
        return feed_forward.integer("intermediate_size")
    return -(-int(2 * factor * hidden / 3) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
