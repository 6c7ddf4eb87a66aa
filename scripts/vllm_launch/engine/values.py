"""Reads and checks the value of one option, from a word of the command line or from a config file."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TypeVar

from vllm_launch.engine.options import SECRETS, Option, nearest, options
from vllm_launch.engine.removed import REMOVED_FLAGS, REMOVED_KEYS
from vllm_launch.errors import UsageError

N = TypeVar("N", int, float)


def first_four(names: Sequence[str]) -> str:
    """Return the first four of ``names`` as text, and how many more there are."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")  # noqa: PLR2004 - fits a line


def parse_dotted_value(text: str) -> object:
    """Return the value of a dotted key: JSON, a number such as 80g, or else the text itself."""
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError):
        try:
            value = _human_int(text)
        except ValueError:
            value = text
    return value


def shortened(text: str) -> str:
    """Return at most 80 characters of ``text``."""
    return text if len(text) <= 80 else f"{text[:77]}…"  # noqa: PLR2004 - fits on a terminal line


class NotAllowedError(ValueError):
    """A value that vLLM does not accept.

    Its text continues a sentence after the value: "is not a whole number". ``remedy`` is what to do.
    """

    def __init__(self, problem: str, remedy: str) -> None:
        self.remedy = remedy
        super().__init__(problem)


def read_text(option: Option, text: str) -> object:  # noqa: PLR0911, PLR0912, C901 - one return for each kind
    """Return ``text`` converted to vLLM's type for ``option``.

    Raises:
        NotAllowedError: vLLM does not accept it.
        RecursionError: the JSON is nested too deeply.
    """
    if option.optional and text in {"", "None"}:
        return None
    match option.kind:
        case "int":
            return _checked_choice(option, _number(int, text, NOT_WHOLE))
        case "float":
            return _number(float, text, ("is not a number", "give one such as 0.9"))
        case "human_int_or_auto" if text.strip().lower() in {"-1", "auto"}:
            return -1
        case "human_int" | "human_int_or_auto":
            return _human_int(text)
        case "backend":
            return _checked_choice(option, text.lower().replace("-", "_"))
        case "device_ids":
            return [int(part) if part.isdecimal() else part for part in map(str.strip, text.split(","))]
        case "lora":
            return _lora(text)
        case "json":
            return _known_keys(option, _json(text))
        case "config":
            value = _json(_expand_numbers(text))
            if not isinstance(value, dict):
                raise NotAllowedError("is not a JSON object", OBJECT_REMEDY)
            return _known_keys(option, value)
        case "json_or_str" if re.fullmatch(r"\s*{.*}\s*", text, re.DOTALL):
            return _json(text)
        case _:
            return _checked_choice(option, text)


def _known_keys(option: Option, value: object) -> object:
    """Return ``value`` after a check of its top-level keys. vLLM checks nested keys itself."""
    for key in value if option.keys and isinstance(value, dict) else ():
        if key not in option.keys and not (option.kind == "json" and key.replace("-", "_") in option.keys):
            close = nearest(key, option.keys, f"known keys are {first_four(option.keys)}")
            remedy = REMOVED_KEYS.get(f"{option.dest}.{key}", close)
            raise NotAllowedError(f"has the key {key!r}, which vLLM does not know", remedy)
    return value


def _checked_choice(option: Option, value: str | float) -> str | float:
    if option.choices and value not in option.choices:
        known = [str(choice) for choice in option.choices]
        raise NotAllowedError("is not among the choices", f"give {', '.join(known)}")
    return value


NOT_WHOLE = ("is not a whole number", "give one such as 8")

JSON_REMEDY = """write JSON in single quotes, such as '{"key": 1}' or '["word"]'"""

OBJECT_REMEDY = """write an object in single quotes, such as '{"key": 1}'"""


def _number(convert: type[N], text: str, complaint: tuple[str, str]) -> N:
    try:
        return convert(text)
    except ValueError:
        raise NotAllowedError(*complaint) from None


