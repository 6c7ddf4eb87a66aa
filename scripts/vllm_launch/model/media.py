"""The media that a model accepts, and the tokens of the largest item of each kind. Pure.

An item is one image, one video or one audio clip in a prompt.

The sizes follow the ``ProcessingInfo`` classes of vLLM's models (get_mm_max_tokens_per_item, or else the dummy inputs).
They depend on config.json, on the files of the model's processor, and on --mm-processor-kwargs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from vllm_launch.model.config import Config
from vllm_launch.model.model import MediaItem

UNKNOWN_TOKENS = 16_384
"""Tokens of the largest item, for a model whose items are unknown: the largest default of an image in a known model."""

MAX_PATCHES_OF_TILES = 12
"""Default of ``max_dynamic_patch`` and ``max_patches``: tiles into which InternVL cuts an image."""


class Processor:
    """The values of a model's processor: --mm-processor-kwargs, then the processor's files, then config.json.

    ``where`` names the model in errors.
    """

    def __init__(self, root: Config, files: Mapping[str, Mapping[str, Any]], options: Mapping[str, Any]) -> None:
        self.root, self.options = root, options
        self.vision = self.nested("vision_config")
        whole = files.get("processor_config.json", {})
        self.image_values = _table(whole.get("image_processor")) | dict(files.get("preprocessor_config.json", {}))
        self._video_values = _table(whole.get("video_processor")) | dict(
            files.get("video_preprocessor_config.json", {})
        )

    def nested(self, key: str) -> Config:
        """Return the section ``key`` of config.json, or else of its ``thinker_config`` (omni models), or {}."""
        thinker = Config(self.root.table("thinker_config") or {}, f"{self.root.where} thinker_config")
        return Config(self.root.table(key) or thinker.table(key) or {}, f"{self.root.where} {key}")

    def image(self, key: str, default: int) -> int:
        """Return a whole number for images."""
        return _whole(self._first("images_kwargs", self.image_values, key), default)

    def pixels(self, default: int, *, video: bool = False) -> int:
        """Return the largest number of pixels of an image, or of all frames of a video together.

        ``size.longest_edge`` is a number of pixels, despite its name (models/qwen2_vl.py:_get_vision_size).
        """
        scope, values = ("videos_kwargs", self._video_values) if video else ("images_kwargs", self.image_values)
        for table in (_table(self.options.get(scope)), dict(self.options), values):
            edge = _table(table.get("size")).get("longest_edge")
            for value in (table.get("max_pixels"), edge):
                if value is not None:
                    return _whole(value, default)
        return default

    def _first(self, scope: str, values: Mapping[str, Any], key: str) -> Any:
        tables = (_table(self.options.get(scope)), self.options, values)
        return next((table[key] for table in tables if table.get(key) is not None), None)


def media_items(architecture: str, processor: Processor) -> tuple[MediaItem, ...] | None:
    """Return the items of a model by its architecture, or None if they are unknown."""
    family = FAMILIES.get(architecture)
    return None if family is None else family(processor)


def unknown_items(processor: Processor) -> tuple[MediaItem, ...]:
    """Return the items to assume for an unknown architecture: those for which config.json has an encoder."""
    audio = [name for name in ("audio_config", "encoder_config") if processor.nested(name).raw]
    visual = bool(processor.vision.raw) or not audio
    names = [*(("image", "video") if visual else ()), *(("audio",) if audio else ())]
    return tuple(MediaItem(modality=name, tokens=UNKNOWN_TOKENS) for name in names)


def _table(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def _whole(value: Any, default: int) -> int:
    """Return ``value`` if it is a positive number. Processors' files are not checked further: vLLM reports errors."""
    ok = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 2**40
    return int(value) if ok else default


def _unit(vision: Config, patch: int) -> int:
    """Return the side, in pixels, of the square of an image that becomes one token."""
    return vision.integer("patch_size", default=patch) * vision.integer("spatial_merge_size", default=2)


