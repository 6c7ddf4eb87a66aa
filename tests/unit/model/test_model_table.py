"""Compares the planner with vLLM's facts about every architecture (tests/data/model_facts.jsonl). Needs no vLLM."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "scripts/generators"))
import compared  # noqa: E402

from vllm_launch.engine.compared import compared as was_compared  # noqa: E402
from vllm_launch.model.read import read_model  # noqa: E402

MISSING = json.loads(compared.NOT_COMPARED.read_text())
ACCEPTED = json.loads(compared.ACCEPTED.read_text())
REGISTRY = json.loads((ROOT / "scripts/vllm_launch/engine/architectures.json").read_text())["architectures"]


@pytest.fixture(scope="module")
def found() -> compared.Found:
    return compared.find()


def test_the_planner_reads_every_configuration_as_vllm_does(found: compared.Found) -> None:
    wrong = {
        row["name"]: different
        for row, different in found
        if different.keys() != ACCEPTED.get(row["name"], {}).keys()
    }  # fmt: skip
    assert not wrong, "mend the planner, or name the difference and its reason in tests/data/model_differences.json"


def test_every_difference_that_stands_is_one_of_a_row_in_the_table(found: compared.Found) -> None:
    assert ACCEPTED.keys() <= {row["name"] for row, _ in found}


def test_every_architecture_of_the_registry_is_compared_or_named_with_a_reason(found: compared.Found) -> None:
    architectures = {row["facts"]["architecture"] for row, _ in found}
    assert architectures | MISSING.keys() == REGISTRY.keys()
    assert not architectures & MISSING.keys()
    assert all(MISSING.values())


def test_the_package_knows_which_architectures_are_equal(found: compared.Found) -> None:
    assert compared.OUT.read_text() == compared.compared(found), "make generate"


def test_the_page_shows_the_table(found: compared.Found) -> None:
    assert compared.PAGE.read_text() == compared.page(found), "make generate"


UNKNOWN = {
    "architectures": ["LlamaForCausalLM"], "model_type": "nobody_knows", "hidden_size": 512, "intermediate_size": 1024,
    "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 1000,
    "max_position_embeddings": 4096, "sliding_window": 128, "dtype": "bfloat16",
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
}  # fmt: skip


def test_layers_that_were_not_compared_count_at_their_worst_with_a_warning(tmp_path: Path) -> None:
    config = UNKNOWN | {"global_head_dim": 128, "num_global_key_value_heads": 4, "num_kv_shared_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = read_model(str(tmp_path))
    assert {(layer.kind, layer.kv_heads, layer.head_dim, layer.window) for layer in model.layers} == {
        ("full", 4, 128, None)
    }
    assert any("has not been compared with vLLM for architecture LlamaForCausalLM" in text for text in model.warnings)


def test_a_recurrent_layer_of_unknown_size_counts_as_attention(tmp_path: Path) -> None:
    config = UNKNOWN | {"layer_types": ["linear_attention"] * 5 + ["full_attention"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert {layer.kind for layer in read_model(str(tmp_path)).layers} == {"full"}


def test_a_model_that_was_compared_has_neither_the_warning_nor_the_worst_layers(tmp_path: Path) -> None:
    config = UNKNOWN | {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = read_model(str(tmp_path))
    assert [layer.kind for layer in model.layers] == ["sliding", "sliding", "full"] * 2
    assert not any("compared" in text for text in model.warnings)


def test_an_architecture_and_a_model_type_that_were_compared_apart_are_known_together() -> None:
    assert was_compared("layers", "LlamaForCausalLM", "mistral")
    assert not was_compared("layers", "LlamaForCausalLM", "nobody_knows")
