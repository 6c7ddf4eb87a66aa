"""The options of the pinned ``vllm serve``, as data.

scripts/generators/engine_options.py generates ``options.json`` from vLLM's own parser. With it, an installation without
vLLM can also refuse a misspelt flag and name the right one.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

import msgspec

HELP = "see docs/config.example.yaml, or `vllm serve --help=all`"

SECRETS = frozenset({"api_key", "hf_token", "watermark_config"})
"""Options whose values are never printed (vllm/entrypoints/serve/utils/api_utils.py:_SENSITIVE_ARG_FIELDS)."""

Kind = Literal[
    "flag", "switch", "int", "float", "human_int", "human_int_or_auto", "str", "backend", "device_ids",
    "json", "json_or_str", "config", "lora",
]  # fmt: skip


class Option(msgspec.Struct, frozen=True):
    """One option of ``vllm serve``, named by its argparse ``dest``.

    ``kind``: how vLLM reads the value. A flag can only be set. A switch can also be negated (``--no-…``). ``config`` is
    a JSON object. ``backend`` is converted to lower case with underscores.
    ``optional``: the words "" and "None" mean None.
    ``keys``: keys of the JSON object, if vLLM accepts no others.
    ``minimum``, ``maximum``: limits of a number, those of the field in vLLM's config class.
    """

    dest: str
    flags: tuple[str, ...]
    kind: Kind
    optional: bool = False
    nargs: Literal["+", "?"] | None = None
    append: bool = False
    choices: tuple[str | int, ...] = ()
    keys: tuple[str, ...] = ()
    default: bool | int | float | str | None = None  # None also if the default is not a plain value
    minimum: float | None = None
    above_minimum: bool = False  # the value must be more than ``minimum``
    maximum: float | None = None
    below_maximum: bool = False  # the value must be less than ``maximum``


class _Table(msgspec.Struct, frozen=True):
    vllm: str
    names: dict[str, tuple[str, ...]]
    options: tuple[Option, ...]


@functools.cache
def _table() -> _Table:
    return msgspec.json.decode(Path(__file__).with_suffix(".json").read_bytes(), type=_Table)


def pinned_vllm() -> str:
    """Return the version of vLLM that ``options.json`` was generated from."""
    return _table().vllm


@functools.cache
def options() -> dict[str, Option]:
    """Return every option of the pinned ``vllm serve`` by its dest, in vLLM's order."""
    return {option.dest: option for option in _table().options}


def names_of(registry: str) -> tuple[str, ...]:
    """Return the names that vLLM knows in one of its registries: the keys of ``names`` in ``options.json``."""
    return _table().names[registry]


def nearest(word: str, known: Iterable[str], otherwise: str = HELP) -> str:
    """Return a remedy for an unknown name: "did you mean X?", or ``otherwise`` if no known name is close."""
    names = {name.casefold(): name for name in known}
    close = difflib.get_close_matches(word.casefold(), names, 1, 0.6)
    return f"did you mean {names[close[0]]}?" if close else otherwise


def flags() -> list[str]:
    """Return every spelling of every option, without the ``--no-…`` forms."""
    return [flag for option in options().values() for flag in option.flags]


def redacted_values(values: Mapping[str, object]) -> dict[str, object]:
    """Return ``values`` with the values of ``SECRETS`` replaced by "***", for logs and reports."""
    return {dest: "***" if dest in SECRETS and value else value for dest, value in values.items()}