def _human_int(text: str) -> int:
    """Return 8192, 25.6k (decimal) or 8K (binary) as an int, like vllm/utils/argparse_utils.py:human_readable_int."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMgGtT])", text.strip())
    if not match:
        return _number(int, text, ("is not a whole number", "give one such as 8192, 8k (8000) or 8K (8192)"))
    power = "kmgt".index(match[2].lower()) + 1
    if match[2].islower() and len(match[1]) < 300:  # noqa: PLR2004 - float's range, far above any size
        return int(float(match[1]) * 1000.0**power)
    complaint = (
        "has a decimal point, which vLLM allows only before a small letter (k, m, g, t: powers of 1000)",
        f"write the whole number, or {match[1]}{match[2].lower()} if you mean powers of 1000",
    )
    return _number(int, match[1], complaint) << 10 * power


def _expand_numbers(text: str) -> str:
    """Return JSON text in which numbers such as 80g are written out.

    Source: vllm/engine/arg_utils.py:_expand_json_human_readable_numbers.
    """
    parts = re.split(r'("(?:[^"\\]|\\.)*")', text)
    number = re.compile(r"\b\d+(?:\.\d+)?[kKmMgGtT]\b")
    parts[::2] = [number.sub(lambda match: str(_human_int(match[0])), part) for part in parts[::2]]
    return "".join(parts)


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError as error:
        if re.fullmatch(r"\w+=\w+(,\w+=\w+)*", text):  # earlier form of --limit-mm-per-prompt
            pairs = dict(pair.split("=") for pair in text.split(","))
            remedy = f"write '{json.dumps({key: parse_dotted_value(value) for key, value in pairs.items()})}'"
            raise NotAllowedError("is not JSON, which vLLM now requires", remedy) from None
        raise NotAllowedError(f"is not JSON: {error}", JSON_REMEDY) from None


def _lora(text: str) -> str:
    if "=" in text and "," not in text:
        return text
    value = _json(text) if text.lstrip().startswith("{") else None
    if not isinstance(value, dict) or not {"name", "path"} <= value.keys():
        raise NotAllowedError("does not name an adapter and its path", 'write NAME=PATH or {"name": …, "path": …}')
    return text


def find_option(name: str, where: str) -> Option:
    """Return the option for a key of a config file, spelt with dashes or underscores.

    Raises:
        UsageError: vLLM has no such option.
    """
    dest = name.replace("-", "_")
    flag = f"--{dest.replace('_', '-')}"
    if flag in REMOVED_FLAGS:
        raise UsageError(where, f"this version of vLLM no longer has {name}", REMOVED_FLAGS[flag])
    if dest not in options():
        dests = {
            flag.replace("-", "_").lstrip("_"): option.dest for option in options().values() for flag in option.flags
        }
        close = dests.get(dest.lstrip("_").casefold())
        remedy = f"did you mean {close}?" if close else nearest(dest, [*options(), "launch"])
        raise UsageError(where, f"vLLM has no option {name}", remedy)
    return options()[dest]


def validate_value(option: Option, value: object, where: str) -> object:
    """Return a config file's value as ``parse`` would read it from words. It is None only if vLLM accepts None.

    Text is read as on the command line ("8k", "auto"). JSON may be nested YAML instead of text.

    Raises:
        UsageError: the value has another type, or is not among the choices.
    """
    try:
        return _file_value(option, value)
    except (ValueError, RecursionError) as error:
        shown = "its value" if option.dest in SECRETS or value is None else shortened(_as_yaml(value))
        reason = error if isinstance(error, NotAllowedError) else NotAllowedError("is nested too deeply", "flatten it")
        raise UsageError(where, f"{option.dest}: {shown} {reason}", reason.remedy) from None


def _as_yaml(value: object) -> str:
    return repr(value) if isinstance(value, str) else json.dumps(value, default=str, skipkeys=True, ensure_ascii=False)


def _file_value(option: Option, value: object) -> object:
    if value is None:
        if not option.optional:
            raise NotAllowedError("is missing", "give a value, or leave the key out for vLLM's default")
        return None
    if option.kind in {"flag", "switch"} or (option.nargs == "?" and value is True):
        if not isinstance(value, bool):
            raise NotAllowedError("is neither true nor false", "write true or false without quotes")
        return value
    if option.nargs == "+" or option.append:
        return [_single_value(option, item) for item in (value if isinstance(value, list) else [value])]
    return _single_value(option, value)


def _single_value(option: Option, value: object) -> object:
    """Return one value, whose type YAML has already chosen.

    Raises:
        NotAllowedError: YAML read the text as another type. The remedy asks for quotes.
    """
    if isinstance(value, str):
        return read_text(option, value)
    if isinstance(value, (dict, list)):
        if option.kind == "device_ids" and isinstance(value, list):
            return read_text(option, ",".join(map(str, value)))
        return (
            read_text(option, _to_json(value))
            if option.kind in {"json", "json_or_str", "config", "lora"}
            else _wrong_type(option, value)
        )
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return _wrong_type(option, value)
    if isinstance(value, float) and option.kind != "float":
        return _wrong_type(option, value)  # its text may differ from the file: 1.10 would become 1.1
    return read_text(option, str(value))


def _to_json(value: object) -> str:
    try:
        return json.dumps(value)
    except TypeError:
        raise NotAllowedError(
            "contains a value that JSON does not have (a date?)", "put that value in quotes"
        ) from None


def _wrong_type(option: Option, value: object) -> object:
    if option.kind in {"int", "human_int", "human_int_or_auto"}:
        raise NotAllowedError(*NOT_WHOLE)
    if option.kind == "float":
        raise NotAllowedError("is not a number", "give one such as 0.9")
    if isinstance(value, (dict, list)):
        raise NotAllowedError("is not text", "give one word")
    raise NotAllowedError("is not text", "put it in quotes")
