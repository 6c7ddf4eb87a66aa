"""What the pinned vLLM knows about chat: its parsers of tool calls and reasoning, and its own chat templates.

chat.json has one row for each family of models, with the page of vLLM's documentation or recipe that names the parser.
``tests/engine/test_chat_against_vllm.py`` compares it with vLLM's registries and feeds each parser the family's output.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Literal

import msgspec

Thinking = Literal["opened", "switchable", "closed", "unmarked"]
"""How a prompt with the template's defaults ends, for a model that thinks between two tags.

opened: with the opening tag, so that the model thinks. closed: with both tags, so that it does not. unmarked: with no
tag. switchable: with no tag, but ``enable_thinking: false`` closes the tags, so that the model thinks by default.
"""


class ParserRule(msgspec.Struct, frozen=True, kw_only=True):
    """A family of models and the parser that reads their output. The first rule that matches a model decides.

    ``parser`` is None if vLLM has no parser that works without more than the model's files. ``need``: what the user can
    do if ``parser`` is None, or if the template does not show tools to the model. ``need_tokens``: what the user can do
    if the tokenizer lacks one of ``tokens``. Both are "" if the plan knows no remedy.

    A rule matches if the architecture matches one of the patterns in ``architectures``, and if the template contains
    each of ``markers`` and none of ``without``.
    """

    family: str
    parser: str | None
    source: str  # the page of vLLM's documentation at 0.32, or "recipes: MODEL"
    architectures: tuple[str, ...] = ("*",)
    markers: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    prompt_markers: tuple[str, ...] = ()  # parts of a prompt that the template makes with its defaults
    tokens: tuple[str, ...] = ()  # tokens that the parser needs: vLLM does not start if one is missing
    thinking: tuple[Thinking, ...] = ()  # for reasoning: the prompts with which the parser is right. (): all
    tags: tuple[str, str] = ("<think>", "</think>")
    need: str = ""
    need_tokens: str = ""

    def matches(self, architecture: str, template: str, prompt: str) -> bool:
        """Whether this rule is for a model of ``architecture`` with the source ``template``.

        ``prompt`` is a prompt that the template makes with its defaults.
        """
        return (
            any(fnmatchcase(architecture, pattern) for pattern in self.architectures)
            and all(marker in template for marker in self.markers)
            and not any(marker in template for marker in self.without)
            and all(marker in prompt for marker in self.prompt_markers)
        )


class ChatTable(msgspec.Struct, frozen=True, kw_only=True):
    """The content of chat.json."""

    native: tuple[str, ...]  # architectures whose prompts vLLM writes in Python (config/model.py: tokenizer_mode)
    fallbacks: tuple[str, ...]  # model types for which vLLM has a template (transformers_utils/chat_templates)
    tool_call_parsers: tuple[ParserRule, ...]
    reasoning_parsers: tuple[ParserRule, ...]


@cache
def chat_table() -> ChatTable:
    """Return the table in chat.json."""
    return msgspec.json.decode(Path(__file__).with_name("chat.json").read_bytes(), type=ChatTable)
