"""vLLM's own flags: which there are, what a user's words mean, how a value is spelt. The one place that knows them.

``engine_args.json`` is made from the pinned vLLM's parser (``make generate``), so a light install, which has no vLLM to
ask, still refuses a misspelt flag and says the right one. The user's own words are passed on as they are; they are
parsed here only to check them and to see what the plan must take as given.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import msgspec

from vllm_launch.errors import UsageError

GONE = {
    "--swap-space": "it left with the V0 engine; --kv-offloading-size keeps KV blocks in host memory",
    "--num-scheduler-steps": "it left with the V0 engine; --async-scheduling is on by default",
    "--use-v2-block-manager": "drop it, there is only one block manager now",
    "--worker-use-ray": "use --distributed-executor-backend ray",
    "--engine-use-ray": "use --distributed-executor-backend ray",
    "--device": "drop it, the installed vLLM is built for one device",
    "--disable-log-requests": "drop it, requests are logged only with --enable-log-requests",
    "--guided-decoding-backend": "use --structured-outputs-config.backend",
    "--max-context-len-to-capture": "use --max-cudagraph-capture-size",
    "--max-seq-len-to-capture": "use --max-cudagraph-capture-size",
    "--speculative-model": "use --speculative-config '{\"model\": …}'",
    "--num-speculative-tokens": "use --speculative-config '{\"num_speculative_tokens\": …}'",
    "--enable-reasoning": "use --reasoning-parser alone",
    "--task": "use --runner and --convert",
    "--preemption-mode": "drop it, the V1 engine recomputes",
    "--scheduler-delay-factor": "drop it, the V1 engine has no such delay",
}
"""Flags that vLLM took once and 0.32.0 does not, and what to use instead (vLLM release notes)."""

HUMAN = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
"""Suffixes as in vllm/engine/arg_utils.py:human_readable_int: small letters are decimal, capitals binary."""


class Option(msgspec.Struct, frozen=True):
    """One option of ``vllm serve``; ``kind`` is flag, switch, int, float, human_int, json or str."""

    dest: str
    flags: tuple[str, ...]
    kind: str
    nargs: str | None = None
    append: bool = False
    choices: tuple[str, ...] = ()


class _Table(msgspec.Struct, frozen=True):
    vllm: str
    options: tuple[Option, ...]


@functools.cache
def options() -> dict[str, Option]:
    """Every option of the pinned ``vllm serve`` by its name (dest)."""
    table = msgspec.json.decode(Path(__file__).with_suffix(".json").read_bytes(), type=_Table)
    return {option.dest: option for option in table.options}


def nearest(word: str, known: Sequence[str]) -> str:
    """A remedy for a name that does not exist: "did you mean X?", or where the list of names is."""
    close = difflib.get_close_matches(word, known, 1, 0.6)
    return f"did you mean {close[0]}?" if close else "see `vllm serve --help=all` and docs/config.example.yaml"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError("command line", message, "see `vllm-launch serve --help`")


def _human(text: str) -> int:
    match = re.fullmatch(r"(-?\d+(?:\.\d+)?)([kKmMgGtT]?)", text.strip())
    if text == "auto":
        return -1
    if not match or ("." in match[1] and (match[2] == "" or match[2].isupper())):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number such as 8192, 25.6k or 8K")
    return int(float(match[1]) * HUMAN.get(match[2], 1)) if "." in match[1] else int(match[1]) * HUMAN.get(match[2], 1)


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON") from None


def _number(convert: type[int] | type[float], name: str, text: str) -> int | float:
    try:
        return convert(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not {name}") from None


_TYPES = {
    "int": functools.partial(_number, int, "a whole number"),
    "float": functools.partial(_number, float, "a number"),
    "human_int": _human,
    "json": _json,
    "str": str,
}


@functools.cache
def _parser() -> _Parser:
    parser = _Parser(add_help=False, argument_default=argparse.SUPPRESS, prog="vllm-launch")
    parser.add_argument("model_tag", nargs="?")
    for option in options().values():
        if option.kind == "switch":
            parser.add_argument(option.flags[0], dest=option.dest, action=argparse.BooleanOptionalAction)
            continue
        if option.kind == "flag":
            parser.add_argument(*option.flags, dest=option.dest, action="store_true")
            continue
        parser.add_argument(
            *option.flags,
            dest=option.dest,
            action="append" if option.append else "store",
            type=_TYPES[option.kind],
            nargs=option.nargs,
            choices=option.choices or None,
        )
    return parser


def _plain(words: Sequence[str]) -> tuple[list[str], dict[str, object]]:
    """Words for argparse, and what the dotted ones set (``--compilation-config.mode 3``), as FlexibleArgumentParser."""
    plain: list[str] = []
    dotted: dict[str, object] = {}
    rest = iter(words)
    for word in rest:
        if not word.startswith("--") or word == "--":
            plain.append(word)
            continue
        key, equals, value = word.partition("=")
        head, dot, tail = key.partition(".")
        head = head.replace("_", "-")
        if not dot:
            plain.append(head + equals + value)
            continue
        dest = head.removeprefix("--").replace("-", "_")
        if dest not in options() or options()[dest].kind not in {"json", "str"}:
            raise UsageError(key, "vLLM has no such flag that takes JSON", nearest(head, _flags()))
        if not equals:
            value = next(rest, "")
            if not value:
                raise UsageError(key, "a value is missing", f"write {key} VALUE")
        entry = dotted.setdefault(dest, {})
        if isinstance(entry, dict):
            entry[tail.rstrip("+")] = value
    return plain, dotted


def _flags() -> list[str]:
    return [flag for option in options().values() for flag in option.flags]


def parse(words: Sequence[str]) -> tuple[str | None, dict[str, object]]:
    """What a ``vllm serve`` line says: the model (positional, which wins over --model) and each option set, by dest.

    Raises:
        UsageError: a flag that vLLM does not have (the nearest is named) or a value that it cannot take.
    """
    plain, dotted = _plain(words)
    for word in plain:
        if (flag := word.partition("=")[0]) in GONE:
            raise UsageError(flag, "this vLLM no longer has it", GONE[flag])
    found, unknown = _parser().parse_known_args(plain)
    for word in unknown:
        flag = word.partition("=")[0]
        if word.startswith("-"):
            raise UsageError(flag, "vLLM has no such flag", nearest(flag, _flags()))
        raise UsageError(f"{word!r}", "a word that belongs to no flag", "quote values that hold spaces")
    values = dotted | vars(found)
    positional = values.pop("model_tag", None)
    named = values.pop("model", None)
    model = positional or named
    return (str(model) if model else None), values


def spell(dest: str, value: object) -> list[str]:
    """The words that set ``dest`` to ``value`` on vLLM's command line."""
    option = options()[dest]
    flag = option.flags[0]
    if option.kind in {"switch", "flag"}:
        if value is True:
            return [flag]
        return [f"--no-{flag.removeprefix('--')}"] if option.kind == "switch" else []
    if option.append and isinstance(value, list):
        return [word for one in value for word in (flag, str(one))]
    if option.nargs == "+" and isinstance(value, list):
        return [flag, *(_text(one) for one in value)]
    return [f"{flag}={_text(value)}"]


