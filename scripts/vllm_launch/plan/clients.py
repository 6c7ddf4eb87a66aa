"""Chooses vLLM's parsers for reasoning and tool calls. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from vllm_launch.engine.chat import ParserRule, Thinking, chat_table
from vllm_launch.model.chat import Chat
from vllm_launch.model.model import Model
from vllm_launch.plan.reason import Reason, Source
from vllm_launch.plan.request import PlanRequest

OWN_FORMAT = "hf"
"""Name of vLLM's parser that follows the response_template of the tokenizer. If the user chooses it, vLLM accepts no
other parser (parser/parser_manager.py)."""


class Clients(NamedTuple):
    """The parsers that the plan sets.

    ``options``: vLLM's options by dest. ``reasons``: why the plan sets a parser, or why it sets none. ``warnings``:
    what the user can do to get a parser that the plan cannot set.
    """

    options: Mapping[str, object]
    reasons: Sequence[Reason]
    warnings: Sequence[str]


class Choice(NamedTuple):
    """The result for one kind of parser.

    ``parser``: vLLM's name of it, or None for no parser. ``why``: the reason for the parser, or for no parser. It is ""
    if the model needs no parser. ``need``: what the user can do to get a parser, or "".
    """

    parser: str | None
    why: str
    need: str = ""


NONE = Choice(None, "")


def clients(request: PlanRequest, model: Model) -> Clients:
    """Return the options, reasons and warnings for clients of ``model``.

    The plan changes no parser that the user chose, and does not add --enable-auto-tool-choice to it.
    """
    chat = model.chat
    if chat is None:
        return Clients({}, (), ())
    if chat.renderer == "none":
        return Clients({}, (), (_no_template(model),))
    if not request.parsers or OWN_FORMAT in {request.tool_call_parser, request.reasoning_parser}:
        return Clients({}, (), ())
    options: dict[str, object] = {}
    reasons, warnings = [], []
    tools = _tools(model, chat) if _may_choose_tools(request) else NONE
    reasoning = _reasoning(model, chat) if request.reasoning_parser is None else NONE
    for dest, choice in (("reasoning_parser", reasoning), ("tool_call_parser", tools)):
        if choice.parser is not None:
            options[dest] = choice.parser
        if choice.why:
            reasons.append(Reason(field=dest, value=choice.parser, why=choice.why, source=Source.MODEL))
        if choice.need:
            warnings.append(f"{model.name}: {choice.why}. {choice.need}")
    if tools.parser is not None and request.enable_auto_tool_choice is None:
        options["enable_auto_tool_choice"] = True
        why = "lets the model decide to call a tool. Without it vLLM refuses a request with tools"
        reasons.append(Reason(field="enable_auto_tool_choice", value=True, why=why, source=Source.LAUNCHER))
    return Clients(options, reasons, warnings)


def _may_choose_tools(request: PlanRequest) -> bool:
    """Whether the plan may choose a parser of tool calls: the user has not, and has not forbidden tool calls."""
    return request.tool_call_parser is None and request.enable_auto_tool_choice is not False


def _no_template(model: Model) -> str:
    return (
        f"{model.name} has no chat template, so vLLM answers /v1/chat/completions with HTTP 400; set --chat-template "
        "FILE, or let clients use /v1/completions"
    )


def _matching(rules: Sequence[ParserRule], model: Model, chat: Chat) -> list[ParserRule]:
    return [rule for rule in rules if rule.matches(model.architecture, chat.template, chat.whole_prompt)]


def _tools(model: Model, chat: Chat) -> Choice:
    """Return the parser of the format in which the model writes tool calls."""
    if chat.renderer == "Mistral":
        return Choice("mistral", "reads the tool calls that Mistral's tokenizer marks with [TOOL_CALLS]")
    rules = _matching(chat_table().tool_call_parsers, model, chat)
    if not rules:
        return NONE
    rule = rules[0]
    if rule.parser is None:
        return Choice(
            None, f"the model writes tool calls in the format of {rule.family}, and the plan sets no parser", rule.need
        )
    if not chat.shows_tools:
        why = "the chat template does not show a request's tools to the model"
        return Choice(None, why, rule.need) if rule.need else NONE
    return _if_tokens(
        rule, chat, f"reads tool calls in the format of {rule.family}", "vLLM refuses requests with tools"
    )


def _reasoning(model: Model, chat: Chat) -> Choice:
    """Return the parser that splits reasoning from the answer, if the model thinks unless a request forbids it.

    With a parser on a model that does not think, vLLM reports the whole answer as reasoning, and waits for the end of
    reasoning before it enforces a JSON schema (v1/structured_output/__init__.py:should_fill_bitmask).
    """
    rules = _matching(chat_table().reasoning_parsers, model, chat)
    if not rules:
        return NONE
    if chat.renderer != "template":
        return Choice(rules[0].parser, f"reads the reasoning of {rules[0].family}")
    if not chat.whole_prompt:
        return Choice(
            None, "the chat template fails for a prompt with one user message. Set --reasoning-parser yourself"
        )
    for rule in rules:
        states = (thinking(chat, rule.tags), _end(chat.prompt_as_set, rule.tags))
        if state := next((state for state in states if not rule.thinking or state in rule.thinking), None):
            why = f"reads the reasoning of {rule.family}{THINKS[state].format(*rule.tags)}"
            return _if_tokens(rule, chat, why, "Requests work. Reasoning stays in the answer")
    return Choice(None, NOT_THINKING[thinking(chat, rules[0].tags)].format(*rules[0].tags))


THINKS: dict[Thinking, str] = {
    "opened": ": each prompt ends with {0}",
    "switchable": ": the model writes {0} itself, unless a request sets enable_thinking to false",
    "closed": ", which a request can switch on",
    "unmarked": ", which the model begins itself",
}
NOT_THINKING: dict[Thinking, str] = {
    "opened": "prompts end with {0}. With a parser, vLLM would return reasoning as the answer",
    "closed": "thinking is off by default: prompts end with {1}. With a parser, vLLM would return answers as reasoning",
    "switchable": "a request can switch thinking off. With a parser, vLLM would then return answers as reasoning",
    "unmarked": "prompts do not end with {0}. With a parser, vLLM would return plain answers as reasoning",
}


def _if_tokens(rule: ParserRule, chat: Chat, why: str, without: str) -> Choice:
    """Return the rule's parser if the tokenizer has its tokens. Without them vLLM does not start with this parser.

    ``without``: the effect of no parser, for the user.
    """
    if rule.tokens and chat.tokens is None:
        return Choice(None, f"no file lists the tokens that the parser {rule.parser} needs. {without}")
    missing = [token for token in rule.tokens if token not in (chat.tokens or ())]
    if missing:
        why = f"the tokenizer has no token {missing[0]}, which the parser {rule.parser} needs. {without}"
        return Choice(None, why, rule.need_tokens)
    return Choice(rule.parser, why)


def thinking(chat: Chat, tags: tuple[str, str]) -> Thinking:
    """Return how a prompt with the template's defaults ends: it can open or close ``tags`` (see ``Thinking``)."""
    state = _end(chat.prompt, tags)
    if state == "unmarked" and _end(chat.prompt_without_thinking, tags) == "closed":
        return "switchable"
    return state


def _end(prompt: str, tags: tuple[str, str]) -> Thinking:
    opening, closing = prompt.rfind(tags[0]), prompt.rfind(tags[1])
    if opening == closing:
        return "unmarked"
    return "opened" if opening > closing else "closed"
