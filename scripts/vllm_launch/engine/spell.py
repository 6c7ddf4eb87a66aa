"""Writes option values as words for vLLM's command line."""

from __future__ import annotations

import json
from collections.abc import Mapping

from vllm_launch.engine.options import SECRETS, Option, options
from vllm_launch.errors import UsageError


def spell(values: Mapping[str, object]) -> list[str]:
    """Return words from which vLLM's parser reads exactly ``values`` (by dest), in vLLM's order and without "model".

    An option is one word, ``--flag=value``, so that argparse never reads a value as a flag. Only a list of several
    items needs more words.

    Raises:
        UsageError: an item of a list begins with a dash, so argparse would read it as a flag.
    """
    words: list[str] = []
    for option in options().values():
        if option.dest in values and option.dest != "model":
            words += _option_words(option, values[option.dest])
    return words


def _option_words(option: Option, value: object) -> list[str]:
    flag = option.flags[0]
    if option.kind in {"flag", "switch"} or value is True:
        negated = [f"--no-{flag.removeprefix('--')}"] if option.kind == "switch" else []
        return [flag] if value else negated
    if not isinstance(value, list) or option.kind in {"json", "device_ids"}:
        return [f"{flag}={_value_text(option, value)}"]
    texts = [_value_text(option, item) for item in value]
    if option.append or len(texts) <= 1:
        return [f"{flag}={text}" for text in texts]
    if dashed := [text for text in texts if text.startswith("-") and not text[1:].isdecimal()]:
        shown = "an item" if option.dest in SECRETS else repr(dashed[0])
        raise UsageError(flag, f"{shown} begins with a dash, so vLLM would read it as a flag", "use another name")
    return [flag, *texts]


def _value_text(option: Option, value: object) -> str:
    if option.kind == "device_ids" and isinstance(value, list):
        return ",".join(map(str, value))
    return json.dumps(value) if isinstance(value, (dict, list)) or option.kind == "json" else str(value)
