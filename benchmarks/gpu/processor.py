"""The processor of a vision-language shape: files and special tokens that vLLM needs beside dummy weights.

vLLM's profile makes images of the largest size and passes them through the model's processor, so a folder for
``--load-format dummy`` needs it too. Sizes are those of the published Qwen3-VL.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

TOKENS = {
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
}
"""Keys of config.json, and the tokens that mark an image or a video in a prompt."""

PIXELS = {
    "patch_size": 16, "temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5], "processor_class": "Qwen3VLProcessor",
}  # fmt: skip
IMAGE = PIXELS | {
    "image_processor_type": "Qwen2VLImageProcessorFast",
    "size": {"shortest_edge": 65_536, "longest_edge": 16_777_216},
}
VIDEO = PIXELS | {
    "video_processor_type": "Qwen3VLVideoProcessor",
    "size": {"shortest_edge": 4096, "longest_edge": 25_165_824},
}


def add_processor(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Write the processor's files into a folder that has a tokenizer. Return ``config`` with the ids of its tokens."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in TOKENS.values()])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = folder / "tokenizer_config.json"
    values = json.loads(settings.read_text()) | {
        "processor_class": "Qwen3VLProcessor",
        "extra_special_tokens": {key.removesuffix("_id"): token for key, token in TOKENS.items()},
    }
    settings.write_text(json.dumps(values))
    (folder / "preprocessor_config.json").write_text(json.dumps(IMAGE))
    (folder / "video_preprocessor_config.json").write_text(json.dumps(VIDEO))
    return config | {key: tokenizer.token_to_id(token) for key, token in TOKENS.items()}
