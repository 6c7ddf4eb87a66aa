"""vLLM's own flags: which there are, what a user's words mean, how a value is spelt. The one place that knows them.

``options.json`` is made from the pinned vLLM's parser (scripts/generators/engine_options.py), so a light install, which
has no vLLM to ask, still refuses a misspelt flag and says the right one. Words are read as vLLM reads them
(vllm/utils/argparse_utils.py:FlexibleArgumentParser), but a flag given twice, which vLLM lets win silently, is refused.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NoReturn, TypeVar

import msgspec

from vllm_launch.engine.removed import REMOVED_FLAGS, REMOVED_KEYS
from vllm_launch.errors import UsageError

N = TypeVar("N", int, float)

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


def _flags() -> list[str]:
    return [flag for option in options().values() for flag in option.flags]


# ---- words → values


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
        if flag in _flags():
            raise UsageError(flag, "stands behind a --, after which nothing is a flag", "leave the -- out")
        if word.startswith("-") and word != "--":
            raise UsageError(flag, "vLLM has no such flag", nearest(flag, _flags()))
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
            what = f"is short for several flags: {_few(ambiguous[2].split(', '))}" if ambiguous else "cannot be read"
            raise UsageError(ambiguous[1] if ambiguous else "command line", what, "write the flag in full")
        flag = argument[1].split("/")[-1]
        if "ignored explicit" in argument[2]:
            flag = argument[1].split("/")[0]
            raise UsageError(flag, "takes no value", f"write {flag} alone, or leave it out")
        raise UsageError(
            flag, "its value is missing", f"write {flag}=VALUE (a value may not begin with a dash otherwise)"
        )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")  # noqa: PLR2004 - on a line


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
        value = text.split(",") if flag.endswith("+") else _guess(text)
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


def _guess(text: str) -> object:
    """A dotted key's value: JSON, a number such as 80g, or else the text itself."""
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError):
        try:
            value = _human_int(text)
        except ValueError:
            value = text
    return value


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
            return [_read(option, text) for text in given]
        return _read(option, str(given))
    except (ValueError, RecursionError) as error:
        words = " ".join(given) if isinstance(given, list) else str(given)
        shown = "the value" if option.dest in SECRETS else repr(_short(words))
        reason = error if isinstance(error, _NotAllowedError) else _NotAllowedError("is nested too deep", "flatten it")
        raise UsageError(where, f"{shown} {reason}", reason.remedy) from None


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}…"  # noqa: PLR2004 - a line of a terminal


class _NotAllowedError(ValueError):
    """Its text follows the value in a sentence: "is not a whole number"; ``remedy`` is what to do about it."""

    def __init__(self, what: str, remedy: str) -> None:
        self.remedy = remedy
        super().__init__(what)


def _read(option: Option, text: str) -> object:  # noqa: PLR0911, PLR0912, C901 - one return a kind
    if option.optional and text in {"", "None"}:
        return None
    match option.kind:
        case "int":
            return _chosen(option, _number(int, text, WHOLE))
        case "float":
            return _number(float, text, ("is not a number", "give one such as 0.9"))
        case "human_int_or_auto" if text.strip().lower() in {"-1", "auto"}:
            return -1
        case "human_int" | "human_int_or_auto":
            return _human_int(text)
        case "backend":
            return _chosen(option, text.lower().replace("-", "_"))
        case "device_ids":
            return [int(part) if part.isdecimal() else part for part in map(str.strip, text.split(","))]
        case "lora":
            return _lora(text)
        case "json":
            return _known_keys(option, _json(text))
        case "config":
            value = _json(_expanded(text))
            if not isinstance(value, dict):
                raise _NotAllowedError("is not a JSON object", OBJECT)
            return _known_keys(option, value)
        case "json_or_str" if re.fullmatch(r"\s*{.*}\s*", text, re.DOTALL):
            return _json(text)
        case _:
            return _chosen(option, text)


def _known_keys(option: Option, value: object) -> object:
    """``value``, whose keys on the first level vLLM knows; what is nested further is left to vLLM."""
    for key in value if option.keys and isinstance(value, dict) else ():
        if key not in option.keys and not (option.kind == "json" and key.replace("-", "_") in option.keys):
            close = nearest(key, option.keys, f"known are {_few(option.keys)}")
            remedy = REMOVED_KEYS.get(f"{option.dest}.{key}", close)
            raise _NotAllowedError(f"has the key {key!r}, which vLLM does not know", remedy)
    return value


def _chosen(option: Option, value: str | float) -> str | float:
    if option.choices and value not in option.choices:
        known = [str(choice) for choice in option.choices]
        raise _NotAllowedError("is not among the choices", f"give {', '.join(known)}")
    return value


WHOLE = ("is not a whole number", "give one such as 8")
JSON = """write JSON in single quotes, such as '{"key": 1}' or '["word"]'"""
OBJECT = """write an object in single quotes, such as '{"key": 1}'"""


def _number(convert: type[N], text: str, complaint: tuple[str, str]) -> N:
    try:
        return convert(text)
    except ValueError:
        raise _NotAllowedError(*complaint) from None