def _qwen2(processor: Processor) -> tuple[MediaItem, ...]:
    """Qwen2-VL: a part of a video is two frames, and takes as many tokens as the largest image (models/qwen2_vl.py)."""
    square = _unit(processor.vision, 14) ** 2
    tokens = max(1, processor.pixels(16384 * square) // square)
    return (MediaItem(modality="image", tokens=tokens), MediaItem(modality="video", tokens=tokens, parts=7))


def _qwen3(processor: Processor) -> tuple[MediaItem, ...]:
    """Qwen3-VL: the profile's video has two frames with all of a video's pixels (models/qwen3_vl.py)."""
    square = _unit(processor.vision, 16) ** 2
    image = max(1, processor.pixels(16384 * square) // square)
    frames = processor.vision.integer("temporal_patch_size", default=2)
    video = max(1, processor.pixels(24576 * square, video=True) // frames // square)
    return (MediaItem(modality="image", tokens=image), MediaItem(modality="video", tokens=video))


def _glm4v(processor: Processor) -> tuple[MediaItem, ...]:
    """GLM-4.1V: the largest number of pixels is for two frames together (models/glm4_1v.py:_get_vision_info).

    An image counts as two frames, so it has half of these pixels.
    """
    unit = _unit(processor.vision, 14)
    image, video = processor.pixels(unit**2 * 15000), processor.pixels(unit**2 * 2 * 30000, video=True)
    side = max(1, math.isqrt(image // 2) // unit)
    return (
        MediaItem(modality="image", tokens=side * side),
        MediaItem(modality="video", tokens=max(1, video // (2 * unit**2)), per_prompt=1),
    )


def _grid(processor: Processor) -> tuple[MediaItem, ...]:
    """LLaVA and PaliGemma: one token for each patch (models/clip.py, siglip.py, pixtral.py: get_num_image_tokens)."""
    size, vision = _image_size(processor.vision), processor.vision
    patch = vision.integer("patch_size", default=14)
    side = math.ceil(size / patch)
    whole = processor.root.text("vision_feature_select_strategy") == "full"
    class_token = whole and vision.text("model_type") in {"", "clip_vision_model"}
    return (MediaItem(modality="image", tokens=side * side + class_token),)


def _pixtral(processor: Processor) -> tuple[MediaItem, ...]:
    """Mistral 3: patches are merged (models/mistral3.py)."""
    merge = processor.root.integer("spatial_merge_size", default=2)
    side = math.ceil(_image_size(processor.vision) / (processor.vision.integer("patch_size", default=14) * merge))
    return (MediaItem(modality="image", tokens=side * side),)


def _gemma3(processor: Processor) -> tuple[MediaItem, ...]:
    """Gemma 3: the image, and its crops with ``do_pan_and_scan`` (models/gemma3_mm.py:get_num_crops)."""
    crops = processor.image("pan_and_scan_max_num_crops", 4) if processor.image("do_pan_and_scan", 0) else 0
    if processor.options.get("do_pan_and_scan") is True:
        crops = processor.image("pan_and_scan_max_num_crops", 4)
    tokens = processor.root.integer("mm_tokens_per_image", default=256)
    return (MediaItem(modality="image", tokens=tokens * (1 + crops)),)


def _gemma4(processor: Processor) -> tuple[MediaItem, ...]:
    """Gemma 4 (models/gemma4_mm.py:get_mm_max_tokens_per_item): 32 frames of 70 tokens and 8 more in a video."""
    tokens = processor.image("max_soft_tokens", processor.vision.integer("default_output_length", default=280))
    audio = (MediaItem(modality="audio", tokens=750),) if processor.nested("audio_config").raw else ()
    return (MediaItem(modality="image", tokens=tokens), *audio, MediaItem(modality="video", tokens=32 * 78))


def _llama4(processor: Processor) -> tuple[MediaItem, ...]:
    """Llama 4: tiles and one small copy of the whole image (models/mllama4.py:get_patch_per_chunk)."""
    vision = processor.vision
    side = _image_size(vision, 336) // vision.integer("patch_size", default=14)
    ratio = vision.number("pixel_shuffle_ratio") or 0.5
    tile = side * side // max(1, round(1 / ratio**2))
    return (MediaItem(modality="image", tokens=tile * (processor.image("max_patches", 16) + 1)),)


def _internvl(processor: Processor) -> tuple[MediaItem, ...]:
    """InternVL: tiles and one small copy, and videos as long as the model (models/internvl.py, interns1.py)."""
    root, vision = processor.root, processor.vision
    size = root.integer("force_image_size", default=_image_size(vision, 448))
    patch = vision.get("patch_size")
    patch = _whole(patch[0] if isinstance(patch, list) and patch else patch, 14)
    ratio = root.number("downsample_ratio") or 0.5
    tile = root.integer("image_seq_length", default=max(1, int((size // patch) ** 2 * ratio**2)))
    most = _whole(processor.options.get("max_dynamic_patch"), root.integer("max_dynamic_patch",
                  default=processor.image("max_patches", MAX_PATCHES_OF_TILES)))  # fmt: skip
    frames = 2**20  # as many as the model's length holds
    tiles = 1 if processor.image_values.get("crop_to_patches") is False else most + 1
    return (
        MediaItem(modality="image", tokens=tile * tiles),
        MediaItem(modality="video", tokens=tile, parts=frames),
    )


def _kimi(processor: Processor) -> tuple[MediaItem, ...]:
    """Kimi: a limit of patches, four of which become a token (processors/kimi_k25.py, models/kimi_vl.py)."""
    nested = _whole(_table(processor.image_values.get("media_proc_cfg")).get("in_patch_limit"), 16384)
    tokens = processor.image("in_token_limit", nested) // 4
    return (MediaItem(modality="image", tokens=tokens), MediaItem(modality="video", tokens=tokens))


def _minicpmv(processor: Processor) -> tuple[MediaItem, ...]:
    """MiniCPM-V: the image and its slices, each with its queries and marks (models/minicpmv.py)."""
    slices = processor.root.integer("max_slice_num", default=9)
    image = (processor.root.integer("query_num", default=64) + 2) * (slices + 1) + slices
    return (
        MediaItem(modality="image", tokens=image),
        MediaItem(modality="video", tokens=image // (slices + 1), parts=64),
    )


def _whisper_audio(processor: Processor) -> tuple[MediaItem, ...]:
    """Audio of 30 seconds: half of the encoder's positions (models/qwen2_audio.py)."""
    positions = processor.nested("audio_config").integer("max_source_positions", default=1500)
    return (MediaItem(modality="audio", tokens=positions // 2),)


def _whisper(processor: Processor) -> tuple[MediaItem, ...]:
    """Whisper: all positions of the encoder, once for each prompt (models/whisper.py)."""
    positions = processor.root.integer("max_source_positions", default=1500)
    return (MediaItem(modality="audio", tokens=positions, per_prompt=1),)


def _image_size(vision: Config, default: int = 336) -> int:
    value = vision.get("image_size")
    return _whole(value[0] if isinstance(value, list) and value else value, default)


FAMILIES: dict[str, Callable[[Processor], tuple[MediaItem, ...]]] = {
    **dict.fromkeys(("Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"), _qwen2),
    **dict.fromkeys(
        ("Qwen3VLForConditionalGeneration", "Qwen3VLMoeForConditionalGeneration", "Qwen3_5ForConditionalGeneration",
         "Qwen3_5MoeForConditionalGeneration"), _qwen3,
    ),
    **dict.fromkeys(("Glm4vForConditionalGeneration", "Glm4vMoeForConditionalGeneration"), _glm4v),
    "LlavaForConditionalGeneration": _grid,
    "PaliGemmaForConditionalGeneration": _grid,
    "Mistral3ForConditionalGeneration": _pixtral,
    "Gemma3ForConditionalGeneration": _gemma3,
    "Gemma4ForConditionalGeneration": _gemma4,
    "Llama4ForConditionalGeneration": _llama4,
    **dict.fromkeys(
        ("InternVLChatModel", "InternVLForConditionalGeneration", "InternS1ForConditionalGeneration"), _internvl
    ),
    **dict.fromkeys(("KimiVLForConditionalGeneration", "KimiK25ForConditionalGeneration"), _kimi),
    "MiniCPMV": _minicpmv,
    "Qwen2AudioForConditionalGeneration": _whisper_audio,
    "WhisperForConditionalGeneration": _whisper,
}  # fmt: skip
"""Functions that return the items of an architecture."""
