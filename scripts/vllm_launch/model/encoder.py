"""Reads what a multimodal model's encoder is: its tensors, its items, and the memory that it needs. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_launch.engine.towers import Tower, tower_of
from vllm_launch.model.config import Config
from vllm_launch.model.dtypes import SAFETENSORS_NAME
from vllm_launch.model.media import Processor, media_items, unknown_items
from vllm_launch.model.model import Media, Tensor
from vllm_launch.model.tensor_list import TensorList
from vllm_launch.model.towers import append_plain_tower, append_tower, encoder_bytes_per_token

PREFIX_MODELS = {"bagel", "gemma3", "molmo2", "moondream3", "paligemma"}
"""Model types in which an image's tokens see each other, so that a batch must hold the whole image
(transformers_utils/model_arch_config_convertor.py:is_mm_prefix_lm)."""

SAME_ENCODER = {
    "KimiVLForConditionalGeneration": "KimiK25ForConditionalGeneration",
    "WhisperForConditionalGeneration": "Qwen2AudioForConditionalGeneration",
}
"""Architectures with the encoder of another one, whose memory is known."""

SAME_TOWER = {
    **dict.fromkeys(
        ("ColQwen3", "OpsColQwen3Model", "Qwen3VLNemotronEmbedModel"), "Qwen3VLForConditionalGeneration"
    ),
    "JinaVLForRanking": "Qwen2VLForConditionalGeneration",
}  # fmt: skip
"""Architectures whose class in vLLM is a subclass of another one, with its tower."""

PATCHES_PER_TOKEN = 16
"""Patches for each token of an encoder whose memory is not known. Known encoders have 1 to 16."""

ALIVE = 24
"""Values per patch and channel that an encoder has alive at once, if its memory is not known. Known ones have 12 to 22
(generators/encoder_memory.py)."""

GEMMA4_ONE_HOT = 2 * (8 + 2)
"""Bytes for each patch and row of the position table in Gemma 4's patch embedder: two axes, in int64 and in the model's
dtype (transformers: Gemma4VisionPatchEmbedder._position_embeddings)."""

GEMMA4_SHARE = 0.1 * 10 / 16
"""Share of a GPU's memory that the same takes at most. vLLM encodes as many images at once as take a tenth of the GPU
by its own count of 16 bytes instead of 10 (models/gemma4_mm.py:_encoder_chunk)."""


def tower_tensors(
    architecture: str, root: Config, hidden: int, dtype: str
) -> tuple[tuple[Tensor, ...], tuple[str, ...]]:
    """Return the tensors of the towers, and a warning if they are estimated. vLLM quantises none of them.

    Raises:
        UsageError: a key has the wrong type.
    """
    tensor_list = TensorList(SAFETENSORS_NAME[dtype], None, root.where)
    tower, vision = _tower(architecture, root), root.table("vision_config")
    if architecture == "WhisperForConditionalGeneration":
        return (), ()  # its encoder is among the tensors of the language model (tensors_whisper)
    if tower is not None:
        append_tower(tensor_list, tower, root, hidden)
        return tensor_list.tensors(), ()
    append_plain_tower(tensor_list, Config(vision or {}, f"{root.where} vision_config"), hidden)
    warning = (
        f"the encoder of {architecture} is unknown, so the plan assumes a standard ViT for its weights: download the "
        "safetensors files for an exact plan"
    )
    return tensor_list.tensors(), (warning,)


def read_media(
    architecture: str,
    root: Config,
    config: Config,
    files: Mapping[str, Mapping[str, Any]],
    options: Mapping[str, Any],
) -> tuple[Media, tuple[str, ...]]:
    """Return what the model takes besides text, and warnings about what is unknown.

    ``config`` is the language model's. ``options`` are --mm-processor-kwargs.
    """
    processor, warnings = Processor(root, files, options), []
    items = media_items(architecture, processor)
    if items is None:
        items = unknown_items(processor)
        warnings.append(
            f"the largest image, video or audio of {architecture} is unknown, so the plan assumes "
            f'{items[0].tokens:,} tokens. vLLM\'s log has the true number: "Encoder cache will be initialized"'
        )
    hidden = config.integer("hidden_size", "n_embd", "d_model")
    tower = _tower(SAME_ENCODER.get(architecture, architecture), root)
    known = encoder_bytes_per_token(tower, root, hidden) if tower else None
    share = None
    if root.text("model_type") == "gemma4":
        kernel = processor.vision.integer("pooling_kernel_size", default=3)
        rows = processor.vision.integer("position_embedding_size", default=10240)
        known, share = kernel * kernel * GEMMA4_ONE_HOT * rows, GEMMA4_SHARE
    if known is None:
        warnings.append(f"the memory that {architecture}'s encoder needs is unknown, so the plan uses a high estimate")
    deepstack = processor.vision.array("deepstack_visual_indexes")
    default = tower.keys.get("vision_config.deepstack_visual_indexes", 0) if tower else 0
    media = Media(
        items=items,
        bytes_per_token=known if known is not None else _most_bytes_per_token(processor),
        share_of_gpu=share,
        output_copies=1 + (default if deepstack is None else len(deepstack)),
        chunked=not _whole_items(root, config),
        encoder_tp_data=bool(tower and tower.encoder_tp_data),
        needs_torchvision=bool(tower and tower.needs_torchvision),
    )
    return media, tuple(warnings)


def _tower(architecture: str, root: Config) -> Tower | None:
    vision = Config(root.table("vision_config") or {}, root.where)
    return tower_of(SAME_TOWER.get(architecture, architecture), vision.text("model_type"))


def _most_bytes_per_token(processor: Processor) -> int:
    tables = (processor.vision, processor.nested("audio_config"), processor.nested("encoder_config"))
    keys = ("hidden_size", "embed_dim", "d_model", "width")
    widths = [table.integer(*keys, default=1280) for table in tables if table.raw]
    return PATCHES_PER_TOKEN * ALIVE * 2 * max(widths, default=1280)


def _whole_items(root: Config, config: Config) -> bool:
    """Whether a batch must hold whole items (platforms/cuda.py:check_and_update_config, config/scheduler.py)."""
    if "is_mm_prefix_lm" in root.raw:
        return root.flag("is_mm_prefix_lm")
    if root.text("model_type").startswith("gemma4"):
        return bool(config.get("use_bidirectional_attention") == "vision")
    return root.text("model_type") in PREFIX_MODELS or root.text("model_type") == "whisper"
