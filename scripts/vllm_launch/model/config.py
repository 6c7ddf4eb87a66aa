"""Reads values of a model's config.json by key and checks their types. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from vllm_launch.errors import UsageError

MAX_VALUE = 2**40
"""Upper limit for every number in config.json. A larger one is a typo, and would make arithmetic slow."""

LANGUAGE_MODEL_KEYS = (
    "text_config",
    "thinker_config",
    "llm_config",
    "language_config",
    "decoder",
    "generator",
    "text_encoder",
)
"""Keys under which composite models keep the config of their language model.

Source: transformers, PreTrainedConfig.get_text_config. vLLM's own configs in vllm/transformers_utils/configs use
``llm_config``, ``language_config`` and ``thinker_config``.
"""


VOCAB_KEYS = ("vocab_size", "padded_vocab_size")
"""Keys of the vocabulary's size. ChatGLM has only the padded one (vllm/transformers_utils/configs/chatglm.py)."""

INTERMEDIATE_KEYS = ("intermediate_size", "ffn_hidden_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim")
"""Keys of the width of a dense feed-forward."""


def parse_json(text: bytes, where: str) -> dict[str, Any]:
    """Return the JSON object in ``text``.

    Raises:
        UsageError: ``text`` is not a JSON object in UTF-8. The error names ``where``.
    """
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
        raise UsageError(where, f"holds {kind}, not an object", f"replace it with the {name} of the model's repository")
    return value


