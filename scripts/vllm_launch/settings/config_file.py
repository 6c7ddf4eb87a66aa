"""Reads config.yaml as a mapping with the line of each key. Reads one file; does not know the settings' names."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import yaml

from vllm_launch.errors import UsageError

LARGEST_TEXT = 1 << 24
"""Largest number of characters in a config file or a file of keys. Stops the reading of a file such as /dev/zero."""


class ConfigFile(msgspec.Struct, frozen=True):
    """One config file. ``values``: by its keys. ``lines``: the line of each key by the key's path, counted from 1."""

    path: str
    values: Mapping[str, object]
    lines: Mapping[tuple[str, ...], int]

    def where(self, key: tuple[str, ...]) -> str:
        """Return a key's place for an error, such as "config.yaml line 3"."""
        return f"{self.path} line {self.lines[key]}"


class _Loader(yaml.SafeLoader):
    """A YAML loader that refuses aliases and tags. A few aliases can expand to gigabytes. Tags create other types."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]  # untyped in types-PyYAML
        if isinstance(event, yaml.AliasEvent):
            raise _error_at(event, f"aliases (*{event.anchor}) are not supported", "repeat the value itself")
        if event.tag is not None and event.tag != "!":
            raise _error_at(event, f"tags ({event.tag}) are not supported", "remove the tag")
        return super().compose_node(parent, index)


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file, with or without a byte order mark.

    Raises:
        OSError: the file cannot be read, or has more than ``LARGEST_TEXT`` characters.
        ValueError: the file is not UTF-8.
    """
    with path.open(encoding="utf-8-sig") as file:
        text = file.read(LARGEST_TEXT + 1)
    if len(text) > LARGEST_TEXT:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    return text


def text_of(path: str, where: str, remedy: str, read_file: Callable[[Path], str] | None = None) -> str:
    """Return a file's text.

    Raises:
        UsageError: the file cannot be read. The error shows ``where`` and ``remedy``.
    """
    try:
        return (read_file or read_text)(Path(path))
    except OSError as error:
        raise UsageError(where, f"cannot be read: {error.strerror or error}", remedy) from None
    except ValueError:  # a UnicodeDecodeError, or open()'s error for a NUL in the name
        raise UsageError(where, "is not UTF-8 text", remedy) from None


def read(path: str, read_file: Callable[[Path], str] | None = None) -> ConfigFile:
    """Return the config file at ``path``. An empty file has no values.

    Raises:
        UsageError: the file cannot be read, is not YAML, is not a mapping, has a key twice, or has aliases or tags.
    """
    text = text_of(path, path, "give an existing YAML file with --config or LAUNCH_CONFIG", read_file)
    lines: dict[tuple[str, ...], int] = {}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None or node.tag == "tag:yaml.org,2002:null":
            return ConfigFile(path, {}, {})
        if not isinstance(node, yaml.MappingNode):
            raise UsageError(path, "is not a mapping of options", "write one `option: value` per line")
        _record_lines(node, (), lines)
        values = {key.value: loader.construct_object(value, deep=True) for key, value in node.value}
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        remedy = error.note or ("indent with spaces" if "\\t" in (error.problem or "") else "correct the line")
        raise UsageError(f"{path}{line}", error.problem or "is not YAML", remedy) from None
    except (yaml.YAMLError, ValueError) as error:
        raise UsageError(path, f"is not YAML: {str(error).splitlines()[0]}", "correct the file") from None
    except RecursionError:
        raise UsageError(path, "is nested too deep", "flatten it") from None
    return ConfigFile(path, values, lines)


def _record_lines(node: yaml.Node, parents: tuple[str, ...], lines: dict[tuple[str, ...], int]) -> None:
    """Store the line of every key in ``lines``. ``parents``: the path of ``node``.

    Raises:
        yaml.MarkedYAMLError: a key is not plain text or appears twice, or a text is not valid Unicode.
    """
    if isinstance(node, yaml.ScalarNode) and any("\ud800" <= char <= "\udfff" for char in node.value):
        raise _error_at(node, "the text contains half of a surrogate pair", "write the character itself")
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _record_lines(item, (*parents, f"[{index}]"), lines)
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
            raise _error_at(key, "a key is not plain text", "write `option: value`")
        key_path = (*parents, key.value)
        if key_path in lines:
            problem = f"{key.value} is set a second time (first on line {lines[key_path]})"
            raise _error_at(key, problem, "keep one")
        lines[key_path] = key.start_mark.line + 1
        _record_lines(key, key_path, lines)
        _record_lines(value, key_path, lines)


def _error_at(place: yaml.Node | yaml.Event, problem: str, remedy: str) -> yaml.MarkedYAMLError:
    mark: Any = place.start_mark  # PyYAML's Mark or its C library's: types-PyYAML does not say which
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark, note=remedy)
