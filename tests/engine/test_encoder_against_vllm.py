"""Asks vLLM's own encoder budget for the largest images, videos and audio of models, and for the batch that they need.

Each model has the defaults of its config class and processors, in a folder made here. vLLM's processors for images
need torchvision, which its packages for CPUs do not require: without it only models of audio are tested.
"""

# ruff: noqa: PLC0415, TID251 - vLLM and transformers are slow to import, and a test may import them

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from vllm_launch.model.build import build
from vllm_launch.model.checkpoint import read_folder

LENGTH = 8192

pytestmark = pytest.mark.filterwarnings("default")  # torch, transformers and vLLM give warnings about their own code

VISION = {"model_type": "siglip_vision_model", "hidden_size": 1152, "num_attention_heads": 16, "image_size": 896}
MODELS: dict[str, tuple[str, str, tuple[str, ...], dict[str, Any]]] = {
    "Qwen2VLForConditionalGeneration": (
        "qwen2_vl", "Qwen2VLProcessor", ("Qwen2VLImageProcessor", "Qwen2VLVideoProcessor"), {}),
    "Qwen2_5_VLForConditionalGeneration": (
        "qwen2_5_vl", "Qwen2_5_VLProcessor", ("Qwen2VLImageProcessor", "Qwen2VLVideoProcessor"), {}),
    "Qwen3VLForConditionalGeneration": (
        "qwen3_vl", "Qwen3VLProcessor", ("Qwen2VLImageProcessor", "Qwen3VLVideoProcessor"), {}),
    "Qwen3_5ForConditionalGeneration": (
        "qwen3_5", "Qwen3VLProcessor", ("Qwen2VLImageProcessor", "Qwen3VLVideoProcessor"), {}),
    "Gemma3ForConditionalGeneration": (
        "gemma3", "Gemma3Processor", ("Gemma3ImageProcessor",), {"vision_config": VISION}),
    "Gemma4ForConditionalGeneration": (
        "gemma4", "Gemma4Processor", ("Gemma4ImageProcessor", "Gemma4VideoProcessor"),
        {"vision_config": {"model_type": "gemma4_vision", "default_output_length": 280}}),
    "Llama4ForConditionalGeneration": ("llama4", "Llama4Processor", ("Llama4ImageProcessor",), {}),
    "InternVLForConditionalGeneration": (
        "internvl", "InternVLProcessor", ("GotOcr2ImageProcessor", "InternVLVideoProcessor"), {}),
    "Qwen2AudioForConditionalGeneration": ("qwen2_audio", "Qwen2AudioProcessor", ("WhisperFeatureExtractor",), {}),
    "WhisperForConditionalGeneration": ("whisper", "WhisperProcessor", ("WhisperFeatureExtractor",), {}),
}  # fmt: skip

UPPER_LIMITS = {"InternVLForConditionalGeneration": {"video"}}
"""Modalities for which the plan assumes more than vLLM: InternVL's video leaves room for one image."""

NOT_BUILT = {
    "GLM4V": "its dummy prompt needs the tokens of the model's own tokenizer",
    "LLaVA, Mistral 3, PaliGemma": "the same",
    "InternVLChatModel, Kimi, MiniCPM-V": "their processors are code in the model's repository",
}
"""Families of model/media.py that have no test here, with the reason."""

SPECIAL = [
    "<unk>",
    "<s>",
    "</s>",
    "<image>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image|>",
    "<|video|>",
    "<|audio|>",
    "<|AUDIO|>",
    "<|audio_bos|>",
    "<|audio_eos|>",
    "<image_soft_token>",
    "<start_of_image>",
    "<end_of_image>",
    "<IMG_CONTEXT>",
    "<img>",
    "</img>",
    "<video>",
    "<|patch|>",
    "<|tile_x_separator|>",
    "<|tile_y_separator|>",
    "<|image_start|>",
    "<|image_end|>",
    "\n",
    "\n\n",
    "\n\n\n",
    "\n\n\n\n",
]
NAMED = {
    "image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>",
    "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>", "audio_token": "<|audio|>",
}  # fmt: skip


def folder_of(architecture: str, folder: Path) -> Path:
    """Make a folder with a configuration, a tokenizer and processors."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type, processor, parts, changes = MODELS[architecture]
    config = CONFIG_MAPPING[model_type](**changes).to_dict() | {"architectures": [architecture]}
    (folder / "config.json").write_text(json.dumps(config, default=str))
    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(SPECIAL)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens(SPECIAL)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>", extra_special_tokens=NAMED
    ).save_pretrained(folder)
    for part in parts:
        getattr(transformers, part)().save_pretrained(folder)
    for file in folder.glob("*.json"):
        if file.name == "tokenizer_config.json" or "preprocessor" in file.name:
            file.write_text(json.dumps(json.loads(file.read_text()) | {"processor_class": processor}))
    return folder


@pytest.mark.parametrize("architecture", MODELS)
def test_the_largest_items_are_those_of_vllms_encoder_budget(architecture: str, tmp_path: Path) -> None:
    audio = MODELS[architecture][2] == ("WhisperFeatureExtractor",)
    if not audio and importlib.util.find_spec("torchvision") is None:
        pytest.skip("not tested: torchvision is not installed")
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.encoder_budget import MultiModalBudget

    folder = folder_of(architecture, tmp_path)
    length = 448 if architecture.startswith("Whisper") else LENGTH
    config = EngineArgs(
        model=str(folder), load_format="dummy", max_model_len=length, max_num_batched_tokens=LENGTH,
        dtype="bfloat16", enforce_eager=True,
    ).create_engine_config()  # fmt: skip
    with set_current_vllm_config(config):
        budget = MultiModalBudget(config, MULTIMODAL_REGISTRY, enable_cache=False)
    media = build("m", read_folder(folder), {}).media
    assert media is not None
    ours = {item.modality: item.tokens_within(length) for item in media.items}
    assert ours.keys() == budget.mm_max_toks_per_item.keys()
    for modality, tokens in budget.mm_max_toks_per_item.items():
        if modality in UPPER_LIMITS.get(architecture, ()):
            assert tokens <= ours[modality] <= 1.1 * tokens
        else:
            assert ours[modality] == tokens
    # A CUDA platform refuses to split items of these models too (platforms/cuda.py), and this one is a CPU.
    assert media.chunked is not (
        config.scheduler_config.disable_chunked_mm_input or config.model_config.is_mm_prefix_lm
    )