class Config:
    """A config.json, or a nested object of it, whose values are read by key.

    ``where`` is the file or the object, for error messages. A getter tries ``keys`` in order, and raises a UsageError
    that names the key if the value is wrong. ``defaults`` has the values that the config class of the model type fills
    in for keys that config.json omits. An entry such as ``@hidden_size: n_embd`` says that this class stores
    hidden_size as n_embd. A key whose value is null is not omitted: Mistral 7B v0.3 has ``"sliding_window": null``,
    which is no window, and not the 4,096 of the class.
    """

    def __init__(self, raw: Mapping[str, Any], where: str, defaults: Mapping[str, Any] | None = None) -> None:
        self.raw, self.where, self.defaults = raw, where, defaults or {}
        self._stored = {key[1:]: name for key, name in self.defaults.items() if key.startswith("@")}

    def get(self, *keys: str) -> Any:
        """Return the value of the first of ``keys`` that is not null, else the first default of ``keys``, else None."""
        for name in (name for key in keys for name in self._names(key)):
            if self.raw.get(name) is not None:
                return self.raw[name]
        omitted = (key for key in keys if not any(name in self.raw for name in self._names(key)))
        return next((self.defaults[key] for key in omitted if key in self.defaults), None)

    def has(self, *keys: str) -> bool:
        """Whether config.json itself has a value other than null for one of ``keys``."""
        return any(self.raw.get(name) is not None for key in keys for name in self._names(key))

    def _names(self, key: str) -> tuple[str, ...]:
        """Return the names under which config.json can have ``key``."""
        stored = self._stored.get(key, key)
        return tuple(dict.fromkeys((key, stored, *(other for other, name in self._stored.items() if name == stored))))

    def optional_integer(self, *keys: str, minimum: int = 1) -> int | None:
        """Return an integer of ``minimum`` or more, or None if config.json has none of ``keys``."""
        value = self.get(*keys)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(keys[0], f"is {short_repr(value)}, not a whole number")
        if not minimum <= value <= MAX_VALUE:
            raise self.error(keys[0], f"is {short_repr(value)}, outside the range {minimum} to {MAX_VALUE:,}")
        return value

    def largest(self, *keys: str, default: int | None = None, minimum: int = 1) -> int:
        """Return an integer of ``minimum`` or more, or the largest of a list that has one for each layer."""
        value = self.get(*keys)
        if isinstance(value, list) and value and all(isinstance(item, int) for item in value):
            return Config({keys[0]: max(value)}, self.where).integer(keys[0], minimum=minimum)
        return self.integer(*keys, default=default, minimum=minimum)

    def integer(self, *keys: str, default: int | None = None, minimum: int = 1) -> int:
        """Return an integer of ``minimum`` or more, else ``default``. Without a default the key is required."""
        value = self.optional_integer(*keys, minimum=minimum)
        if value is None:
            value = default
        if value is None:
            remedy = (
                "download the file again if it is incomplete; if it is complete, this vllm-launch does not support the "
                "model: run vllm serve without the launcher"
            )
            raise UsageError(self.where, f"has no {keys[0]!r}", remedy)
        return value

    def in_layer(self, n: int, *keys: str) -> Config:
        """Return this config for layer ``n``: where one of ``keys`` has a list, its value is that layer's."""
        lists = {key: value for key in keys if isinstance(value := self.get(key), list)}
        own = {key: value[n] for key, value in lists.items() if n < len(value)}
        return Config({**self.raw, **own}, self.where, self.defaults) if own else self

    def flag(self, *keys: str, default: bool = False) -> bool:
        """Return a boolean. An integer counts as its truth value in Python."""
        value = self.get(*keys)
        if value is None:
            return default
        if not isinstance(value, int):
            raise self.error(keys[0], f"is {short_repr(value)}, not true or false")
        return bool(value)

    def text(self, key: str, default: str = "") -> str:
        """Return a string, or ``default``."""
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.error(key, f"is {short_repr(value)}, not a string")
        return value

    def number(self, *keys: str) -> float | None:
        """Return a finite positive number, or None."""
        value = self.get(*keys)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MAX_VALUE:
            raise self.error(keys[0], f"is {short_repr(value)}, not a positive number")
        return float(value)

    def table(self, key: str) -> dict[str, Any] | None:
        """Return a JSON object, or None."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(key, f"is {short_repr(value)}, not an object")
        return value

    def part(self, key: str) -> Config:
        """Return the nested object of ``key``, without values if there is none."""
        return Config(self.table(key) or {}, f"{self.where} {key}")

    def array(self, *keys: str) -> list[Any] | None:
        """Return a list, or None."""
        value = self.get(*keys)
        if value is None:
            return None
        if not isinstance(value, list):
            raise self.error(keys[0], f"is {short_repr(value)}, not a list")
        return value

    def strings(self, key: str) -> list[str] | None:
        """Return a list of strings, or None."""
        value = self.array(key)
        if value is not None and not all(isinstance(item, str) for item in value):
            raise self.error(key, f"is {short_repr(value)}, not a list of strings")
        return value

    def integers(self, key: str) -> list[int] | None:
        """Return a list of integers of 0 or more, or None."""
        value = self.array(key)
        if value is not None and not all(isinstance(item, int) and 0 <= item <= MAX_VALUE for item in value):
            raise self.error(key, f"is {short_repr(value)}, not a list of whole numbers")
        return value

    def error(self, key: str, problem: str) -> UsageError:
        """Return the error for a bad value of ``key``."""
        return UsageError(f"{self.where} key {key!r}", problem, "correct it, or download the file again")


def short_repr(value: Any) -> str:
    """Return ``repr(value)``, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."  # noqa: PLR2004 - characters


def language_config(raw: Mapping[str, Any], where: str) -> tuple[Mapping[str, Any], str, bool]:
    """Return the part of ``raw`` that describes the language model, its place for errors, and whether it is nested."""
    nested = False
    for _ in range(3):  # qwen2_5_omni: thinker_config, then text_config
        key = next((key for key in LANGUAGE_MODEL_KEYS if raw.get(key) is not None), None)
        if key is None:
            break
        inner = raw[key]
        if not isinstance(inner, dict):
            raise UsageError(
                f"{where} key {key!r}", f"is {short_repr(inner)}, not an object", "download the file again"
            )
        raw, where, nested = inner, f"{where} {key}", True
    return raw, where, nested
