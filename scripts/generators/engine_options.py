"""Generate scripts/vllm_launch/engine/options.json from the pinned vLLM's own parser: ``engine_options.py [OUT]``.

The table has the properties of an option that parsing, checking and writing it need. The names of vLLM's conversion
functions (vllm/engine/arg_utils.py:_compute_kwargs) tell the type. An unknown type stops the script.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any, get_args

OUT = Path(__file__).parents[1] / "vllm_launch/engine/options.json"
KINDS = {
    "human_readable_int_or_auto": "human_int_or_auto",
    "human_readable_int": "human_int",
    "parse_dataclass": "config",
    "union_dict_and_str": "json_or_str",
    "loads": "json",
    "float": "float",
    "int": "int",
    "str": "str",
}
LAMBDAS = {"device_ids": "device_ids"}
"""Kinds of options whose type is a lambda. All other lambdas are ``s.lower().replace("-", "_")``."""


def names_in(function: Any) -> set[str]:
    """Return the names of a type and of the functions in its closures: ``optional_type(parse_type(json.loads))``."""
    names = {getattr(function, "__name__", "str")}
    cells = getattr(function, "__closure__", None) or ()
    return names.union(*(names_in(cell.cell_contents) for cell in cells if callable(cell.cell_contents)))


def keys_in(function: Any) -> list[str]:
    """Return the keys of the JSON object that a type reads. vLLM binds its dataclass as a default argument."""
    for value in getattr(function, "__defaults__", None) or ():
        if dataclasses.is_dataclass(value):
            return [field.name for field in dataclasses.fields(value) if field.init]
    cells = (cell.cell_contents for cell in getattr(function, "__closure__", None) or ())
    return next((keys for cell in cells if callable(cell) and (keys := keys_in(cell))), [])


def kind(action: argparse.Action, names: set[str]) -> str:
    """Return the kind of this option: how vLLM reads its value."""
    if isinstance(action, argparse.BooleanOptionalAction):
        return "switch"
    if action.nargs == 0:
        return "flag"
    if type(action).__name__ == "LoRAParserAction":
        return "lora"
    if "<lambda>" in names:
        return LAMBDAS.get(action.dest, "backend")
    if action.type is None:
        return "str"
    return next(word for name, word in KINDS.items() if name in names)


def limits(config: Any, name: str) -> dict[str, Any]:
    """Return the limits of the field ``name`` of a config class (pydantic), as keys of a row."""
    keys = {"ge": "minimum", "gt": "minimum", "le": "maximum", "lt": "maximum"}
    row: dict[str, Any] = {}
    field = getattr(config, "__pydantic_fields__", {}).get(name)
    for limit in field.metadata if field else ():
        for attribute, key in keys.items():
            if (value := getattr(limit, attribute, None)) is not None:
                row[key] = value
                if attribute in {"gt", "lt"}:
                    row["above_minimum" if attribute == "gt" else "below_maximum"] = True
    return row


def names() -> dict[str, list[str]]:
    """Return the names in those of vLLM's registries that options refer to."""
    from vllm.config.speculative import SpeculativeMethod  # noqa: PLC0415, TID251
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory  # noqa: PLC0415, TID251
    from vllm.reasoning import ReasoningParserManager  # noqa: PLC0415, TID251
    from vllm.tool_parsers import ToolParserManager  # noqa: PLC0415, TID251
    from vllm.v1.attention.backends.registry import AttentionBackendEnum  # noqa: PLC0415, TID251

    return {
        "speculative_method": sorted(get_args(SpeculativeMethod)),
        "kv_connector": sorted(KVConnectorFactory._registry),  # noqa: SLF001
        "attention_backend": sorted(AttentionBackendEnum.__members__),
        "tool_call_parser": ToolParserManager.list_registered(),
        "reasoning_parser": ReasoningParserManager.list_registered(),
    }


def option(action: argparse.Action, config: Any) -> dict[str, Any]:
    """Return one row of the table, without keys that have their default."""
    names = names_in(action.type)
    row: dict[str, Any] = {"dest": action.dest, "flags": list(action.option_strings), "kind": kind(action, names)}
    if "_optional_type" in names:
        row["optional"] = True
    if action.nargs:
        row["nargs"] = action.nargs
    if isinstance(action, argparse._AppendAction):  # noqa: SLF001 - argparse has no public name for it
        row["append"] = True
    if choices := [choice for choice in action.choices or () if choice is not None]:
        row["choices"] = choices
    if row["kind"] == "config":
        row["keys"] = keys_in(action.type)
    if type(action.default) in {bool, int, float, str} and action.default != argparse.SUPPRESS:
        row["default"] = action.default
    return row | limits(config, action.dest)


def main(out: Path) -> None:
    """Write the table to ``out``: one option per line, in the parser's order."""
    os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")
    import vllm.config  # noqa: PLC0415, TID251
    from vllm import __version__  # noqa: PLC0415, TID251 - a development script; the import takes 15 s
    from vllm.config import SpeculativeConfig  # noqa: PLC0415, TID251
    from vllm.entrypoints.launchers.cli_args import make_arg_parser  # noqa: PLC0415, TID251
    from vllm.utils.argparse_utils import FlexibleArgumentParser  # noqa: PLC0415, TID251

    parser = make_arg_parser(FlexibleArgumentParser())
    groups = {action.dest: group.title for group in parser._action_groups for action in group._group_actions}  # noqa: SLF001
    rows = [
        option(action, getattr(vllm.config, groups.get(action.dest) or "", None))
        for action in parser._actions  # noqa: SLF001
        if action.option_strings and action.dest != "help"
    ]
    speculative = next(row for row in rows if row["dest"] == "speculative_config")  # vLLM types it as a dict
    speculative["keys"] = [field.name for field in dataclasses.fields(SpeculativeConfig) if field.init]
    lines = ",\n".join(json.dumps(row) for row in rows)
    version = __version__.partition("+")[0]
    head = {"vllm": version, "made_by": "scripts/generators/engine_options.py", "names": names()}
    out.write_text(f'{json.dumps(head)[:-1]}, "options": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else OUT)
