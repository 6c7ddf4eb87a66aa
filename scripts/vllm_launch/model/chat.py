"""Finds out how vLLM turns the messages of a chat into a prompt: which template, and which prompts it makes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal

import msgspec

from vllm_launch.engine.architectures import Architecture
from vllm_launch.engine.chat import chat_table

TEMPLATE_FILE = "chat_template.jinja"
NAMED_TEMPLATES = "additional_chat_templates"
"""Folder of templates with other names than "default" (transformers/utils/hub.py: CHAT_TEMPLATE_DIR)."""

MISTRAL_WEIGHTS, MISTRAL_TOKENIZERS = "consolidated*.safetensors", ("tekken.json", "tokenizer.model.v*")
"""Files with which vLLM chooses Mistral's own tokenizer, which needs no template
(tokenizers/registry.py:resolve_tokenizer_args)."""


class Chat(msgspec.Struct, frozen=True, kw_only=True):
    """How vLLM writes the prompt of a chat with this model.

    ``renderer``: "template" is a Jinja template, "Mistral" is the library of Mistral's tokenizer, "vLLM" is Python code
    in vLLM, "none" means that vLLM answers /v1/chat/completions with HTTP 400.
    """

    renderer: Literal["template", "Mistral", "vLLM", "none"]
    template: str = ""  # its source for a request with tools
    whole_prompt: str = ""  # of one question, with the template's defaults; "" if the template raises an error
    prompt: str = ""  # the part of it after the user's words
    prompt_as_set: str = ""  # the same part with the user's --default-chat-template-kwargs
    prompt_without_thinking: str = ""  # the same part with ``enable_thinking: false``
    shows_tools: bool = False  # the prompt of a request with tools has their names
    tokens: frozenset[str] | None = None  # the added tokens of the tokenizer, None: unknown


class UserChat(msgspec.Struct, frozen=True, kw_only=True):
    """What the user sets for chats.

    ``template``: the source of --chat-template, "" if it is unknown, None if it is not set. ``variables``:
    --default-chat-template-kwargs.
    """

    template: str | None = None
    variables: Mapping[str, Any] = {}


def read_chat(
    files: Mapping[str, Mapping[str, Any]],
    names: Iterable[str],
    architecture: Architecture,
    model_type: str,
    user: UserChat,
) -> Chat | None:
    """Return how vLLM chats with a model, or None if its files do not tell or if it only transcribes.

    ``files``: the small files of the checkpoint. ``names``: the names of all its files. ``model_type``: config.json's
    own. Source: vllm/renderers/hf.py:resolve_chat_template, vllm/config/model.py (tokenizer_mode).
    """
    if "transcription_only" in architecture.flags:
        return None
    tokens = added_tokens(files)
    if user.template is not None:
        return _with_template(user.template, user.template, tokens, user.variables) if user.template else None
    if architecture.name in chat_table().native:
        return Chat(renderer="vLLM", shows_tools=True, tokens=tokens)
    if has_mistral_tokenizer(names):
        return Chat(renderer="Mistral", shows_tools=True, tokens=tokens)
    own = _tokenizer_templates(files)
    template = (_processor_template(files) if "multimodal" in architecture.flags else None) or own.get("default")
    if template is not None:
        return _with_template(template, own.get("tool_use") or own.get("default") or "", tokens, user.variables)
    return _without_template(files.get("tokenizer_config.json"), model_type, tokens)


def _without_template(
    tokenizer: Mapping[str, Any] | None, model_type: str, tokens: frozenset[str] | None
) -> Chat | None:
    """Return how vLLM chats with a model that has no template file. ``tokenizer``: its tokenizer_config.json."""
    if model_type in chat_table().fallbacks:
        return Chat(renderer="vLLM", tokens=tokens)
    if tokenizer is None or "AutoTokenizer" in (tokenizer.get("auto_map") or {}):
        return None  # no tokenizer here, or the repository's own code, which can have a template
    return Chat(renderer="none", tokens=tokens)


def has_mistral_tokenizer(names: Iterable[str]) -> bool:
    """Whether vLLM chooses Mistral's own tokenizer for a repository with the files ``names``."""
    known = tuple(names)
    return any(fnmatchcase(name, MISTRAL_WEIGHTS) for name in known) and any(
        fnmatchcase(name, pattern) for name in known for pattern in MISTRAL_TOKENIZERS
    )


def added_tokens(files: Mapping[str, Mapping[str, Any]]) -> frozenset[str] | None:
    """Return the tokens that the tokenizer's files add to its vocabulary, or None if no file lists them."""
    listed = files.get("tokenizer.json", {}).get("added_tokens")
    decoder = files.get("tokenizer_config.json", {}).get("added_tokens_decoder")
    entries = [*(listed if isinstance(listed, list) else ()), *(decoder.values() if isinstance(decoder, dict) else ())]
    if not entries:
        return None
    contents = {entry.get("content") for entry in entries if isinstance(entry, Mapping)}
    return frozenset(
        {content for content in contents if isinstance(content, str)} | files.get("added_tokens.json", {}).keys()
    )


def _tokenizer_templates(files: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return the tokenizer's templates by name (transformers/tokenization_utils_base.py:from_pretrained)."""
    if files.keys() & {TEMPLATE_FILE, NAMED_TEMPLATES}:
        return {
            **_texts(files.get(NAMED_TEMPLATES, {})),
            **_texts({"default": files.get(TEMPLATE_FILE, {}).get("text")}),
        }
    stored = files.get("tokenizer_config.json", {}).get("chat_template")
    if isinstance(stored, list):
        stored = {entry.get("name"): entry.get("template") for entry in stored if isinstance(entry, Mapping)}
    return _texts(stored if isinstance(stored, Mapping) else {"default": stored})


def _processor_template(files: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Return the template of a multimodal model's processor (transformers/processing_utils.py)."""
    texts = [files.get(TEMPLATE_FILE, {}).get("text")]
    texts += [files.get(name, {}).get("chat_template") for name in ("chat_template.json", "processor_config.json")]
    return next((text for text in texts if isinstance(text, str) and text), None)


def _texts(templates: Mapping[Any, Any]) -> dict[str, str]:
    return {name: text for name, text in templates.items() if isinstance(text, str) and text}


def _with_template(chat: str, with_tools: str, tokens: frozenset[str] | None, variables: Mapping[str, Any]) -> Chat:
    from vllm_launch.model.template import QUESTION, TOOL, prompts_of  # noqa: PLC0415 - jinja2 is slow to import

    def answer_start(text: str) -> str:
        """Return what follows the user's words."""
        return text.rpartition(QUESTION)[2]

    render = prompts_of(chat)
    prompt = render() or ""
    with_tool = (render if with_tools == chat else prompts_of(with_tools))(tools=[TOOL])
    return Chat(
        renderer="template",
        template=with_tools or chat,
        prompt=answer_start(prompt),
        prompt_as_set=answer_start(render(**variables) or ""),
        prompt_without_thinking=answer_start(render(enable_thinking=False) or ""),
        whole_prompt=prompt,
        shows_tools=with_tool is not None and "get_the_weather" in with_tool,
        tokens=tokens,
    )