def _text(value: object) -> str:
    return json.dumps(value) if isinstance(value, (dict, list)) else str(value)


def from_mapping(values: Mapping[str, object], where: Mapping[str, str]) -> tuple[str | None, dict[str, object]]:
    """The same as ``parse`` for a config file's names and values; ``where`` says for each key on which line it stands.

    A null leaves vLLM's default, as vLLM's own ``--config`` does.

    Raises:
        UsageError: a name that vLLM does not have or a value that it cannot take, with its place.
    """
    model: str | None = None
    found: dict[str, object] = {}
    for key, value in values.items():
        dest = key.replace("-", "_")
        if f"--{dest.replace('_', '-')}" in GONE:
            raise UsageError(where[key], f"{key}: this vLLM no longer has it", GONE[f"--{dest.replace('_', '-')}"])
        if dest in {"model", "model_tag"}:
            if not isinstance(value, str) or not value:
                raise UsageError(where[key], "model is not a name", "give a folder or a hub id")
            model = value
            continue
        if dest not in options():
            raise UsageError(where[key], f"{key} is not an option of vLLM", nearest(dest, list(options())))
        if value is None:
            continue
        option = options()[dest]
        if option.kind in {"switch", "flag"} and not isinstance(value, bool):
            raise UsageError(where[key], f"{key} is {value!r}, not true or false", "write true or false")
        if isinstance(value, bool) and option.kind not in {"switch", "flag", "json", "str"}:
            raise UsageError(where[key], f"{key} is {value!r}, not a {option.kind}", "give a number")
        try:
            found[dest] = parse(spell(dest, value))[1].get(dest, value)
        except UsageError as error:
            raise UsageError(where[key], error.what, "mend the value") from None
    return model, found
