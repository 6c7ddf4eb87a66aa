#!/usr/bin/env python3
"""Writes the tables of docs/performance.md from what was measured: ``python benchmarks/gpu/report.py``.

Each file in ``results/`` is what one command of this folder wrote; its rows go between the comments that name its
question. A row of figures never mixes files: ratios are of one run.
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


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    marks = ["---", *["---:"] * (len(head) - 1)]
    return ["| " + " | ".join(map(str, row)) + " |" for row in (head, marks, *rows)]


def source(told: Mapping[str, Any]) -> str:
    of = told["provenance"]
    gpus = of.get("gpus") or ["no GPU"]
    versions = ", ".join(f"{name} {of[name]}" for name in ("vllm", "torch", "transformers") if name in of)
    return f"{len(gpus)} x {gpus[0]}, driver {of.get('driver')}, {versions}, {of['date']}: `{of['command']}`"


def throughput(told: Mapping[str, Any]) -> Iterator[str]:
    """A table for each workload; ratios are to the row of vLLM's defaults, or to the first where there is none."""
    rows = [row for row in told["rows"] if "output_tok_s" in row]
    for workload in dict.fromkeys(row["workload"] for row in rows):
        mine = [row for row in rows if row["workload"] == workload]
        lines = []
        for row in mine:
            alike = [one for one in mine if one["rate"] == row["rate"]]
            base = next((one for one in alike if "defaults" in one["configuration"]), mine[0])
            lines.append(
                [f"{row['configuration']} {' '.join(row['flags'])}".strip(), row["rate"] or "all at once",
                 f"{row['output_tok_s']:,.0f}", f"{row['output_tok_s'] / base['output_tok_s']:.3f}",
                 *(f"{row[what][cut]:,.0f}" for what in ("ttft_ms", "itl_ms") for cut in ("p50", "p99")),
                 row["ready_s"]]
            )  # fmt: skip
        head = [f"{workload}, {mine[0]['requests']} requests", "requests/s", "output tok/s", "to the defaults",
                "TTFT p50 ms", "p99", "ITL p50 ms", "p99", "ready after s"]  # fmt: skip
        yield from (*table(head, lines), "")


def memory(told: Mapping[str, Any]) -> Iterator[str]:
    lines = []
    for row in told["rows"]:
        if "kv_error" not in row:
            continue
        terms = [
            "{:.2f} / {:.2f}".format(*row["parts_gib"][0][term])
            for term in ("weights", "non_torch", "activation_peak", "cuda_graphs", "context")
        ]
        lines.append([row["row"], f"{row['kv_cache_tokens']:,}", f"{row['kv_error']:+.2%}", *terms])
    head = ["model and knobs", "KV tokens", "plan", "weights", "other", "activations", "graphs", "context"]
    yield from table(head, lines)


def plain(told: Mapping[str, Any]) -> Iterator[str]:
    """What a row holds that is short, as it is; of errors and what was said the last line."""
    rows = [{key: value for key, value in row.items() if not isinstance(value, dict | list)} for row in told["rows"]]
    head = list(dict.fromkeys(key for row in rows for key in row))
    shown = [[str(row.get(key, "")).strip().rpartition("\n")[2].replace("|", "\\|") for key in head] for row in rows]
    yield from table(head, shown)


def start(told: Mapping[str, Any]) -> Iterator[str]:
    phases = list(dict.fromkeys(phase for row in told["rows"] for phase in row["phases_s"]))
    rows = [
        [row["caches"], row["first_token_s"], *(row["phases_s"].get(phase, "") for phase in phases)]
        for row in told["rows"]
    ]
    yield from table(["caches", "first token s", *phases], rows)


def predictions() -> str:
    """One line over all rows that the tests read (tests/unit/test_measured.py)."""
    sys.path.insert(0, str(HERE))
    from predicted import measured, predicted  # noqa: PLC0415 - needs the launcher, which the tables above do not

    errors = [abs(predicted(row)[1].tokens / row["kv_cache_tokens"] - 1) for row in measured().values()]
    return f"{len(errors)} rows: mean absolute error {statistics.mean(errors):.2%}, worst {max(errors):.2%}"


TABLES: dict[str, Callable[[Mapping[str, Any]], Iterator[str]]] = {
    "memory": memory, "throughput": throughput, "edge": plain, "start": start, "peers": plain, "facts": plain,
    "faults": plain,
}  # fmt: skip


def rendered(page: str) -> str:
    """``page`` with every table as the results have it."""
    results = [json.loads(path.read_text()) for path in sorted((HERE / "results").glob("*.json"))]
    for question, lines in TABLES.items():
        mine = [told for told in results if told["question"] == question]
        parts = ["\n".join(lines(told)).strip() + f"\n\n{source(told)}" for told in mine]
        page = between(page, question, "\n\n".join(parts) or "Not measured yet.")
    return between(page, "predictions", predictions())


def between(page: str, name: str, text: str) -> str:
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not pattern.search(page):
        raise SystemExit(f"docs/performance.md has no place for {name}: <!-- {name} --> and <!-- /{name} -->")
    return pattern.sub(lambda found: f"{found[1]}{text}\n{found[2]}", page)


def main() -> int:
    PAGE.write_text(rendered(PAGE.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
