"""config.yaml as a mapping that still knows its lines. Reads the one file that it is given; knows no setting."""

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
"""Characters of a config file or a file of keys; /dev/zero has more."""


class ConfigFile(msgspec.Struct, frozen=True):
    """``values`` by the file's own keys; ``lines`` has the line of each key by its path, counted from 1."""

    path: str
    values: Mapping[str, object]
    lines: Mapping[tuple[str, ...], int]

    def where(self, key: tuple[str, ...]) -> str:
        """A key's place for an error: "config.yaml line 3"."""
        return f"{self.path} line {self.lines[key]}"


class _Loader(yaml.SafeLoader):
    """YAML without aliases, of which a few lines unfold to gigabytes, and without tags, which make odd values."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]  # untyped in types-PyYAML
        if isinstance(event, yaml.AliasEvent):
            raise _marked(f"aliases (*{event.anchor}) are not taken", "write the value out", event)
        if event.tag is not None and event.tag != "!":
            raise _marked(f"tags ({event.tag}) are not taken", "leave the tag out", event)
        return super().compose_node(parent, index)


def read_text(path: Path) -> str:
    """A file's text as UTF-8, with or without a byte order mark.

    Raises:
        OSError: it cannot be read, or is far too large for what a person writes.
        ValueError: it is not UTF-8.
    """
    with path.open(encoding="utf-8-sig") as file:
        text = file.read(LARGEST_TEXT + 1)
    if len(text) > LARGEST_TEXT:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    return text


def text_of(path: str, where: str, remedy: str, read_file: Callable[[Path], str] | None = None) -> str:
    """A file's text.

    Raises:
        UsageError: it cannot be read; with ``where`` and ``remedy``.
    """
    try:
        return (read_file or read_text)(Path(path))
    except OSError as error:
        raise UsageError(where, f"cannot be read: {error.strerror or error}", remedy) from None
    except ValueError:  # UnicodeDecodeError is one, and what open() says of a NUL in a name
        raise UsageError(where, "is not a file of UTF-8 text", remedy) from None


def read(path: str, read_file: Callable[[Path], str] | None = None) -> ConfigFile:
    """The config file at ``path``; an empty one has no values.

    Raises:
        UsageError: it cannot be read, is not YAML, not a mapping, says a key twice, or uses aliases or tags.
    """
    text = text_of(path, path, "name a YAML file with --config or LAUNCH_CONFIG", read_file)
    lines: dict[tuple[str, ...], int] = {}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None or node.tag == "tag:yaml.org,2002:null":
            return ConfigFile(path, {}, {})
        if not isinstance(node, yaml.MappingNode):
            raise UsageError(path, "is not a mapping of options", "write one `option: value` a line")
        _note(node, (), lines)
        values = {key.value: loader.construct_object(value, deep=True) for key, value in node.value}
    except yaml.MarkedYAMLError as error:
        place = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        remedy = error.note or ("indent with spaces" if "\\t" in (error.problem or "") else "mend the line")
        raise UsageError(f"{path}{place}", error.problem or "is not YAML", remedy) from None
    except (yaml.YAMLError, ValueError) as error:
        raise UsageError(path, f"is not YAML: {str(error).splitlines()[0]}", "mend the file") from None
    except RecursionError:
        raise UsageError(path, "is nested too deep", "mend the file") from None
    return ConfigFile(path, values, lines)


def _note(node: yaml.Node, above: tuple[str, ...], lines: dict[tuple[str, ...], int]) -> None:
    """Write down the line of every key; a key must be plain text and stand once, and text must be Unicode."""
    if isinstance(node, yaml.ScalarNode) and any("\ud800" <= letter <= "\udfff" for letter in node.value):
        raise _marked("text has half of a surrogate pair", "write the character itself", node)
    if isinstance(node, yaml.SequenceNode):
        for place, item in enumerate(node.value):
            _note(item, (*above, f"[{place}]"), lines)
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
            raise _marked("a key is not plain text", "write `option: value`", key)
        name = (*above, key.value)
        if name in lines:
            problem = f"{key.value} is set a second time (first on line {lines[name]})"
            raise _marked(problem, "keep one", key)
        lines[name] = key.start_mark.line + 1
        _note(key, name, lines)
        _note(value, name, lines)


def _marked(problem: str, remedy: str, at: yaml.Node | yaml.Event) -> yaml.MarkedYAMLError:
    mark: Any = at.start_mark  # a Mark of PyYAML's or of its C library's: types-PyYAML cannot say which fits
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark, note=remedy)
