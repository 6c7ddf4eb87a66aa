"""Renders a model's chat template with Jinja, to see the prompts that it makes. The only owner of jinja2."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

QUESTION = "Which weather is it?"
TOOL = {
    "type": "function",
    "function": {
        "name": "get_the_weather",
        "description": "Return the weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "name"}}},
    },
}


class _Generation(jinja2.ext.Extension):
    """The tag ``{% generation %}``, which marks the assistant's words for training. It changes no prompt."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own way

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Return the body of the tag."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, *, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def prompts_of(source: str) -> Callable[..., str | None]:
    """Return a function that renders ``source`` for one question of a user, up to the assistant's turn.

    Its keyword arguments are the variables of a request: ``tools``, ``enable_thinking``. It returns None if the
    template raises an error. The environment is that of transformers (utils/chat_template_utils.py).
    """
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: dt.datetime.now(dt.UTC).strftime(form)
    try:
        template = environment.from_string(source)
    except (jinja2.TemplateError, RecursionError):
        return lambda **_: None
    return lambda **variables: _render(template, variables)


def _render(template: jinja2.Template, variables: Mapping[str, Any]) -> str | None:
    for content in (QUESTION, [{"type": "text", "text": QUESTION}]):  # some templates take only a list of parts
        messages = [{"role": "user", "content": content}]
        try:
            prompt = template.render(
                messages=messages, add_generation_prompt=True, bos_token="", eos_token="", **variables
            )
        except Exception:  # noqa: BLE001, S112 - a template can raise any error
            continue
        if QUESTION in prompt:
            return prompt
    return None
