"""The tensors of Gemma 4's language model, as vLLM allocates them. Pure.

Source: vllm/model_executor/models/gemma4.py. Layers of full attention have heads of their own. If their values equal
their keys, the checkpoint has no v_proj, but vLLM allocates it. The last layers can use the keys and values of an
earlier layer.
"""

from __future__ import annotations

from vllm_launch.model import tensors_moe
from vllm_launch.model.config import INTERMEDIATE_KEYS, VOCAB_KEYS, Config
from vllm_launch.model.layer_kinds import layer_kinds
from vllm_launch.model.layers import layer_heads
from vllm_launch.model.model import Layer
from vllm_launch.model.tensor_list import TensorList

NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
EXPERT_NORMS = ("post_feedforward_layernorm_1", "post_feedforward_layernorm_2", "pre_feedforward_layernorm_2")


def gemma4(tensor_list: TensorList, config: Config, layers: tuple[Layer, ...]) -> None:
    """Append the embeddings, the layers and the last norm."""
    hidden, vocab = config.integer("hidden_size"), config.integer(*VOCAB_KEYS)
    tensor_list.add("model.embed_tokens.weight", vocab, hidden)
    per_layer = append_inputs(tensor_list, config, len(layers))
    shared_from = len(layers) - config.integer("num_kv_shared_layers", default=0, minimum=0)
    for n, kind in enumerate(layer_kinds(config, len(layers))):
        prefix = f"model.layers.{n}."
        for name in NORMS + (EXPERT_NORMS if layers[n].moe else ()):
            tensor_list.norm(prefix + name, hidden)
        attention(tensor_list, f"{prefix}self_attn.", config, kind, shared=n >= shared_from)
        wide = 2 if n >= shared_from and config.flag("use_double_wide_mlp") else 1
        width = wide * config.integer(*INTERMEDIATE_KEYS)
        tensor_list.gated(f"{prefix}mlp.", width, hidden)
        if layers[n].moe:
            _experts(tensor_list, prefix, config)
        append_input(tensor_list, prefix, hidden, per_layer)
    tensor_list.add("model.norm.weight", hidden)


def append_inputs(tensor_list: TensorList, config: Config, layers: int) -> int:
    """Append the embeddings that each layer gets as a second input. Return their size, or 0 if there are none."""
    per_layer = config.integer("hidden_size_per_layer_input", default=0, minimum=0)
    if per_layer:
        rows = config.integer("vocab_size_per_layer_input", *VOCAB_KEYS)
        tensor_list.add("model.embed_tokens_per_layer.weight", rows, layers * per_layer)
        tensor_list.add("model.per_layer_model_projection.weight", layers * per_layer, config.integer("hidden_size"))
        tensor_list.add("model.per_layer_projection_norm.weight", per_layer)
    return per_layer


def append_input(tensor_list: TensorList, prefix: str, hidden: int, per_layer: int) -> None:
    """Append what mixes this second input into one layer."""
    if per_layer:
        tensor_list.linear(f"{prefix}per_layer_input_gate", per_layer, hidden)
        tensor_list.linear(f"{prefix}per_layer_projection", hidden, per_layer)
        tensor_list.add(f"{prefix}post_per_layer_input_norm.weight", hidden)


def attention(tensor_list: TensorList, prefix: str, config: Config, kind: str, *, shared: bool) -> None:
    """Append one layer's attention. ``shared``: it uses the keys and values of an earlier layer."""
    hidden, queries = config.integer("hidden_size"), config.integer("num_attention_heads")
    heads = layer_heads(config, kind)
    bias = config.flag("attention_bias")
    tensor_list.linear(f"{prefix}q_proj", queries * heads.key, hidden, bias=bias)
    tensor_list.linear(f"{prefix}o_proj", hidden, queries * heads.key, bias=bias)
    tensor_list.add(f"{prefix}q_norm.weight", heads.key)
    if not shared:
        tensor_list.linear(f"{prefix}k_proj", heads.kv_heads * heads.key, hidden, bias=bias)
        tensor_list.linear(f"{prefix}v_proj", heads.kv_heads * heads.value, hidden, bias=bias)
        tensor_list.add(f"{prefix}k_norm.weight", heads.key)


def _experts(tensor_list: TensorList, prefix: str, config: Config) -> None:
    """Append one layer's experts, which run beside its dense feed-forward."""
    mixture, hidden = tensors_moe.read_experts(config), config.integer("hidden_size")
    if mixture is None:
        return
    tensor_list.add(f"{prefix}router.proj.weight", mixture.count, hidden)
    tensor_list.add(f"{prefix}router.scale", hidden)
    tensor_list.add(f"{prefix}router.per_expert_scale", mixture.count)
    for expert in range(mixture.count):
        tensor_list.gated(f"{prefix}experts.{expert}.", mixture.intermediate_size, hidden)
