"""The tensors of Whisper: an encoder of audio and a decoder with cross-attention. Pure."""

from __future__ import annotations

from vllm_launch.model.config import Config
from vllm_launch.model.model import Layer
from vllm_launch.model.tensor_list import TensorList


def whisper(tensor_list: TensorList, config: Config, layers: tuple[Layer, ...]) -> None:
    """Append both halves. The head is the decoder's embedding (vllm/model_executor/models/whisper.py)."""
    hidden = config.integer("d_model")
    mels, positions = config.integer("num_mel_bins", default=80), config.integer("max_source_positions", default=1500)
    for name, channels in (("conv1", mels), ("conv2", hidden)):
        tensor_list.add(f"model.encoder.{name}.weight", hidden, channels, 3)
        tensor_list.add(f"model.encoder.{name}.bias", hidden)
    tensor_list.add("model.encoder.embed_positions.weight", positions, hidden)
    for n in range(config.integer("encoder_layers")):
        _layer(tensor_list, f"model.encoder.layers.{n}.", hidden, config.integer("encoder_ffn_dim"), ("self_attn",))
    tensor_list.norm("model.encoder.layer_norm", hidden, bias=True)
    tensor_list.add("model.decoder.embed_tokens.weight", config.integer("vocab_size"), hidden)
    tensor_list.add("model.decoder.embed_positions.weight", config.integer("max_target_positions", default=448), hidden)
    for n in range(len(layers)):
        modules = ("self_attn", "encoder_attn")
        _layer(tensor_list, f"model.decoder.layers.{n}.", hidden, config.integer("decoder_ffn_dim"), modules)
    tensor_list.norm("model.decoder.layer_norm", hidden, bias=True)


def _layer(tensor_list: TensorList, prefix: str, hidden: int, width: int, attention: tuple[str, ...]) -> None:
    for module in attention:
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            tensor_list.linear(f"{prefix}{module}.{name}", hidden, hidden, bias=name != "k_proj")
        tensor_list.norm(f"{prefix}{module}_layer_norm", hidden, bias=True)
    tensor_list.linear(f"{prefix}fc1", width, hidden, bias=True)
    tensor_list.linear(f"{prefix}fc2", hidden, width, bias=True)
    tensor_list.norm(f"{prefix}final_layer_norm", hidden, bias=True)
