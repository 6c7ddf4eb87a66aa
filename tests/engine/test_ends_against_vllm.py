"""Which of the pinned vLLM's models make their embedding and head on every pipeline stage, read from their sources."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from vllm_launch.sizing.weights import _EMBEDS_EVERYWHERE, _HEADS_EVERYWHERE

FOUND = find_spec("vllm")
assert FOUND
assert FOUND.origin
MODELS = Path(FOUND.origin).parent / "model_executor" / "models"
FILES = {
    "gemma3_text": "gemma3", "gemma4_text": "gemma4", "gptj": "gpt_j", "cohere": "commandr", "cohere2": "commandr",
    "qwen3_5_text": "qwen3_5", "qwen3_5_moe_text": "qwen3_5", "qwen3": "qwen2", "mistral": "llama",
    "deepseek_v3": "deepseek_v2",
}  # fmt: skip
ASKING = ("llama", "mistral", "qwen2", "qwen3", "deepseek_v2", "deepseek_v3", "exaone4", "glm4_moe")


def asks(model_type, made, word):
    """Whether a rank is asked for in the lines before each place where ``made`` is made; None where it never is."""
    lines = (MODELS / f"{FILES.get(model_type, model_type)}.py").read_text().splitlines()
    places = [number for number, line in enumerate(lines) if re.search(rf"=\s*{made}\(", line)]
    return all(any(word in line for line in lines[place - 6 : place]) for place in places) if places else None


@pytest.mark.parametrize("model_type", sorted(_EMBEDS_EVERYWHERE))
def test_these_embed_on_every_stage(model_type):
    assert asks(model_type, "VocabParallelEmbedding", "is_first_rank") is False


@pytest.mark.parametrize("model_type", sorted(_HEADS_EVERYWHERE))
def test_these_have_a_head_on_every_stage_or_none_of_their_own(model_type):
    assert not asks(model_type, "ParallelLMHead", "is_last_rank")


@pytest.mark.parametrize("model_type", ASKING)
def test_these_ask_for_the_rank(model_type):
    assert model_type not in _EMBEDS_EVERYWHERE
    assert asks(model_type, "VocabParallelEmbedding", "is_first_rank") is not False
    assert asks(model_type, "ParallelLMHead", "is_last_rank") is not False
