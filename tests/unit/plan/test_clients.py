"""Parsers of reasoning and tool calls by the model's family, and the warning for a model without a chat template."""

# ruff: noqa: RUF001 - DeepSeek and Step3 write their tags with full-width bars

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import builders
import pytest
from chat_families import DEEPSEEK, FAMILIES, HYBRID, JSON_CALL, OFF_UNLESS_ON, OPENS, THINK, Family, template

from vllm_launch.decide import decide
from vllm_launch.engine.architectures import resolve
from vllm_launch.engine.chat import chat_table
from vllm_launch.engine.options import options
from vllm_launch.machine.catalogue import parse_hardware_name
from vllm_launch.model.chat import UserChat, read_chat
from vllm_launch.plan.clients import Clients, clients
from vllm_launch.plan.plan import Plan
from vllm_launch.plan.request import PlanRequest
from vllm_launch.settings.flags import parse_flags
from vllm_launch.settings.read import read_settings

PUBLIC = Path(__file__).parents[2] / "data" / "models"

QWEN3 = Family("Qwen3", "Qwen3ForCausalLM", template(JSON_CALL, HYBRID), "hermes", "qwen3", THINK)


def decided(family: Family, request: PlanRequest | None = None, **variables: Any) -> Clients:
    files: dict[str, Any] = {
        "tokenizer_config.json": {"added_tokens_decoder": {str(n): {"content": t} for n, t in enumerate(family.tokens)}}
    }
    if family.template:
        files["chat_template.jinja"] = {"text": family.template}
    names = ("consolidated.safetensors", "tekken.json") if "own tokenizer" in family.name else ()
    architecture, _ = resolve([family.architecture], "config.json", custom_code=False)
    chat = read_chat(files, names, architecture, "", UserChat(variables=variables))
    return clients(request or PlanRequest(), builders.model(architecture=family.architecture, chat=chat))


@pytest.mark.parametrize("family", FAMILIES, ids=[family.name for family in FAMILIES])
def test_a_family_gets_the_parsers_of_its_template(family: Family) -> None:
    chosen = decided(family).options
    assert (chosen.get("tool_call_parser"), chosen.get("reasoning_parser")) == (family.tool, family.reasoning)
    assert chosen.get("enable_auto_tool_choice") == (True if family.tool else None)


@pytest.mark.parametrize("family", FAMILIES, ids=[family.name for family in FAMILIES])
def test_each_option_has_one_reason(family: Family) -> None:
    plan = decided(family)
    reasons = {reason.field: reason.value for reason in plan.reasons}
    assert len(reasons) == len(plan.reasons)
    assert {field: value for field, value in reasons.items() if value is not None} == plan.options


def test_each_rule_has_a_source_and_a_parser_or_what_to_do() -> None:
    for rule in (*chat_table().tool_call_parsers, *chat_table().reasoning_parsers):
        assert rule.source.startswith(("docs/features/", "recipes: ", "vllm/"))
        assert rule.parser or rule.need


def test_the_options_of_the_plan_are_options_of_vllm() -> None:
    assert decided(QWEN3).options.keys() <= options().keys()


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({"tool_call_parser": "mine"}, {"reasoning_parser": "qwen3"}),
        ({"reasoning_parser": "mine"}, {"tool_call_parser": "hermes", "enable_auto_tool_choice": True}),
        ({"enable_auto_tool_choice": False}, {"reasoning_parser": "qwen3"}),
        ({"tool_call_parser": "mine", "enable_auto_tool_choice": True}, {"reasoning_parser": "qwen3"}),
        ({"reasoning_parser": "hf"}, {}),
        ({"tool_call_parser": "hf"}, {}),
        ({"parsers": False}, {}),
    ],
)
def test_the_users_own_choice_is_kept(chosen: dict[str, Any], expected: dict[str, Any]) -> None:
    plan = decided(QWEN3, PlanRequest(**chosen))
    assert plan.options == expected
    assert {reason.field for reason in plan.reasons} == expected.keys()


def test_auto_tool_choice_without_a_parser_gets_the_familys_parser() -> None:
    plan = decided(QWEN3, PlanRequest(enable_auto_tool_choice=True))
    assert plan.options == {"reasoning_parser": "qwen3", "tool_call_parser": "hermes"}


def test_a_model_that_does_not_think_by_default_gets_a_reason_and_no_parser() -> None:
    (why,) = [reason.why for reason in decided(QWEN3._replace(template=template("", OFF_UNLESS_ON))).reasons]
    assert (
        why
        == "thinking is off by default: prompts end with </think>. With a parser, vLLM would return answers as reasoning"
    )


@pytest.mark.parametrize(
    ("start", "variables"), [(OFF_UNLESS_ON, {"enable_thinking": True}), (HYBRID, {"enable_thinking": False})]
)
def test_the_parser_is_set_if_the_template_or_the_users_default_lets_the_model_think(
    start: str, variables: dict[str, bool]
) -> None:
    assert decided(QWEN3._replace(template=template("", start)), **variables).options == {"reasoning_parser": "qwen3"}


def test_a_parser_whose_token_the_tokenizer_lacks_would_stop_vllm_so_it_is_not_set() -> None:
    without = decided(QWEN3._replace(template=template("", OPENS, marks="</think>"), tokens=("<think>",)))
    assert without.options == {}
    assert [reason.why for reason in without.reasons] == [
        "the tokenizer has no token </think>, which the parser qwen3 needs. Requests work. Reasoning stays in the answer"
    ]
    unknown = decided(QWEN3._replace(template=template("", OPENS, marks="</think>"), tokens=()))
    assert [reason.why for reason in unknown.reasons] == [
        "no file lists the tokens that the parser qwen3 needs. Requests work. Reasoning stays in the answer"
    ]


