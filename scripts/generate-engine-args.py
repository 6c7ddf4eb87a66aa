"""Make scripts/vllm_launch/engine_args.json again from the pinned vLLM's own parser: ``generate-engine-args.py [OUT]``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

OUT = Path(__file__).with_name("vllm_launch") / "engine_args.json"
NUMBERS = {"int": "int", "float": "float", "human_readable_int": "human_int", "human_readable_int_or_auto": "human_int"}


def kind(action: argparse.Action) -> str:
    """What a value of this option is: flag, switch, int, float, human_int, json or str."""
    if isinstance(action, argparse.BooleanOptionalAction):
        return "switch"
    if action.nargs == 0:
        return "flag"
    todo, names = [action.type], set()
    while todo:  # vLLM wraps the real type in closures: optional_type(int), parse_type(json.loads)
        function: Any = todo.pop()
        names.add(getattr(function, "__name__", ""))
        todo += [
            cell.cell_contents for cell in getattr(function, "__closure__", None) or () if callable(cell.cell_contents)
        ]
    for name, word in NUMBERS.items():
        if name in names:
            return word
    return "json" if names & {"loads", "parse_dataclass"} else "str"


def option(action: argparse.Action) -> dict[str, Any]:
    """One row of the table; keys that say nothing are left out."""
    row: dict[str, Any] = {"dest": action.dest, "flags": list(action.option_strings), "kind": kind(action)}
    if action.nargs in {"+", "*", "?"}:
        row["nargs"] = action.nargs
    if type(action).__name__ == "_AppendAction":
        row["append"] = True
    if action.choices and row["kind"] == "str":
        row["choices"] = sorted(str(choice) for choice in action.choices)
    return row


def main(out: Path) -> None:
    """Write the table, one option a line, in the parser's own order."""
    os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")
    from vllm import __version__  # noqa: PLC0415
    from vllm.entrypoints.launchers.cli_args import make_arg_parser  # noqa: PLC0415
    from vllm.utils.argparse_utils import FlexibleArgumentParser  # noqa: PLC0415

    parser = make_arg_parser(FlexibleArgumentParser())
    rows = [option(action) for action in parser._actions if action.option_strings and action.dest != "help"]  # noqa: SLF001
    lines = ",\n".join(json.dumps(row) for row in rows)
    version = __version__.partition("+")[0]
    out.write_text(f'{{"vllm": "{version}", "made_by": "make generate", "options": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else OUT)
