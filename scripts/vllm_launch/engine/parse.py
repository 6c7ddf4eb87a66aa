"""Parses the words after ``vllm serve`` as vLLM does (vllm/utils/argparse_utils.py:FlexibleArgumentParser).

One difference: it refuses a flag that is given twice. vLLM uses the last value without a warning.
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
from vllm_launch.engine.values import NotAllowedError, first_four, parse_dotted_value, read_text, shortened
from vllm_launch.errors import UsageError


def parse(argv: Sequence[str]) -> dict[str, object]:
    """Return the values that the words after ``vllm serve`` set, by dest.

    The model, positional or ``--model``, is "model". Unlike in vLLM, it may stand at any position.

    Raises:
        UsageError: a flag that vLLM does not have (the text names the closest flag), a value that vLLM does not accept,
            a flag or a model that is given twice, a word that is not part of any option. The text contains no values
            of ``SECRETS``.
    """
    namespace, rest = _parser().parse_known_args(_normalized(argv), argparse.Namespace(occurrences=[]))
    values: dict[str, object] = {}
    for option, flag, value in namespace.occurrences:
        if option.append:
            earlier = values.get(option.dest, [])
            assert isinstance(earlier, list)  # noqa: S101 - the next line makes it a list
            values[option.dest] = [*earlier, value]
            continue
        if option.dest in values:
            problem = "is given twice, perhaps under another spelling, and vLLM would use only the last"
            raise UsageError(flag, problem, "keep one")
        values[option.dest] = _typed(option, flag, value)
    _take_model(values, rest)
    return values


def _take_model(values: dict[str, object], rest: Sequence[str]) -> None:
    """Take the model from ``rest``, the words that belong to no flag. Refuse all others."""
    for word in rest:
        flag = word.partition("=")[0]
        if flag in flags():
            raise UsageError(flag, "comes after --, where vLLM reads no flags", "remove the --")
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
        problem = f"{shown} is neither the value of a flag nor the model"
        raise UsageError("command line", problem, "remove it, or put quotes around a value with spaces")
    if values.get("model") == "":
        raise UsageError("command line", "the model's name is empty", "give a folder or a name on the hub")


class _Record(argparse.Action):
    """Records each occurrence of an option. ``parse`` interprets them afterwards."""

    option: Option

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: object, flag: str | None = None
    ) -> None:
        """Append (option, flag, value) to ``occurrences``. For flags and switches the value is a bool."""
        del parser
        if self.nargs == 0:
            values = not (flag or "").startswith("--no-")
        namespace.occurrences.append((self.option, flag, values))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        argument = re.match(r"argument (\S+): (.*)", message, re.DOTALL)
        if argument is None:
            ambiguous = re.match(r"ambiguous option: (\S+?)(?:=.*)? could match (.*)", message, re.DOTALL)
            problem = (
                f"is short for several flags: {first_four(ambiguous[2].split(', '))}" if ambiguous else "cannot be read"
            )
            raise UsageError(ambiguous[1] if ambiguous else "command line", problem, "write the flag in full")
        flag = argument[1].split("/")[-1]
        if "ignored explicit" in argument[2]:
            flag = argument[1].split("/")[0]
            raise UsageError(flag, "takes no value", f"write {flag} alone, or remove it")
        raise UsageError(
            flag, "its value is missing", f"write {flag}=VALUE (a value that begins with a dash needs the =)"
        )


@functools.cache
def _parser() -> _Parser:
    """Return a parser built like vLLM's, with abbreviations but without the positional model.

    In Python 3.11 a positional argument would have to come first.
    """
    parser = _Parser(add_help=False, prog="vllm-launch serve")
    for option in options().values():
        nargs = 0 if option.kind in {"flag", "switch"} else option.nargs
        const = True if nargs == "?" else None
        action = parser.add_argument(*option.flags, dest=option.dest, action=_Record, nargs=nargs, const=const)
        assert isinstance(action, _Record)  # noqa: S101 - add_argument returns an instance of action=
        action.option = option
    return parser


def _normalized(argv: Sequence[str]) -> list[str]:
    """Return the words for argparse: dashes for underscores, -O3 as --optimization-level, dotted keys as JSON."""
    dashed = list(_dashed(argv))
    normalized: list[str] = []
    dotted: dict[str, dict[str, object]] = {}
    words = iter(dashed)
    for word in words:
        flag, equals, text = word.partition("=")
        if word.startswith("--") and flag in REMOVED_FLAGS:
            raise UsageError(flag, "this version of vLLM no longer has it", REMOVED_FLAGS[flag])
        if not flag.startswith("-") or "." not in flag:
            normalized.append(word)
            continue
        if re.fullmatch(r"-\d*\.\d+", word):
            problem = "vLLM would take it for a flag with a dotted key, such as --compilation-config.mode"
            before = normalized[-1] if normalized else ""
            of = before if before.startswith("--") and "=" not in before else "--flag"
            raise UsageError(f"the value {word}", problem, f"write {of}={word}")
        if not equals:
            text = next(words, "")
        if not equals and not text:
            raise UsageError(flag, "its value is missing", f"write {flag}=VALUE")
        head, *keys = flag.removesuffix("+").split(".")
        value = text.split(",") if flag.endswith("+") else parse_dotted_value(text)
        _merge(dotted.setdefault(head, {}), keys, value, flag)
    for head, value in dotted.items():
        normalized += [head, json.dumps(value)]
    return normalized


def _dashed(argv: Sequence[str]) -> Iterable[str]:
    for index, word in enumerate(argv):
        if word.startswith("--"):
            flag, equals, text = word.partition("=")
            name, dot, keys = flag.partition(".")
            yield name.replace("_", "-") + dot + keys + equals + text
        elif word.startswith("-O") and word != "-O":
            yield "--optimization-level"
            yield word[3:] if word[2] == "=" else word[2:]
        elif word == "-O" and argv[index + 1 : index + 2] and argv[index + 1] in {"0", "1", "2", "3"}:
            yield "--optimization-level"
        else:
            yield word


def _merge(target: dict[str, object], keys: Sequence[str], value: object, flag: str) -> None:
    *path, last = keys
    for key in path:
        nested = target.setdefault(key, {})
        if not isinstance(nested, dict):
            raise UsageError(flag, f"{key} has both a value and nested keys", "keep one of them")
        target = nested
    earlier = target.get(last)
    if isinstance(earlier, list) and isinstance(value, list):
        earlier += value
    elif last in target:
        raise UsageError(flag, "is given twice, and vLLM would use the last", "keep one")
    else:
        target[last] = value


def _typed(option: Option, where: str, value: object) -> object:
    """Return ``value``, which argparse read, converted to vLLM's type for ``option``.

    Raises:
        UsageError: vLLM does not accept the value.
    """
    if isinstance(value, bool):
        return value
    try:
        if isinstance(value, list):
            return [read_text(option, text) for text in value]
        return read_text(option, str(value))
    except (ValueError, RecursionError) as error:
        words = " ".join(value) if isinstance(value, list) else str(value)
        shown = "the value" if option.dest in SECRETS else repr(shortened(words))
        reason = error if isinstance(error, NotAllowedError) else NotAllowedError("is nested too deeply", "flatten it")
        raise UsageError(where, f"{shown} {reason}", reason.remedy) from None
