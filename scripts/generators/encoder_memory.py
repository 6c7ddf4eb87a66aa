"""Counts the bytes that vLLM's own vision and audio encoders hold at once, without a GPU: ``bytes_per_token(...)``.

An encoder runs eagerly, so its peak follows from the order in which PyTorch allocates and frees tensors. On the meta
device this order is the same, and tensors have sizes but no memory. Kernels that vLLM compiles for CUDA do not run:
attention allocates its output, and Triton kernels write into tensors that exist.
"""

# ruff: noqa: PLC0415, TID251 - vLLM may only be imported after pretend_h200

from __future__ import annotations

import sys
import types
import weakref
from collections.abc import Callable, Mapping
from typing import Any

SIDE = 128
"""Patches on each side of an image whose size is free."""


def replace_kernels() -> None:
    """Let kernels that need CUDA or Triton allocate what they return, and nothing else."""
    import torch
    from triton.runtime import jit
    from vllm.utils import torch_utils

    jit.JITFunction.run = lambda *_, **__: None
    rotary = types.ModuleType("vllm.vllm_flash_attn.layers.rotary")
    rotary.apply_rotary_emb = (  # type: ignore[attr-defined]
        lambda x, *_, inplace=False, **__: x if inplace else torch.empty_like(x)
    )
    sys.modules["vllm.vllm_flash_attn.layers"] = types.ModuleType("vllm.vllm_flash_attn.layers")
    sys.modules[rotary.__name__] = rotary
    torch_utils.is_pin_memory_available = lambda: False
    torch.Tensor.pin_memory = lambda tensor, *_, **__: tensor  # type: ignore[method-assign,assignment]


def bytes_per_token(model: Any, config: Mapping[str, Any]) -> int | None:
    """Return the most bytes alive for each token of the encoder's output, or None if it does not run on meta.

    They include the pixels and the output. Some encoders run all items at once, and others one after the other. The
    result holds for one item and for each further item.
    """
    for inputs in INPUTS:
        try:
            (few, low), (many, high) = (_peak(model, inputs(config, count)) for count in (1, 2))
        except Exception:  # noqa: BLE001, S112 - these are another model's inputs
            continue
        if few and many == 2 * few:
            return round(max(low / few, (high - low) / (many - few)))
    return None


def _peak(model: Any, inputs: Mapping[str, Any]) -> tuple[int, int]:
    """Return the tokens of the encoder's output, and the most bytes alive."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from vllm.config import VllmConfig, set_current_vllm_config

    class Live(TorchDispatchMode):
        now = peak = 0

        def __init__(self) -> None:
            super().__init__()
            self.sizes: dict[int, int] = {}

        def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            for tensor in tree_leaves(result):
                if isinstance(tensor, torch.Tensor) and tensor.device.type == "meta":
                    self.add(tensor.untyped_storage())
            return result

        def add(self, storage: Any) -> None:
            key = storage._cdata  # noqa: SLF001 - identifies a storage
            if key not in self.sizes:
                self.sizes[key] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.remove, key)

        def remove(self, key: int) -> None:
            self.now -= self.sizes.pop(key, 0)

    live = Live()
    for tensor in tree_leaves(inputs):
        if isinstance(tensor, torch.Tensor) and tensor.device.type == "meta":
            live.add(tensor.untyped_storage())
    with torch.inference_mode(), set_current_vllm_config(VllmConfig()), live:
        outputs = model.embed_multimodal(**inputs)
    return sum(output.numel() // output.shape[-1] for output in outputs), live.peak


def _pixels(*sizes: int) -> Any:
    import torch

    return torch.empty(*sizes, dtype=torch.bfloat16, device="meta")  # vLLM casts pixels to the model's dtype


def _grids(count: int, *frames: int) -> Any:
    import torch

    return torch.tensor([[*frames, SIDE, SIDE]] * count)


def _vision(config: Mapping[str, Any]) -> Mapping[str, Any]:
    vision: Mapping[str, Any] = (config.get("thinker_config") or config)["vision_config"]
    return vision


def _image_size(config: Mapping[str, Any]) -> int:
    size = _vision(config)["image_size"]
    return int(size[0] if isinstance(size, list) else size)


def _qwen(config: Mapping[str, Any], count: int) -> dict[str, Any]:
    vision = _vision(config)
    channels = vision.get("in_channels", vision.get("in_chans", vision.get("num_channels", 3)))
    row = channels * vision.get("temporal_patch_size", 1) * vision["patch_size"] ** 2
    return {"pixel_values": _pixels(count * SIDE * SIDE, row), "image_grid_thw": _grids(count, 1)}


def _kimi(config: Mapping[str, Any], count: int) -> dict[str, Any]:
    patch = _vision(config)["patch_size"]
    pixels = _pixels(count * SIDE * SIDE, 3, patch, patch)
    return {"pixel_values": pixels, "image_grid_hws": _grids(count), "grid_thws": _grids(count, 1)}


def _keye(config: Mapping[str, Any], count: int) -> dict[str, Any]:
    patch = _vision(config)["patch_size"]
    return {"pixel_values": _pixels(count * SIDE * SIDE, 3, patch, patch), "image_grid_thw": _grids(count, 1)}


def _paddle(config: Mapping[str, Any], count: int) -> dict[str, Any]:
    patch = _vision(config)["patch_size"]
    pixels = [_pixels(SIDE * SIDE, 3, patch, patch) for _ in range(count)]
    return {"pixel_values": pixels, "image_grid_thw": _grids(count, 1)}


def _images(config: Mapping[str, Any], count: int) -> dict[str, Any]:
    import torch

    size, ones = _image_size(config), torch.ones(count, dtype=torch.int64)
    pixels = _pixels(count, 3, size, size)
    return {"pixel_values": pixels, "num_patches": ones, "patches_per_image": ones,
            "aspect_ratios": torch.ones(count, 2, dtype=torch.int64)}  # fmt: skip


def _intern(config: Mapping[str, Any], count: int) -> dict[str, Any]:
    import torch

    size = _image_size(config)
    flat = _pixels(count, 3, size, size)
    return {"pixel_values": flat, "pixel_values_flat": flat, "image_token_id": 5,
            "image_num_patches": torch.ones(count, dtype=torch.int64),
            "num_patches": torch.ones(count, dtype=torch.int64)}  # fmt: skip


def _tiles(config: Mapping[str, Any], count: int) -> dict[str, Any]:
    import torch

    size = _image_size(config)
    return {"pixel_values": [_pixels(3, 3, size, size) for _ in range(count)],
            "image_sizes": torch.tensor([[2 * size, size]] * count)}  # fmt: skip


def _audio(config: Mapping[str, Any], count: int) -> dict[str, Any]:
    import torch

    mels = config["audio_config"]["num_mel_bins"]
    return {"input_features": _pixels(count, mels, 3000), "chunk_counts": [1] * count,
            "feature_attention_mask": torch.ones(count, 3000, dtype=torch.int64)}  # fmt: skip


INPUTS: tuple[Callable[[Mapping[str, Any], int], dict[str, Any]], ...] = (
    _tiles, _paddle, _keye, _qwen, _kimi, _images, _intern, _audio,
)  # fmt: skip
"""Ways in which models take their items, the most particular first."""
