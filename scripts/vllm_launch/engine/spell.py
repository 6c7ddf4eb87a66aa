"""Spells options as words for vLLM's command line."""

from __future__ import annotations

import json
from collections.abc import Mapping

from vllm_launch.engine.options import SECRETS, Option, options
from vllm_launch.errors import UsageError


def spell(values: Mapping[str, object]) -> list[str]:
    """Words that make vLLM's parser give exactly ``values``, by dest, in vLLM's order; "model" is not spelt.

    One word an option, ``--flag=value``, so that no value is taken for a flag; only lists of several need more words.

    Raises:
        UsageError: an item of a list begins with a dash: argparse cannot be told that it is no flag.
    """
    words: list[str] = []
    for option in options().values():
        if option.dest in values and option.dest != "model":
            words += _spelt(option, values[option.dest])
    return words


def _spelt(option: Option, value: object) -> list[str]:
    flag = option.flags[0]
    if option.kind in {"flag", "switch"} or value is True:
        denied = [f"--no-{flag.removeprefix('--')}"] if option.kind == "switch" else []
        return [flag] if value else denied
    if not isinstance(value, list) or option.kind in {"json", "device_ids"}:
        return [f"{flag}={_text(option, value)}"]
    texts = [_text(option, item) for item in value]
    if option.append or len(texts) <= 1:
        return [f"{flag}={text}" for text in texts]
    if dashed := [text for text in texts if text.startswith("-") and not text[1:].isdecimal()]:
        shown = "an item" if option.dest in SECRETS else repr(dashed[0])
        raise UsageError(flag, f"{shown} begins with a dash, which vLLM takes for a flag", "name it otherwise")
    return [flag, *texts]


def _text(option: Option, value: object) -> str:
    if option.kind == "device_ids" and isinstance(value, list):
        return ",".join(map(str, value))
    return json.dumps(value) if isinstance(value, (dict, list)) or option.kind == "json" else str(value)
