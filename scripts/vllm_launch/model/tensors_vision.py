"""The tensors of a vision tower, near enough to plan with: a plain ViT after vision_config. Pure."""

from __future__ import annotations

from vllm_launch.model.config import Config
from vllm_launch.model.tensor_list import TensorList


def vision(out: TensorList, config: Config, text_hidden: int) -> None:
    """Patches, blocks and the projection onto ``text_hidden``; never quantised, as in vLLM."""
    hidden = config.whole("hidden_size", "embed_dim", "width", default=1024)
    wide = config.whole("intermediate_size", "mlp_dim", default=4 * hidden)
    patch = config.whole("patch_size", default=14)
    out.add(
        "vision_tower.patch_embed.weight", hidden, config.whole("num_channels", "in_channels", default=3), patch, patch
    )
    for n in range(config.whole("num_hidden_layers", "depth", "layers", default=24)):
        at = f"vision_tower.layers.{n}."
        for name, rows, columns in (
            ("q_proj", hidden, hidden), ("k_proj", hidden, hidden), ("v_proj", hidden, hidden),
            ("out_proj", hidden, hidden),
            ("fc1", wide, hidden), ("fc2", hidden, wide),
        ):  # fmt: skip
            out.linear(at + name, rows, columns, bias=True, quantized=False)
        for name in ("layer_norm1", "layer_norm2"):
            out.add(f"{at}{name}.weight", hidden)
            out.add(f"{at}{name}.bias", hidden)
    out.linear("multi_modal_projector.linear", text_hidden, hidden, quantized=False)
