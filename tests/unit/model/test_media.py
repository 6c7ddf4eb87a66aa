"""Tests of the largest images, videos and audio of models. tests/engine asks vLLM's own code for the same numbers."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

import pytest

from vllm_launch.errors import UsageError
from vllm_launch.model.build import build
from vllm_launch.model.checkpoint import Checkpoint, small_files
from vllm_launch.model.model import Model
from vllm_launch.model.towers import evaluate

TEXT = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 1000, "max_position_embeddings": 4096,
}  # fmt: skip
QWEN3_VL = {"architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl"}


def read(outer: dict[str, Any], options: dict[str, Any] | None = None, **files: dict[str, Any]) -> Model:
    config = {"dtype": "bfloat16", "text_config": TEXT} | outer
    named = {f"{name}.json": content for name, content in files.items()}
    return build("m", Checkpoint(None, {"config.json": config, **named}, None, ()), {}, processor_options=options)


def sizes(model: Model, length: int = 4096) -> dict[str, int]:
    assert model.media is not None
    return {item.modality: item.tokens_within(length) for item in model.media.items}


def test_pixels_come_from_the_options_then_the_processors_files_then_what_is_usual() -> None:
    assert sizes(read(QWEN3_VL)) == {"image": 16384, "video": 12288}
    files = {"preprocessor_config": {"size": {"longest_edge": 32 * 32 * 100}}}
    assert sizes(read(QWEN3_VL, **files)) == {"image": 100, "video": 12288}
    assert sizes(read(QWEN3_VL, {"max_pixels": 32 * 32 * 50}, **files)) == {"image": 50, "video": 25}
    scoped = {"images_kwargs": {"size": {"longest_edge": 32 * 32 * 7}}, "max_pixels": 32 * 32 * 50}
    assert sizes(read(QWEN3_VL, scoped, **files)) == {"image": 7, "video": 25}
    nested = {"processor_config": {"image_processor": {"max_pixels": 32 * 32 * 9}}}
    assert sizes(read(QWEN3_VL, **nested))["image"] == 9


def test_a_qwen2_video_is_as_long_as_the_model() -> None:
    qwen2 = {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl"}
    assert sizes(read(qwen2))["image"] == 16384
    model = read(qwen2, preprocessor_config={"max_pixels": 28 * 28 * 1000})
    assert [sizes(model, length)["video"] for length in (10, 2500, 10**6)] == [1000, 2000, 7000]


def test_tokens_follow_the_options_of_a_processor() -> None:
    gemma3 = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3"}
    assert sizes(read(gemma3)) == {"image": 256}
    assert sizes(read(gemma3, {"do_pan_and_scan": True})) == {"image": 256 * 5}
    gemma4 = {"architectures": ["Gemma4ForConditionalGeneration"], "model_type": "gemma4"}
    assert sizes(read(gemma4, {"max_soft_tokens": 1120})) == {"image": 1120, "video": 2496}


def test_a_batch_holds_whole_items_only_of_models_whose_images_see_each_other() -> None:
    gemma3 = read({"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3"})
    assert (gemma3.media and gemma3.media.chunked) is False
    qwen3 = read(QWEN3_VL)
    assert (qwen3.media and qwen3.media.chunked) is True


def test_deepstack_features_are_kept_beside_the_output() -> None:
    deep = read(QWEN3_VL | {"vision_config": {"deepstack_visual_indexes": [5, 11]}})
    usual = read(QWEN3_VL)
    assert [model.media and model.media.output_copies for model in (deep, usual)] == [3, 4]


def test_a_wider_encoder_needs_more_for_each_token() -> None:
    usual, wide = read(QWEN3_VL), read(QWEN3_VL | {"vision_config": {"hidden_size": 2304}})
    assert usual.media is not None
    assert wide.media is not None
    assert wide.media.bytes_per_token == 2 * usual.media.bytes_per_token


def test_an_unknown_encoder_is_counted_at_its_most_and_said() -> None:
    model = read(
        {
            "architectures": ["KananaVForConditionalGeneration"],
            "model_type": "kanana",
            "vision_config": {"hidden_size": 64},
        }
    )
    assert model.media is not None
    assert sizes(model) == {"image": 16384, "video": 16384}
    assert model.media.bytes_per_token == 16 * 24 * 2 * 64
    assert [any(word in warning for warning in model.warnings) for word in ("largest image", "ViT", "memory that")] == [
        True, True, True,
    ]  # fmt: skip


def test_towers_are_counted_beside_a_flat_text_config() -> None:
    flat = TEXT | {"architectures": ["MiniCPMV"], "model_type": "minicpmv", "version": 2.6, "dtype": "bfloat16"}
    model = build("m", Checkpoint(None, {"config.json": flat}, None, ()), {})
    assert any(tensor.tower and tensor.name.startswith("vpm.encoder.layers.26.") for tensor in model.tensors)
    assert sizes(model) == {"image": 66 * 10 + 9, "video": 4092}


def test_bad_sizes_of_an_encoder_are_named() -> None:
    with pytest.raises(UsageError, match=r"vision_config key 'hidden_size'"):
        read(QWEN3_VL | {"vision_config": {"hidden_size": "wide"}})


def test_only_models_with_an_encoder_have_a_processor() -> None:
    assert "preprocessor_config.json" in small_files(QWEN3_VL)
    assert "preprocessor_config.json" in small_files({"architectures": ["Unknown"], "vision_config": {}})
    assert "preprocessor_config.json" not in small_files({"architectures": ["LlamaForCausalLM"]})
    assert "preprocessor_config.json" not in small_files({"architectures": 7})


@pytest.mark.parametrize(
    ("formula", "value"),
    [("7", 7), ("3*a", 30), ("a^2*b^-2+1", 26), ("a-1", 9), ("2*a+3*b-4", 22), ("1/2*a", 5), ("b-9", 0)],
)
def test_formulas_of_sizes(formula: str, value: int) -> None:
    assert evaluate(formula, {"a": 10, "b": 2}.__getitem__) == value


def test_a_formula_may_begin_with_a_negative_term_and_have_negative_powers() -> None:
    sizes = {"a": 4, "b": 8}.__getitem__
    assert evaluate("-1/2*a+3*b+2", sizes) == 24
    assert evaluate("b^2*a^-2-1", sizes) == 3


def test_every_formula_of_the_towers_has_a_value() -> None:
    table = json.loads(files("vllm_launch.engine").joinpath("towers.json").read_text())["towers"]
    for tower in table.values():
        for _, count, shape, *_ in tower["tensors"]:
            assert all(evaluate(formula, tower["keys"].__getitem__) > 0 for formula in (count, *shape))
