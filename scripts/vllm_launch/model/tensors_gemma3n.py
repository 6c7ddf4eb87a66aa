"""The tensors of Gemma 3n's language model, as vLLM allocates them. Pure.

Source: vllm/model_executor/models/gemma3n.py. Each layer has several copies of the hidden state (AltUp), a projection
of low rank beside attention (LAuReL), and a second input, as Gemma 4.
"""

from __future__ import annotations

from vllm_launch.model.config import INTERMEDIATE_KEYS, VOCAB_KEYS, Config
from vllm_launch.model.layer_kinds import layer_kinds
from vllm_launch.model.model import Layer
from vllm_launch.model.tensor_list import TensorList
from vllm_launch.model.tensors_gemma4 import NORMS, append_input, append_inputs, attention

GEMMA3N = {"gemma3n", "gemma3n_text"}


def gemma3n(tensor_list: TensorList, config: Config, layers: tuple[Layer, ...]) -> None:
    """Append the embeddings, the layers and the last norm."""
    hidden, copies = config.integer("hidden_size"), config.integer("altup_num_inputs", default=4)
    rank = config.integer("laurel_rank", default=64)
    tensor_list.add("model.embed_tokens.weight", config.integer(*VOCAB_KEYS), hidden)
    per_layer = append_inputs(tensor_list, config, len(layers))
    for n in range(copies - 1):
        tensor_list.linear(f"model.altup_projections.{n}", hidden, hidden)
        tensor_list.linear(f"model.altup_unembed_projections.{n}", hidden, hidden)
    shared_from = len(layers) - config.integer("num_kv_shared_layers", default=0, minimum=0)
    for n, kind in enumerate(layer_kinds(config, len(layers))):
        prefix = f"model.layers.{n}."
        for name in NORMS:
            tensor_list.norm(prefix + name, hidden)
        attention(tensor_list, f"{prefix}self_attn.", config, kind, shared=n >= shared_from)
        width = config.in_layer(n, *INTERMEDIATE_KEYS).integer(*INTERMEDIATE_KEYS)
        tensor_list.gated(f"{prefix}mlp.", width, hidden)
        tensor_list.linear(f"{prefix}altup.correction_coefs", copies, copies)
        tensor_list.linear(f"{prefix}altup.prediction_coefs", copies * copies, copies)
        tensor_list.linear(f"{prefix}altup.modality_router", copies, hidden)
        tensor_list.norm(f"{prefix}altup.router_norm", hidden)
        tensor_list.add(f"{prefix}altup.correct_output_scale", hidden)
        tensor_list.linear(f"{prefix}laurel.linear_left", rank, hidden)
        tensor_list.linear(f"{prefix}laurel.linear_right", hidden, rank)
        tensor_list.norm(f"{prefix}laurel.post_laurel_norm", hidden)
        append_input(tensor_list, prefix, hidden, per_layer)
    tensor_list.add("model.norm.weight", hidden)
