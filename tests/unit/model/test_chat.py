"""Finds the chat template where vLLM finds it, and renders it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chat_families import HYBRID, JSON_CALL, OPENS, template

from vllm_launch.errors import UsageError
from vllm_launch.model.chat import Chat
from vllm_launch.model.read import read_model

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_size": 64,
    "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 320, "max_position_embeddings": 128, "tie_word_embeddings": True,
}  # fmt: skip
VISION = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl",
    "text_config": {**CONFIG, "model_type": "qwen2_5_vl_text"},
}  # fmt: skip
TEMPLATE = template(JSON_CALL)


def chat(folder: Path, files: dict[str, Any], config: dict[str, Any] | None = None, **more: Any) -> Chat | None:
    for name, content in {"config.json": config or CONFIG, **files}.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_model(str(folder), **more).chat


TOKENIZER: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}


@pytest.mark.parametrize(
    "files",
    [
        {"chat_template.jinja": TEMPLATE, "tokenizer_config.json": TOKENIZER},
        {"tokenizer_config.json": {"chat_template": TEMPLATE}},
        {"tokenizer_config.json": {"chat_template": [{"name": "default", "template": TEMPLATE}]}},
        {"tokenizer_config.json": {"chat_template": "old"}, "chat_template.jinja": TEMPLATE},
        {
            "chat_template.jinja": "plain {% for message in messages %}{{ message.content }}{% endfor %}",
            "additional_chat_templates/tool_use.jinja": TEMPLATE,
            "tokenizer_config.json": TOKENIZER,
        },
    ],
)
def test_the_template_comes_from_where_transformers_reads_it(tmp_path: Path, files: dict[str, Any]) -> None:
    found = chat(tmp_path, files)
    assert found is not None
    assert (found.renderer, found.template, found.shows_tools) == ("template", TEMPLATE, True)


def test_a_named_template_for_tools_is_used_only_with_tools(tmp_path: Path) -> None:
    named = [{"name": "default", "template": template(start=OPENS)}, {"name": "tool_use", "template": TEMPLATE}]
    found = chat(tmp_path, {"tokenizer_config.json": {"chat_template": named}})
    assert found is not None
    assert (found.template, found.shows_tools, found.prompt.endswith(OPENS)) == (TEMPLATE, True, True)


def test_named_templates_without_a_default_are_no_template(tmp_path: Path) -> None:
    found = chat(tmp_path, {"tokenizer_config.json": {"chat_template": [{"name": "rag", "template": TEMPLATE}]}})
    assert found == Chat(renderer="none")


@pytest.mark.parametrize("name", ["chat_template.json", "processor_config.json"])
def test_only_a_multimodal_model_reads_the_template_of_its_processor(tmp_path: Path, name: str) -> None:
    files = {name: {"chat_template": TEMPLATE}, "tokenizer_config.json": TOKENIZER}
    assert chat(tmp_path, files) == Chat(renderer="none")
    found = chat(tmp_path, files, VISION)
    assert found is not None
    assert (found.renderer, found.shows_tools) == ("template", False)  # with tools vLLM asks the tokenizer alone
    files["tokenizer_config.json"] = {"chat_template": TEMPLATE}
    found = chat(tmp_path, files, VISION)
    assert found is not None
    assert found.shows_tools


@pytest.mark.parametrize(
    ("files", "runner"),
    [
        ({}, None),  # no tokenizer: nothing is known
        ({"tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["a.B", None]}}}, None),
        ({"tokenizer_config.json": TOKENIZER}, "pooling"),
    ],
)
def test_nothing_is_said_of_a_model_whose_chat_is_unknown_or_that_does_not_chat(
    tmp_path: Path, files: dict[str, Any], runner: str | None
) -> None:
    assert chat(tmp_path, files, runner=runner) is None


def test_vllm_has_prompts_of_its_own_for_some_models(tmp_path: Path) -> None:
    native = chat(
        tmp_path, {"tokenizer_config.json": TOKENIZER}, {**CONFIG, "architectures": ["DeepseekV32ForCausalLM"]}
    )
    assert native == Chat(renderer="vLLM", shows_tools=True)
    fallback = chat(tmp_path, {"tokenizer_config.json": TOKENIZER}, {**CONFIG, "model_type": "minicpmv"})
    assert fallback == Chat(renderer="vLLM")


def test_mistrals_tokenizer_needs_its_weights_format_beside_it(tmp_path: Path) -> None:
    files = {"tokenizer_config.json": TOKENIZER, "tekken.json": {}}
    assert chat(tmp_path, files) == Chat(renderer="none")
    (tmp_path / "consolidated.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    assert chat(tmp_path, files) == Chat(renderer="Mistral", shows_tools=True)


def test_the_users_template_replaces_the_models(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text(TEMPLATE)
    files = {"tokenizer_config.json": {"chat_template": "{{ messages[0].content }}"}}
    for option in (str(tmp_path / "mine.jinja"), TEMPLATE):
        found = chat(tmp_path, files, chat_template=option)
        assert found is not None
        assert found.template == TEMPLATE
    assert chat(tmp_path, files, chat_template="template_chatml.jinja") is None  # vLLM's own, not in this folder


def test_added_tokens_are_read_from_each_file_that_lists_them(tmp_path: Path) -> None:
    files = {
        "chat_template.jinja": TEMPLATE,
        "tokenizer_config.json": {"added_tokens_decoder": {"1": {"content": "<a>"}}},
        "tokenizer.json": {"added_tokens": [{"id": 2, "content": "<b>"}], "model": {"vocab": {"x": 0}}},
        "added_tokens.json": {"<c>": 3},
    }
    found = chat(tmp_path, files)
    assert found is not None
    assert found.tokens == {"<a>", "<b>", "<c>"}


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("tokenizer.json", "[", "is not a tokenizer's JSON"),
        ("tokenizer.json", '{"added_tokens": 3}', "is not a tokenizer's JSON"),
    ],
)
def test_a_broken_tokenizer_is_refused(tmp_path: Path, name: str, content: str, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        chat(tmp_path, {name: content})


def test_a_template_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(UsageError, match=r"chat_template\.jinja: is not UTF-8"):
        chat(tmp_path, {})


@pytest.mark.parametrize(
    "source",
    ["{% if %}", "{{ raise_exception('no') }}", "{{ messages[0].content.nothing() }}", "{{ 1 / 0 }}", "hello"],
)
def test_a_template_that_makes_no_prompt_leaves_the_prompt_empty(tmp_path: Path, source: str) -> None:
    found = chat(tmp_path, {"chat_template.jinja": source})
    assert found is not None
    assert (found.renderer, found.whole_prompt, found.shows_tools) == ("template", "", False)


@pytest.mark.parametrize(
    "source",
    [
        "{% generation %}{{ messages[0].content }}{% endgeneration %}",
        "{% for message in messages %}{{ message.content }}{% break %}{% endfor %}",
        "{{ strftime_now('%Y') }}{{ messages[0].content }}",
        "{{ messages[0].content | tojson(ensure_ascii=False, indent=2) }}",
        "{% for part in messages[0].content %}{{ part.text }}{% endfor %}",
    ],
)
def test_templates_may_use_what_transformers_gives_them(tmp_path: Path, source: str) -> None:
    found = chat(tmp_path, {"chat_template.jinja": source})
    assert found is not None
    assert "Which weather is it?" in found.whole_prompt


def test_a_template_cannot_reach_pythons_internals(tmp_path: Path) -> None:
    found = chat(tmp_path, {"chat_template.jinja": "{{ messages.__class__.__mro__ }}{{ messages[0].content }}"})
    assert found is not None
    assert found.whole_prompt == ""


def test_the_switch_for_thinking_is_tried(tmp_path: Path) -> None:
    found = chat(tmp_path, {"chat_template.jinja": template(start=HYBRID)})
    assert found is not None
    assert "<think>" not in found.prompt
    assert found.prompt_without_thinking.endswith("<think>\n\n</think>\n\n")
