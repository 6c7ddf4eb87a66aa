"""One model's config.json as checked values. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from vllm_launch.errors import UsageError

LARGEST = 2**40
"""No size in a config is larger; what is, is a slip of the pen and would only make arithmetic slow."""

NESTED = ("text_config", "thinker_config", "llm_config", "language_config", "decoder", "generator", "text_encoder")
"""Where composite models keep their language model (transformers: PreTrainedConfig.get_text_config; vLLM's own
configs in vllm/transformers_utils/configs use ``llm_config``, ``language_config`` and ``thinker_config``)."""


def parse_json(text: bytes, where: str) -> dict[str, Any]:
    """A JSON object, else a UsageError that names ``where``."""
    if text.startswith(b"version https://git-lfs"):
        raise UsageError(where, "is a Git LFS pointer, not the file itself", "run `git lfs pull` in the model's folder")
    try:
        value = json.loads(text.decode())
    except UnicodeDecodeError as error:
        raise UsageError(where, f"is not UTF-8 ({error.reason} at byte {error.start})", "download it again") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(where, f"is not JSON ({str(error)[:120]})", "download it again") from None
    if not isinstance(value, dict):
        kind = {list: "a list", str: "text", type(None): "null"}.get(type(value), "a single value")
        name = where.rpartition("/")[2]
        raise UsageError(where, f"holds {kind}, not an object", f"give the model's own {name}")
    return value


class Config:
    """A config.json, read by key; every getter raises a UsageError that names the key.

    Keys that a nested config leaves out have the values of transformers' own config class (``defaults``), under
    whichever name that class gives them (``@hidden_size: n_embd``).
    """

    def __init__(self, raw: Mapping[str, Any], where: str, defaults: Mapping[str, Any] | None = None) -> None:
        self.raw, self.where, self.defaults = raw, where, defaults or {}

    def get(self, *keys: str) -> Any:
        """The first of ``keys`` that is there and not null; else the default of the first; else None."""
        for key in keys:
            for name in (key, self.defaults.get(f"@{key}")):
                if name is not None and self.raw.get(name) is not None:
                    return self.raw[name]
        return next((self.defaults[key] for key in keys if key in self.defaults), None)

    def has(self, *keys: str) -> bool:
        """Whether any of ``keys`` is written in the file itself, and not null."""
        return any(self.raw.get(name) is not None for key in keys for name in (key, self.defaults.get(f"@{key}", key)))

    def optional(self, *keys: str, least: int = 1) -> int | None:
        """A whole number, or None where none of ``keys`` is there."""
        value = self.get(*keys)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(keys[0], f"is {shown(value)}, not a whole number")
        if not least <= value <= LARGEST:
            raise self.wrong(keys[0], f"is {shown(value)}, which no model has")
        return value

    def whole(self, *keys: str, default: int | None = None, least: int = 1) -> int:
        """A whole number of ``least`` or more."""
        value = self.optional(*keys, least=least)
        if value is None:
            value = default
        if value is None:
            raise UsageError(self.where, f"has no {keys[0]!r}", "give the complete config.json of the model")
        return value

    def flag(self, *keys: str, default: bool = False) -> bool:
        """True or false; numbers count as they do in Python."""
        value = self.get(*keys)
        if value is None:
            return default
        if not isinstance(value, int):
            raise self.wrong(keys[0], f"is {shown(value)}, not true or false")
        return bool(value)

    def text(self, key: str, default: str = "") -> str:
        """A string."""
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.wrong(key, f"is {shown(value)}, not a string")
        return value

    def number(self, *keys: str) -> float | None:
        """A finite positive number, or None."""
        value = self.get(*keys)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= LARGEST:
            raise self.wrong(keys[0], f"is {shown(value)}, not a positive number")
        return float(value)

    def table(self, key: str) -> dict[str, Any] | None:
        """An object, or None."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(key, f"is {shown(value)}, not an object")
        return value

    def items(self, *keys: str) -> list[Any] | None:
        """A list, or None."""
        value = self.get(*keys)
        if value is None:
            return None
        if not isinstance(value, list):
            raise self.wrong(keys[0], f"is {shown(value)}, not a list")
        return value

    def strings(self, key: str) -> list[str] | None:
        """A list of strings, or None."""
        value = self.items(key)
        if value is not None and not all(isinstance(item, str) for item in value):
            raise self.wrong(key, f"is {shown(value)}, not a list of strings")
        return value

    def wholes(self, key: str) -> list[int] | None:
        """A list of whole numbers, or None."""
        value = self.items(key)
        if value is not None and not all(isinstance(item, int) and 0 <= item <= LARGEST for item in value):
            raise self.wrong(key, f"is {shown(value)}, not a list of whole numbers")
        return value

    def wrong(self, key: str, what: str) -> UsageError:
        """The error for a bad value of ``key``."""
        return UsageError(f"{self.where} key {key!r}", what, "correct it, or download the file again")


def shown(value: Any) -> str:
    """``value`` in a few characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."  # noqa: PLR2004 - characters


def language_config(raw: Mapping[str, Any], where: str) -> tuple[Mapping[str, Any], str, bool]:
    """The part of ``raw`` that describes the language model, where it stands, and whether it is nested."""
    nested = False
    for _ in range(3):  # qwen2_5_omni: thinker_config, then text_config
        key = next((key for key in NESTED if raw.get(key) is not None), None)
        if key is None:
            break
        inner = raw[key]
        if not isinstance(inner, dict):
            raise UsageError(f"{where} key {key!r}", f"is {shown(inner)}, not an object", "download the file again")
        raw, where, nested = inner, f"{where} {key}", True
    return raw, where, nested
