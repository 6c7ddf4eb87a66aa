"""Checks in the pinned vLLM's sources which models create their embedding and head on every pipeline stage."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from vllm_launch.sizing.weights import _EMBEDS_EVERYWHERE, _HEADS_EVERYWHERE

VLLM = find_spec("vllm")
assert VLLM
assert VLLM.origin
MODELS = Path(VLLM.origin).parent / "model_executor" / "models"
FILES = {
    "gemma3_text": "gemma3", "gemma4_text": "gemma4", "gptj": "gpt_j", "cohere": "commandr", "cohere2": "commandr",
    "qwen3_5_text": "qwen3_5", "qwen3_5_moe_text": "qwen3_5", "qwen3": "qwen2", "mistral": "llama",
    "deepseek_v3": "deepseek_v2",
}  # fmt: skip
CHECKING_THE_RANK = ("llama", "mistral", "qwen2", "qwen3", "deepseek_v2", "deepseek_v3", "exaone4", "glm4_moe")


def checks_rank(model_type, layer_class, condition):
    """Return whether ``condition`` is in the 6 lines before each creation of ``layer_class``, None if it is never created."""
    lines = (MODELS / f"{FILES.get(model_type, model_type)}.py").read_text().splitlines()
    places = [number for number, line in enumerate(lines) if re.search(rf"=\s*{layer_class}\(", line)]
    return all(any(condition in line for line in lines[place - 6 : place]) for place in places) if places else None


@pytest.mark.parametrize("model_type", sorted(_EMBEDS_EVERYWHERE))
def test_these_models_create_an_embedding_on_every_stage(model_type):
    assert checks_rank(model_type, "VocabParallelEmbedding", "is_first_rank") is False


@pytest.mark.parametrize("model_type", sorted(_HEADS_EVERYWHERE))
def test_these_models_create_a_head_on_every_stage_or_none(model_type):
    assert not checks_rank(model_type, "ParallelLMHead", "is_last_rank")


@pytest.mark.parametrize("model_type", CHECKING_THE_RANK)
def test_these_models_check_the_rank(model_type):
    assert model_type not in _EMBEDS_EVERYWHERE
    assert checks_rank(model_type, "VocabParallelEmbedding", "is_first_rank") is not False
    assert checks_rank(model_type, "ParallelLMHead", "is_last_rank") is not False