def _human_int(text: str) -> int:
    """8192, 25.6k (decimal) or 8K (binary), as vllm/utils/argparse_utils.py:human_readable_int."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMgGtT])", text.strip())
    if not match:
        return _number(int, text, ("is not a whole number", "give one such as 8192, 8k (8000) or 8K (8192)"))
    power = "kmgt".index(match[2].lower()) + 1
    if match[2].islower() and len(match[1]) < 300:  # noqa: PLR2004 - a float's range, far beyond any size
        return int(float(match[1]) * 1000.0**power)
    complaint = (
        f"has a decimal point before the binary {match[2]}",
        f"write {match[1]}{match[2].lower()}, or all digits",
    )
    return _number(int, match[1], complaint) << 10 * power


def _expanded(text: str) -> str:
    """JSON whose bare numbers may be 80g, as vllm/engine/arg_utils.py:_expand_json_human_readable_numbers."""
    parts = re.split(r'("(?:[^"\\]|\\.)*")', text)
    number = re.compile(r"\b\d+(?:\.\d+)?[kKmMgGtT]\b")
    parts[::2] = [number.sub(lambda found: str(_human_int(found[0])), part) for part in parts[::2]]
    return "".join(parts)


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError as error:
        if re.fullmatch(r"\w+=\w+(,\w+=\w+)*", text):  # as --limit-mm-per-prompt once was
            pairs = dict(pair.split("=") for pair in text.split(","))
            remedy = f"write '{json.dumps({key: _guess(value) for key, value in pairs.items()})}'"
            raise _NotAllowedError("is not JSON, which vLLM wants now", remedy) from None
        raise _NotAllowedError(f"is not JSON: {error}", JSON) from None


def _lora(text: str) -> str:
    if "=" in text and "," not in text:
        return text
    value = _json(text) if text.lstrip().startswith("{") else None
    if not isinstance(value, dict) or not {"name", "path"} <= value.keys():
        raise _NotAllowedError("names no adapter and its place", 'write NAME=PATH or {"name": …, "path": …}')
    return text


# ---- a config file's values


def option_of(name: str, where: str) -> Option:
    """The option of a config file's key, with dashes or underscores.

    Raises:
        UsageError: vLLM has no such option.
    """
    dest = name.replace("-", "_")
    flag = f"--{dest.replace('_', '-')}"
    if flag in REMOVED_FLAGS:
        raise UsageError(where, f"this vLLM does not have {name} any more", REMOVED_FLAGS[flag])
    if dest not in options():
        spelt = {
            flag.replace("-", "_").lstrip("_"): option.dest for option in options().values() for flag in option.flags
        }
        close = spelt.get(dest.lstrip("_").casefold())
        remedy = f"did you mean {close}?" if close else nearest(dest, [*options(), "launch"])
        raise UsageError(where, f"vLLM has no option {name}", remedy)
    return options()[dest]


def validate_value(option: Option, value: object, where: str) -> object:
    """A config file's value as ``parse`` would have read it from words; None only where vLLM takes None.

    Text is read as on the command line ("8k", "auto"); JSON may be nested YAML instead of text.

    Raises:
        UsageError: a value of another type, or not among the choices.
    """
    try:
        return _given(option, value)
    except (ValueError, RecursionError) as error:
        shown = "its value" if option.dest in SECRETS or value is None else _short(_as_yaml(value))
        reason = error if isinstance(error, _NotAllowedError) else _NotAllowedError("is nested too deep", "flatten it")
        raise UsageError(where, f"{option.dest}: {shown} {reason}", reason.remedy) from None


def _as_yaml(value: object) -> str:
    return repr(value) if isinstance(value, str) else json.dumps(value, default=str, skipkeys=True, ensure_ascii=False)


def _given(option: Option, value: object) -> object:
    if value is None:
        if not option.optional:
            raise _NotAllowedError("is missing", "give one, or leave the key out for vLLM's default")
        return None
    if option.kind in {"flag", "switch"} or (option.nargs == "?" and value is True):
        if not isinstance(value, bool):
            raise _NotAllowedError("is neither true nor false", "write true or false without quotes")
        return value
    if option.nargs == "+" or option.append:
        return [_one(option, item) for item in (value if isinstance(value, list) else [value])]
    return _one(option, value)


def _one(option: Option, value: object) -> object:
    """A single value; YAML has already read numbers, and what it took for something else is asked for in quotes."""
    if isinstance(value, str):
        return _read(option, value)
    if isinstance(value, (dict, list)):
        if option.kind == "device_ids" and isinstance(value, list):
            return _read(option, ",".join(map(str, value)))
        return (
            _read(option, _dumped(value))
            if option.kind in {"json", "json_or_str", "config", "lora"}
            else _no(option, value)
        )
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return _no(option, value)
    if isinstance(value, float) and option.kind != "float":
        return _no(option, value)  # as text it might not be what stands in the file: 1.10 would become 1.1
    return _read(option, str(value))


def _dumped(value: object) -> str:
    try:
        return json.dumps(value)
    except TypeError:
        raise _NotAllowedError("holds what JSON cannot say (a date?)", "put that in quotes") from None


def _no(option: Option, value: object) -> object:
    if option.kind in {"int", "human_int", "human_int_or_auto"}:
        raise _NotAllowedError(*WHOLE)
    if option.kind == "float":
        raise _NotAllowedError("is not a number", "give one such as 0.9")
    if isinstance(value, (dict, list)):
        raise _NotAllowedError("is not text", "give one word")
    raise _NotAllowedError("is not text", "put it in quotes")


# ---- values → words


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


def redacted(values: Mapping[str, object]) -> dict[str, object]:
    """``values`` with those of ``SECRETS`` as "***", for logs and reports."""
    return {dest: "***" if dest in SECRETS and value else value for dest, value in values.items()}
