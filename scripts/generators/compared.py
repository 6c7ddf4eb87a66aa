"""Generate compared.json and docs/models.md from tests/data/model_facts.jsonl, vLLM's facts. Needs no vLLM.

For each fact ("layers", "weights"), compared.json lists the architectures and model types for which the planner agrees
with vLLM, and the pairs of them for which it does not. The page shows how many agree, each known difference and each
architecture that was not compared.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compare_models import TABLE, differences, read_table

from vllm_launch.engine.options import pinned_vllm

ROOT = Path(__file__).parents[2]
OUT, PAGE = ROOT / "scripts/vllm_launch/engine/compared.json", ROOT / "docs/models.md"
NOT_COMPARED, ACCEPTED = TABLE.with_name("model_not_compared.json"), TABLE.with_name("model_differences.json")
UNEQUAL = {"layers": {"refused", "length", "runner", "dtype", "layers", "tokens"}, "weights": {"refused", "weights"}}
"""Kinds of differences that make a row of the table unequal, by fact."""

Found = list[tuple[dict[str, Any], dict[str, str]]]


def find() -> Found:
    """Return the rows of the table, each with the planner's differences from vLLM."""
    return [(row, differences(row)) for row in read_table()]


def compared(found: Found) -> str:
    """Return compared.json: by fact, architectures and model types whose rows are equal, and pairs that differ."""
    table = {}
    for fact, kinds in UNEQUAL.items():
        pairs: dict[bool, set[tuple[str, str]]] = {True: set(), False: set()}
        for row, different in found:
            equal = not kinds & different.keys()
            pairs[equal] |= {(row["facts"]["architecture"], model_type) for model_type in model_types(row["config"])}
        equal_pairs = pairs[True] - pairs[False]
        architectures, types = (sorted({pair[part] for pair in equal_pairs}) for part in (0, 1))
        table[fact] = {"architectures": architectures, "model_types": types, "different": sorted(pairs[False])}
    return json.dumps(table, indent=0) + "\n"


def model_types(config: dict[str, Any]) -> set[str]:
    """Return the model types in a config.json: its own, and the language model's."""
    types = {config.get("model_type", "")}
    for key in ("thinker_config", "text_config", "llm_config", "language_config"):
        if isinstance(config.get(key), dict):
            types |= model_types(config[key])
    return types - {""}


def page(found: Found) -> str:
    """Return docs/models.md."""
    missing: dict[str, str] = json.loads(NOT_COMPARED.read_text())
    accepted: dict[str, dict[str, str]] = json.loads(ACCEPTED.read_text())
    architectures = {row["facts"]["architecture"] for row, _ in found}
    unequal = {fact: {row["facts"]["architecture"] for row, different in found if kinds & different.keys()}
               for fact, kinds in UNEQUAL.items()}  # fmt: skip
    other_towers = {row["facts"]["architecture"] for row, different in found if "towers" in different}
    with_tower = {row["facts"]["architecture"] for row, _ in found if row["facts"].get("tower")}
    drafts = sum("draft" in reason for reason in missing.values())
    rows = [
        ("architectures in vLLM's registry", len(architectures) + len(missing)),
        ("compared", len(architectures)),
        ("layers, heads, windows, KV cache and length equal", len(architectures - unequal["layers"])),
        ("weights of the language model within 1 %", len(architectures - unequal["weights"])),
        ("compared architectures with an image, video or audio encoder", len(with_tower)),
        ("of these, all weights within 1 %, encoders included", len(with_tower - unequal["weights"] - other_towers)),
        ("not compared: draft models", drafts),
        ("not compared: other reasons", len(missing) - drafts),
        ("configurations compared", len(found)),
    ]
    lines = [
        "# Models compared with vLLM",
        "",
        "The planner reads config.json without vLLM. For each configuration, we built the model with the classes of",
        f"vLLM {pinned_vllm()} on PyTorch's meta device, with the settings that vLLM uses on an H200. The planner must",
        "give the same maximum length, dtype, runner, KV cache of each layer, and tokens in 40 GiB of KV cache, to the",
        "token. Weights may differ by 1 %.",
        "",
        "A configuration has the defaults of its config class, or it was written by hand, with the sizes of a released",
        "model as far as we know them. It may differ from the hub's file. vLLM and the planner get the same",
        "configuration.",
        "",
        "`make generate` makes the table (tests/data/model_facts.jsonl) and this page. `make test-against-vllm` judges",
        "changed rows and a sample of the others again. `make test-unit` compares the planner with all rows.",
        "",
        "If the layers of an architecture or model type were not compared, or differ, the plan warns. It counts each",
        "layer with attention as full attention with the largest heads. Latent attention and recurrent states stay as",
        "they are. If the weights were not compared or differ, the plan warns when it computes them from config.json.",
        "",
        "|  | number |",
        "|---|---:|",
        *(f"| {name} | {count} |" for name, count in rows),
        "",
        "## Known differences",
        "",
        "| configuration | what differs | reason |",
        "|---|---|---|",
        *(
            f"| {name} | {kind} | {reason} |"
            for name, kinds in sorted(accepted.items())
            for kind, reason in kinds.items()
        ),
        "",
        "## Architectures that were not compared",
        "",
        "| architecture | reason |",
        "|---|---|",
        *(f"| {name} | {reason.replace('|', '/')} |" for name, reason in missing.items()),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write both files."""
    found = find()
    OUT.write_text(compared(found))
    PAGE.write_text(page(found))


if __name__ == "__main__":
    main()
