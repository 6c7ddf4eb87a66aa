"""The caches of a model whose layers were not compared with vLLM's: each layer at its worst. Pure."""

from __future__ import annotations

import msgspec

from vllm_launch.errors import UsageError
from vllm_launch.model.config import Config
from vllm_launch.model.layers import Heads, attention_heads, head_dim, kv_heads, read_layers
from vllm_launch.model.model import Layer

HEAD_DIM_KEYS = ("head_dim", "global_head_dim", "swa_head_dim", "v_head_dim", "swa_v_head_dim", "kv_channels")
KV_HEAD_KEYS = (
    "num_key_value_heads", "num_global_key_value_heads", "swa_num_key_value_heads", "num_attention_groups",
    "multi_query_group_num",
)  # fmt: skip


def worst_layers(config: Config, dtype: str, moe: list[bool]) -> tuple[Layer, ...]:
    """Return every layer with the largest cache that config.json can mean. ``dtype`` and ``moe`` as in read_layers.

    A layer with attention keeps all tokens, with the most heads and the largest ones. A layer with a recurrent state
    keeps it, and counts as attention if config.json does not give the state's sizes. Latent vectors stay as they are.
    A model whose layers all have no cache, such as an encoder, stays without.
    """
    try:
        layers = read_layers(config, dtype, moe)
    except UsageError:
        layers = tuple(Layer(kind="full", moe=experts) for experts in moe)
    if all(layer.kind == "none" for layer in layers):
        return layers
    heads = largest_heads(config, layers)
    return tuple(
        layer if layer.kind in {"mamba", "mla", "compressed"} else _with_attention(layer, heads) for layer in layers
    )


def largest_heads(config: Config, layers: tuple[Layer, ...]) -> Heads:
    """Return the most KV heads and the largest widths of a key and a value that config.json has for any layer."""
    latent = sum(config.optional_integer(key, minimum=0) or 0 for key in ("qk_nope_head_dim", "qk_rope_head_dim"))
    widths = [config.optional_integer(key, minimum=0) or 0 for key in HEAD_DIM_KEYS]
    width = max(latent, *widths, head_dim(config), *(layer.head_dim for layer in layers if layer.kind != "mla"))
    counts = [config.optional_integer(key, minimum=0) or 0 for key in KV_HEAD_KEYS]
    count = max(*counts, *(layer.kv_heads for layer in layers)) or kv_heads(config) or attention_heads(config)
    return Heads(count, width, width)


def _with_attention(layer: Layer, heads: Heads) -> Layer:
    return msgspec.structs.replace(
        layer, kind="full", window=None, kv_heads=heads.kv_heads, head_dim=heads.key, head_dim_v=heads.value
    )
