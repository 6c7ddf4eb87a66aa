"""Tests of which pooling models vLLM gives whole prompts. tests/engine/test_plans_against_vllm.py asks vLLM itself."""

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_launch.model.read import read_model

POOLING = {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 320,
    "max_position_embeddings": 4096,
}  # fmt: skip


def read(folder: Path, pooling: dict[str, Any] | None = None, config: dict[str, Any] = QWEN2, **options: Any) -> Any:
    (folder / "config.json").write_text(json.dumps(config))
    if pooling is not None:
        (folder / "modules.json").write_text(json.dumps([POOLING]))
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling/config.json").write_text(json.dumps(pooling))
    return read_model(str(folder), **options)


@pytest.mark.parametrize(
    ("pooling", "splits"),
    [
        ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, True),
        ({"pooling_mode_mean_tokens": True}, False),
        ({"pooling_mode_cls_token": True}, False),
        ({"pooling_mode": "lasttoken"}, True),
        ({"pooling_mode": "mean"}, False),
        ({}, True),
    ],
)
def test_the_models_own_pooling_decides_whether_prompts_are_split(tmp_path, pooling, splits):
    model = read(tmp_path, pooling)
    assert (model.task, model.chunked_prefill) == ("pooling", splits)


@pytest.mark.parametrize(
    ("pooler", "splits"),
    [
        ({"pooling_type": "LAST"}, True),
        ({"seq_pooling_type": "LAST"}, True),
        ({"pooling_type": "CLS"}, False),
        ({"use_activation": True}, False),
    ],
)
def test_the_users_pooling_overrides_the_models(tmp_path, pooler, splits):
    model = read(tmp_path, {"pooling_mode_mean_tokens": True}, pooler_config=pooler)
    assert model.chunked_prefill is splits


def test_step_pooling_needs_whole_prompts(tmp_path):
    stepwise = {"tok_pooling_type": "STEP"}
    assert not read(tmp_path, {"pooling_mode_lasttoken": True}, pooler_config=stepwise).chunked_prefill


def test_a_bidirectional_model_needs_whole_prompts_whatever_its_pooling(tmp_path):
    assert not read(tmp_path, {"pooling_mode_lasttoken": True}, QWEN2 | {"is_causal": False}).chunked_prefill


def test_an_encoder_needs_whole_prompts(tmp_path):
    bert = QWEN2 | {"architectures": ["BertModel"], "model_type": "bert"}
    assert not read(tmp_path, config=bert).chunked_prefill


def test_a_model_that_generates_never_needs_whole_prompts(tmp_path):
    assert read(tmp_path).chunked_prefill


def test_the_code_of_a_config_is_known_or_in_the_repository_or_nowhere(tmp_path):
    own = QWEN2 | {"model_type": "mine"}
    assert read(tmp_path).config_code == "vllm"
    assert read(tmp_path, config=own).config_code == "unknown"
    assert read(tmp_path, config=own | {"auto_map": {"AutoConfig": "c.C"}}).config_code == "repository"
    assert read(tmp_path, config=QWEN2 | {"auto_map": {"AutoConfig": "c.C"}}).config_code == "vllm"
