#!/usr/bin/env python3
"""Draw docs/plan.svg, the README's picture: the output of `vllm-launch plan` for a public model on a known machine."""

from __future__ import annotations

import html
import re
import sys
from pathlib import Path

import msgspec

from vllm_launch.decide import plan_request
from vllm_launch.machine.catalogue import parse_hardware_name
from vllm_launch.model.read import read_model
from vllm_launch.plan.plan import plan
from vllm_launch.report import plan_table as report
from vllm_launch.serve import command
from vllm_launch.settings.flags import parse_flags
from vllm_launch.settings.read import read_settings

ROOT = Path(__file__).parents[2]
MODEL, MACHINE = "meta-llama/Meta-Llama-3-70B", "H100:8"
COLUMNS, LINE, CHARACTER = 104, 18, 8.0
COLOURS = {
    "c": "#8b949e", "W": "#58a6ff", "n": "#bc8cff", "a": "#f0883e", "g": "#e3b341", "K": "#3fb950", "s": "#484f58",
}  # fmt: skip


def text() -> str:
    """The command and what it prints."""
    settings = read_settings(parse_flags([MODEL]), {})
    folder = ROOT / "tests/data/models" / MODEL.replace("/", "--")
    hardware = parse_hardware_name(MACHINE)
    decided = plan(plan_request(settings), hardware, msgspec.structs.replace(read_model(str(folder)), name=MODEL))
    argv = command.engine_command(decided.options, settings, python="python3", vllm_distribution="vllm")
    shown = command.with_command(decided, settings, argv, {})
    return f"$ vllm-launch plan {MODEL} --hardware {MACHINE}\n\n{report.plan_as(shown, hardware, 'table', COLUMNS)}"


def coloured(line: str) -> str:
    """Return ``line`` as SVG text, with colours for the bar and its legend."""
    if bar := re.fullmatch(r"  \[([a-zA-Z.]+)\]", line):
        runs = re.findall(r"((.)\2*)", bar[1])
        spans = "".join(f'<tspan fill="{COLOURS.get(sign, "#30363d")}">{run}</tspan>' for run, sign in runs)
        return f"  [{spans}]"
    if legend := re.fullmatch(r"   ([a-zA-Z]) (.+GiB)", line):
        return f'   <tspan fill="{COLOURS[legend[1]]}">{legend[1]}</tspan> {html.escape(legend[2])}'
    return html.escape(line)


def picture(shown: str) -> str:
    """Return the SVG of the output ``shown``."""
    lines = shown.rstrip("\n").split("\n")
    width, height = round(COLUMNS * CHARACTER + 40), len(lines) * LINE + 40
    rows = "\n".join(
        f'<text x="20" y="{34 + number * LINE}">{coloured(line)}</text>' for number, line in enumerate(lines) if line
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">\n'
        f"<title>{html.escape(lines[0])}</title>\n"
        "<style>text{font:13px ui-monospace,Menlo,Consolas,monospace;fill:#c9d1d9;white-space:pre}</style>\n"
        f'<rect width="{width}" height="{height}" rx="8" fill="#0d1117"/>\n{rows}\n</svg>\n'
    )


if __name__ == "__main__":
    sys.stdout.write(picture(text()))
