"""The tensors of a vision tower, estimated as those of a plain ViT with the sizes of vision_config. Pure."""

from __future__ import annotations

from vllm_launch.model.config import Config
from vllm_launch.model.tensor_list import TensorList


def vision(tensor_list: TensorList, config: Config, text_hidden: int) -> None:
    """Append patches, blocks and the projection to ``text_hidden`` channels. None of them is quantised, as in vLLM."""
    hidden = config.integer("hidden_size", "embed_dim", "width", default=1024)
    width = config.integer("intermediate_size", "mlp_dim", default=4 * hidden)
    patch = config.integer("patch_size", default=14)
    tensor_list.add(
        "vision_tower.patch_embed.weight",
        hidden,
        config.integer("num_channels", "in_channels", default=3),
        patch,
        patch,
    )
    for n in range(config.integer("num_hidden_layers", "depth", "layers", default=24)):
        prefix = f"vision_tower.layers.{n}."
        for name, rows, columns in (
            ("q_proj", hidden, hidden), ("k_proj", hidden, hidden), ("v_proj", hidden, hidden),
            ("out_proj", hidden, hidden),
            ("fc1", width, hidden), ("fc2", hidden, width),
        ):  # fmt: skip
            tensor_list.linear(prefix + name, rows, columns, bias=True, quantized=False)
        for name in ("layer_norm1", "layer_norm2"):
            tensor_list.add(f"{prefix}{name}.weight", hidden)
            tensor_list.add(f"{prefix}{name}.bias", hidden)
    tensor_list.linear("multi_modal_projector.linear", text_hidden, hidden, quantized=False)
