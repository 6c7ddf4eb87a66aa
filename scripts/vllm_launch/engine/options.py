"""The options of the pinned ``vllm serve``, as data.

``options.json`` is generated from vLLM's own parser (scripts/generators/engine_options.py), so that a light install,
which has no vLLM to ask, still refuses a misspelt flag and names the right one.
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
"""Options whose values are never shown (vllm/entrypoints/serve/utils/api_utils.py:_SENSITIVE_ARG_FIELDS)."""

Kind = Literal[
    "flag", "switch", "int", "float", "human_int", "human_int_or_auto", "str", "backend", "device_ids",
    "json", "json_or_str", "config", "lora",
]  # fmt: skip


class Option(msgspec.Struct, frozen=True):
    """One option of ``vllm serve``, under its argparse ``dest``.

    ``kind``: a flag can only be said, a switch also denied (``--no-…``); ``config`` is a JSON object; ``backend`` is
    lower-cased with underscores; an ``optional`` one takes the words "" and "None" for None. ``keys`` are those of its
    JSON object, where vLLM takes no others.
    """

    dest: str
    flags: tuple[str, ...]
    kind: Kind
    optional: bool = False
    nargs: Literal["+", "?"] | None = None
    append: bool = False
    choices: tuple[str | int, ...] = ()
    keys: tuple[str, ...] = ()
    default: bool | int | float | str | None = None  # None too where the default is no plain value


class _Table(msgspec.Struct, frozen=True):
    vllm: str
    options: tuple[Option, ...]


@functools.cache
def _table() -> _Table:
    return msgspec.json.decode(Path(__file__).with_suffix(".json").read_bytes(), type=_Table)


def pinned_vllm() -> str:
    """The version of vLLM that the flags here were read from."""
    return _table().vllm


@functools.cache
def options() -> dict[str, Option]:
    """Every option of the pinned ``vllm serve`` by its dest, in vLLM's order."""
    return {option.dest: option for option in _table().options}


def nearest(word: str, known: Iterable[str], otherwise: str = HELP) -> str:
    """A remedy for a name that does not exist: "did you mean X?", or ``otherwise`` where nothing is near."""
    plain = {name.casefold(): name for name in known}
    close = difflib.get_close_matches(word.casefold(), plain, 1, 0.6)
    return f"did you mean {plain[close[0]]}?" if close else otherwise


def flags() -> list[str]:
    """Every spelling of every option, negations aside."""
    return [flag for option in options().values() for flag in option.flags]


def redacted_values(values: Mapping[str, object]) -> dict[str, object]:
    """``values`` with those of ``SECRETS`` as "***", for logs and reports."""
    return {dest: "***" if dest in SECRETS and value else value for dest, value in values.items()}
