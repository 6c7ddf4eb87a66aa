"""Reads the words after ``vllm serve`` as vLLM does (vllm/utils/argparse_utils.py:FlexibleArgumentParser).

One difference: a flag that is given twice is refused. vLLM would take the last one without a word.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
from collections.abc import Iterable, Sequence
from typing import NoReturn

from vllm_launch.engine.options import SECRETS, Option, flags, nearest, options
from vllm_launch.engine.removed import REMOVED_FLAGS
from vllm_launch.engine.values import NotAllowedError, few, guess, read_text, shortened
from vllm_launch.errors import UsageError


def parse(argv: Sequence[str]) -> dict[str, object]:
    """What the words after ``vllm serve`` set, by dest; the model, positional or ``--model``, as "model".

    Unlike vLLM, the model may stand anywhere.

    Raises:
        UsageError: a flag that vLLM does not have (the nearest is named), a value that it cannot take, a flag or a
            model given twice, a word that belongs to nothing. Values of ``SECRETS`` are not in the text.
    """
    found, rest = _parser().parse_known_args(_plain(argv), argparse.Namespace(said=[]))
    values: dict[str, object] = {}
    for option, flag, given in found.said:
        if option.append:
            earlier = values.get(option.dest, [])
            assert isinstance(earlier, list)  # noqa: S101 - by the line below
            values[option.dest] = [*earlier, given]
            continue
        if option.dest in values:
            raise UsageError(
                flag, "is given twice (with its other spellings), and vLLM would take the last", "keep one"
            )
        values[option.dest] = _value(option, flag, given)
    _take_model(values, rest)
    return values


def _take_model(values: dict[str, object], rest: Sequence[str]) -> None:
    """The words that belong to no flag: at most the model."""
    for word in rest:
        flag = word.partition("=")[0]
        if flag in flags():
            raise UsageError(flag, "stands behind a --, after which nothing is a flag", "leave the -- out")
        if word.startswith("-") and word != "--":
            raise UsageError(flag, "vLLM has no such flag", nearest(flag, flags()))
    words = [word for word in rest if word != "--"]
    if "model" in values:
        words = [word for word in words if word != values["model"]]
        extra = words
    else:
        extra = words[1:]
        if words:
            values["model"] = words[0]
    if extra:
        shown = "a word" if SECRETS & values.keys() else repr(extra[0])
        what = f"{shown} belongs to no flag and is not the model"
        raise UsageError("command line", what, "leave it out, or put quotes around a value with spaces")
    if values.get("model") == "":
        raise UsageError("command line", "the model's name is empty", "give a folder or a name on the hub")


class _Say(argparse.Action):
    """Keeps every option as it was said; what it means is decided afterwards."""

    option: Option

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: object, flag: str | None = None
    ) -> None:
        """Append (option, flag, value) to ``said``; for flags and switches the value is a bool."""
        del parser
        if self.nargs == 0:
            values = not (flag or "").startswith("--no-")
        namespace.said.append((self.option, flag, values))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        argument = re.match(r"argument (\S+): (.*)", message, re.DOTALL)
        if argument is None:
            ambiguous = re.match(r"ambiguous option: (\S+?)(?:=.*)? could match (.*)", message, re.DOTALL)
            what = f"is short for several flags: {few(ambiguous[2].split(', '))}" if ambiguous else "cannot be read"
            raise UsageError(ambiguous[1] if ambiguous else "command line", what, "write the flag in full")
        flag = argument[1].split("/")[-1]
        if "ignored explicit" in argument[2]:
            flag = argument[1].split("/")[0]
            raise UsageError(flag, "takes no value", f"write {flag} alone, or leave it out")
        raise UsageError(
            flag, "its value is missing", f"write {flag}=VALUE (a value may not begin with a dash otherwise)"
        )


@functools.cache
def _parser() -> _Parser:
    """As vLLM builds its own, abbreviations included; without its positional, which must come first in Python 3.11."""
    parser = _Parser(add_help=False, prog="vllm-launch serve")
    for option in options().values():
        nargs = 0 if option.kind in {"flag", "switch"} else option.nargs
        const = True if nargs == "?" else None
        action = parser.add_argument(*option.flags, dest=option.dest, action=_Say, nargs=nargs, const=const)
        assert isinstance(action, _Say)  # noqa: S101 - what add_argument was told to make
        action.option = option
    return parser


def _plain(argv: Sequence[str]) -> list[str]:
    """Words for argparse: dashes for underscores, -O3 as --optimization-level, dotted keys gathered into JSON."""
    dashed = list(_dashed(argv))
    plain: list[str] = []
    dotted: dict[str, dict[str, object]] = {}
    words = iter(dashed)
    for word in words:
        flag, equals, text = word.partition("=")
        if word.startswith("--") and flag in REMOVED_FLAGS:
            raise UsageError(flag, "this vLLM does not have it any more", REMOVED_FLAGS[flag])
        if not flag.startswith("-") or "." not in flag:
            plain.append(word)
            continue
        if re.fullmatch(r"-\d*\.\d+", word):
            raise UsageError(f"the value {word}", "vLLM would take it for a key of a JSON flag", "write --flag=VALUE")
        if not equals:
            text = next(words, "")
        if not equals and not text:
            raise UsageError(flag, "its value is missing", f"write {flag}=VALUE")
        head, *keys = flag.removesuffix("+").split(".")
        value = text.split(",") if flag.endswith("+") else guess(text)
        _merge(dotted.setdefault(head, {}), keys, value, flag)
    for head, value in dotted.items():
        plain += [head, json.dumps(value)]
    return plain


def _dashed(argv: Sequence[str]) -> Iterable[str]:
    for place, word in enumerate(argv):
        if word.startswith("--"):
            flag, equals, text = word.partition("=")
            name, dot, keys = flag.partition(".")
            yield name.replace("_", "-") + dot + keys + equals + text
        elif word.startswith("-O") and word != "-O":
            yield "--optimization-level"
            yield word[3:] if word[2] == "=" else word[2:]
        elif word == "-O" and argv[place + 1 : place + 2] and argv[place + 1] in {"0", "1", "2", "3"}:
            yield "--optimization-level"
        else:
            yield word


def _merge(into: dict[str, object], keys: Sequence[str], value: object, flag: str) -> None:
    *path, last = keys
    for key in path:
        below = into.setdefault(key, {})
        if not isinstance(below, dict):
            raise UsageError(flag, f"{key} is given a value and keys below it", "keep one of them")
        into = below
    earlier = into.get(last)
    if isinstance(earlier, list) and isinstance(value, list):
        earlier += value
    elif last in into:
        raise UsageError(flag, "is given twice, and vLLM would take the last", "keep one")
    else:
        into[last] = value


def _value(option: Option, where: str, given: object) -> object:
    """What argparse found, as vLLM's types read it."""
    if isinstance(given, bool):
        return given
    try:
        if isinstance(given, list):
            return [read_text(option, text) for text in given]
        return read_text(option, str(given))
    except (ValueError, RecursionError) as error:
        words = " ".join(given) if isinstance(given, list) else str(given)
        shown = "the value" if option.dest in SECRETS else repr(shortened(words))
        reason = error if isinstance(error, NotAllowedError) else NotAllowedError("is nested too deep", "flatten it")
        raise UsageError(where, f"{shown} {reason}", reason.remedy) from None
