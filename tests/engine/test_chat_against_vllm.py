"""Compares engine/chat.json with the pinned vLLM, and feeds its parsers what each family of models writes."""

from __future__ import annotations

import inspect
import json
import re
from typing import Any

import pytest
from chat_families import FAMILIES, Family

from vllm_launch.engine.chat import ParserRule, chat_table

pytestmark = pytest.mark.filterwarnings("default")  # torch, transformers and vLLM give warnings about their own code

TABLE = chat_table()
ARGUMENTS = {"city": "Rome"}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}


def tokenizer(*tokens: str) -> Any:
    """Return a tokenizer of single bytes and ``tokens``. Olmo 3 writes its tags with words of its vocabulary."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers  # noqa: PLC0415
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: number for number, text in enumerate([*alphabet, "Ġ</", "</", "think"])}
    of_bytes = Tokenizer(models.BPE(vocabulary, []))
    of_bytes.pre_tokenizer, of_bytes.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    of_bytes.add_tokens([AddedToken(token, special=False, normalized=False) for token in tokens])
    return PreTrainedTokenizerFast(tokenizer_object=of_bytes)


def request(*, tools: bool = True) -> Any:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest  # noqa: PLC0415, TID251

    body: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    return ChatCompletionRequest.model_validate(body | ({"tools": [TOOL]} if tools else {}))


def parser(family: Family, *, tools: bool = True) -> Any:
    from vllm.parser.parser_manager import ParserManager  # noqa: PLC0415, TID251

    with_tokens = tokenizer(*family.tokens)
    kind = ParserManager.get_parser(family.tool, family.reasoning, enable_auto_tools=True, tokenizer=with_tokens)
    assert kind is not None
    return kind(with_tokens, request(tools=tools).tools, chat_template_kwargs={})


def named(rules: tuple[ParserRule, ...]) -> list[Any]:
    return [pytest.param(rule, id=rule.family) for rule in rules if rule.parser]


@pytest.mark.parametrize("rule", named(TABLE.tool_call_parsers))
def test_vllm_has_the_parser_of_tool_calls_and_makes_it_with_the_tokens_that_the_rule_names(rule: ParserRule) -> None:
    from vllm.tool_parsers import ToolParserManager  # noqa: PLC0415, TID251

    assert rule.parser is not None
    ToolParserManager.get_tool_parser(rule.parser)(tokenizer(*rule.tokens), [])


@pytest.mark.parametrize("rule", named(TABLE.reasoning_parsers))
def test_vllm_has_the_parser_of_reasoning_and_makes_it_with_the_tokens_that_the_rule_names(rule: ParserRule) -> None:
    from vllm.reasoning import ReasoningParserManager  # noqa: PLC0415, TID251

    assert rule.parser is not None
    if rule.parser in {"openai_gptoss", "kimi_k3", "inkling"}:
        pytest.skip("needs more of its tokenizer, which belongs to the model's only architecture")
    of_rule = ReasoningParserManager.get_reasoning_parser(rule.parser)
    for enabled in ({}, {"thinking": True, "enable_thinking": True}):
        of_rule(tokenizer(*rule.tokens), chat_template_kwargs=enabled)


def test_vllm_falls_back_to_its_own_template_for_the_model_types_in_the_table() -> None:
    from vllm.transformers_utils.chat_templates import registry  # noqa: PLC0415, TID251

    assert set(TABLE.fallbacks) == set(registry._MODEL_TYPE_TO_CHAT_TEMPLATE_FALLBACK)


def test_the_architectures_whose_prompts_vllm_writes_are_those_for_which_it_sets_the_tokenizer_mode() -> None:
    from vllm.config.model import ModelConfig  # noqa: PLC0415, TID251

    source = inspect.getsource(ModelConfig.__post_init__)
    chosen = source.partition('if self.tokenizer_mode == "auto":')[2].partition("if self.tokenizer_mode !=")[0]
    assert set(re.findall(r'"(\w+For\w+)"', chosen)) | {"GptOssForCausalLM"} == set(TABLE.native)


WRITING = [pytest.param(family, id=family.name) for family in FAMILIES if family.output]


@pytest.mark.parametrize("family", WRITING)
def test_the_chosen_parsers_read_what_the_family_writes(family: Family) -> None:
    reasoning, content, calls = parser(family).parse(family.output, request(), enable_auto_tools=True)
    if family.reasoning and "I look." in family.output:
        assert (reasoning or "").strip() == "I look."
    if family.tool:
        assert [(call.name, json.loads(call.arguments)) for call in calls] == [("weather", ARGUMENTS)]
        assert not (content or "").strip().removesuffix("</answer>")
    else:
        assert (content or "").strip() == "Sunny."


def plain_answer(family: Family) -> tuple[str, str]:
    """Return the reasoning and the whole text with which ``family`` answers "Sunny." to a request without tools."""
    before, found, after = family.output.partition("I look.")
    if not (family.reasoning and found):
        return "", "Sunny."
    ends = ("\n</think>\n<answer>\n", "</think>", "</seed:think>", "[/THINK]", "<channel|>")
    return found, f"{before}{found}{next(end for end in ends if end in after)}Sunny."


@pytest.mark.parametrize("family", WRITING)
def test_a_plain_answer_stays_the_answer(family: Family) -> None:
    thought, text = plain_answer(family)
    reasoning, content, calls = parser(family, tools=False).parse(text, request(tools=False))
    assert ((reasoning or "").strip(), (content or "").strip(), calls or []) == (thought, "Sunny.", [])


def streamed(family: Family, text: str, *, tools: bool = True) -> tuple[str, str, str, str]:
    """Return (reasoning, content, name and arguments of the call) of ``text``, which arrives token by token."""
    reader, reading = parser(family, tools=tools), request(tools=tools)
    encoded = tokenizer(*family.tokens)
    ids = encoded.encode(text, add_special_tokens=False)
    got = {"reasoning": "", "content": "", "name": "", "arguments": ""}
    for position, number in enumerate(ids):
        last = position == len(ids) - 1
        delta = reader.parse_delta(encoded.decode([number]), [number], reading, prompt_token_ids=[], finished=last)
        for field in ("reasoning", "content"):
            got[field] += (getattr(delta, field, None) or "") if delta else ""
        for call in (delta.tool_calls or []) if delta else []:
            got["name"] += call.function.name or ""
            got["arguments"] += call.function.arguments or ""
    return got["reasoning"], got["content"], got["name"], got["arguments"]


NOT_BY_BYTES = {
    "Hunyuan A13B": "knows its tags by their numbers in the real vocabulary",
    "Olmo 3 Instruct": "knows its tags by their tokens in the real vocabulary",
    "InternLM with vLLM's template": "misses arguments that arrive in single bytes",
    "Jamba": "misses the end of arguments that arrive in single bytes",
}
"""Families whose parsers do not read a stream of the test's tokenizer, with the reason."""
STREAMING = [item for item in WRITING if item.id not in NOT_BY_BYTES]


@pytest.mark.parametrize("family", STREAMING)
def test_the_chosen_parsers_read_a_stream(family: Family) -> None:
    reasoning, content, name, arguments = streamed(family, family.output)
    if family.reasoning and "I look." in family.output:
        assert reasoning.strip() == "I look."
    if family.tool:
        assert (name, json.loads(arguments)) == ("weather", ARGUMENTS)
        assert not content.strip()
    else:
        assert content.strip() == "Sunny."


@pytest.mark.parametrize("family", STREAMING)
def test_a_plain_answer_stays_the_answer_in_a_stream(family: Family) -> None:
    thought, text = plain_answer(family)
    reasoning, content, name, _ = streamed(family, text, tools=False)
    assert (reasoning.strip(), content.strip(), name) == (thought, "Sunny.", "")