@pytest.mark.parametrize(
    ("architecture", "marks", "remedy"),
    [
        ("DeepseekV3ForCausalLM", "<｜tool▁calls▁begin｜>```json", "tool_chat_template_deepseekv3.jinja"),
        ("DeepseekV3ForCausalLM", "<｜tool▁calls▁begin｜>", "tool_chat_template_deepseekv31.jinja"),
        ("InternLM2ForCausalLM", "<|action_start|><|plugin|>", "tool_chat_template_internlm2_tool.jinja"),
        ("Phi3ForCausalLM", "<|tool|>", "tool_chat_template_phi4_mini.jinja"),
        ("Cohere2ForCausalLM", "<|START_ACTION|>", "cohere_melody"),
    ],
)
def test_a_family_that_needs_more_than_its_files_is_told_what(architecture: str, marks: str, remedy: str) -> None:
    (warning,) = decided(Family("m", architecture, template(marks=marks))).warnings
    assert remedy in warning


@pytest.mark.parametrize(
    ("marks", "file"),
    [("<｜tool▁calls▁begin｜>```json", "deepseekv3.jinja"), ("<｜tool▁calls▁begin｜>", "deepseekv31.jinja")],
)
def test_a_deepseek_model_without_tools_in_its_template_is_told_of_the_template(marks: str, file: str) -> None:
    (warning,) = decided(Family("m", "DeepseekV3ForCausalLM", template(marks=marks), tokens=DEEPSEEK)).warnings
    assert warning.startswith("made-up: the chat template does not show a request's tools to the model. Download ")
    assert file in warning
    assert "tokenizer" not in warning


@pytest.mark.parametrize("marks", ["<｜tool▁calls▁begin｜>```json", "<｜tool▁calls▁begin｜>"])
def test_a_deepseek_model_that_lacks_a_token_is_told_of_the_tokenizer(marks: str) -> None:
    family = Family("m", "DeepseekV3ForCausalLM", template(marks), tokens=DEEPSEEK[1:])
    (warning,) = decided(family).warnings
    assert f"the tokenizer has no token {DEEPSEEK[0]}, which the parser deepseek_v3" in warning
    assert "Download the files of the tokenizer" in warning
    assert ".jinja" not in warning
    assert decided(family._replace(tokens=DEEPSEEK)).warnings == []


def test_llama_4_without_its_token_is_told_of_the_parser_for_python_calls() -> None:
    calls = template('{"name": …, "parameters": …}')
    family = Family("m", "Llama4ForConditionalGeneration", calls, tokens=("<|python_start|>",))
    (warning,) = decided(family).warnings
    assert "the tokenizer has no token <|python_tag|>" in warning
    assert "--tool-call-parser llama4_pythonic" in warning


def test_a_model_without_a_chat_template_is_told_before_the_start() -> None:
    plan = decided(Family("base", "LlamaForCausalLM", ""))
    (warning,) = plan.warnings
    assert warning == (
        "made-up has no chat template, so vLLM answers /v1/chat/completions with HTTP 400; set --chat-template FILE, or "
        "let clients use /v1/completions"
    )
    assert (plan.options, plan.reasons) == ({}, ())


@pytest.fixture
def qwen3(tmp_path: Path) -> Path:
    """A folder with Qwen3's config.json, template and tokens."""
    (tmp_path / "config.json").write_text((PUBLIC / "Qwen--Qwen3-30B-A3B" / "config.json").read_text())
    (tmp_path / "chat_template.jinja").write_text(QWEN3.template)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"content": token} for token in THINK]}))
    return tmp_path


def decided_for(words: str, environment: dict[str, str] | None = None) -> Plan:
    return decide(read_settings(parse_flags(words.split()), environment or {}), parse_hardware_name("H100:1"))


OURS = ("reasoning_parser", "tool_call_parser", "enable_auto_tool_choice")


@pytest.mark.parametrize(
    ("words", "environment", "expected"),
    [
        ("", {}, ("qwen3", "hermes", True)),
        ("--launch-parsers off", {}, (None, None, None)),
        ("", {"LAUNCH_PARSERS": "off"}, (None, None, None)),
        ("--reasoning-parser=olmo3", {}, (None, "hermes", True)),
        ("--tool-call-parser=olmo3", {}, ("qwen3", None, None)),
        ("--tokenizer=another/model", {}, (None, None, None)),
        ("--tokenizer-mode=auto", {}, ("qwen3", "hermes", True)),
        ("--runner=pooling", {}, (None, None, None)),
    ],
)
def test_settings_decide_on_the_parsers(
    qwen3: Path, words: str, environment: dict[str, str], expected: tuple[object, ...]
) -> None:
    plan = decided_for(f"{qwen3} {words}", environment)
    assert tuple(plan.options.get(name) for name in OURS) == expected
    assert {reason.field for reason in plan.reasons} & {*OURS} == {*OURS} & plan.options.keys()


def test_the_users_template_decides_instead_of_the_models(qwen3: Path) -> None:
    (qwen3 / "plain.jinja").write_text(template())
    plan = decided_for(f"{qwen3} --chat-template {qwen3}/plain.jinja")
    assert not plan.options.keys() & {*OURS}


def test_a_base_model_is_warned_of_in_the_plan_unless_the_user_gives_a_template(qwen3: Path) -> None:
    (qwen3 / "chat_template.jinja").unlink()
    (qwen3 / "tokenizer_config.json").write_text("{}")
    assert any("has no chat template" in warning for warning in decided_for(str(qwen3)).warnings)
    for words in (f"--chat-template {qwen3}/mine.jinja", "--chat-template {{messages}}", "--runner=pooling"):
        assert not any("has no chat template" in warning for warning in decided_for(f"{qwen3} {words}").warnings)
