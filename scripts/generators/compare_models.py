"""Compares the planner with vLLM's facts in tests/data/model_facts.jsonl: ``differences(row)``. Needs no vLLM."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec

from vllm_launch.errors import UsageError
from vllm_launch.machine.gpus import Gpu
from vllm_launch.model.build import build
from vllm_launch.model.checkpoint import Checkpoint
from vllm_launch.model.model import Model
from vllm_launch.sizing import kv
from vllm_launch.sizing.kv_layers import layer_specs
from vllm_launch.sizing.parallel import Layout
from vllm_launch.sizing.placement import Placement
from vllm_launch.sizing.run_config import RunConfig
from vllm_launch.sizing.tensor_parts import fused_tensors
from vllm_launch.units import GIB

TABLE = Path(__file__).parents[2] / "tests/data/model_facts.jsonl"
KV_BYTES = 40 * GIB
H200 = Gpu(
    index=0, uuid="GPU-0", name="NVIDIA H200", memory_total=140 * GIB, memory_free=139 * GIB, compute_capability=(9, 0)
)
KINDS = {
    "FullAttentionSpec": "full", "SlidingWindowSpec": "sliding", "ChunkedLocalAttentionSpec": "chunked",
    "MLAAttentionSpec": "mla", "SlidingWindowMLASpec": "sliding mla", "MambaSpec": "mamba",
    "CrossAttentionSpec": "cross", "CircularBufferSpec": "circular",
    "HMAFullAttentionSpec": "full", "SinkFullAttentionSpec": "full",
}  # fmt: skip
TOLERANCE = 0.01
"""Share by which the bytes of the parameters may differ."""


def read_table() -> list[dict[str, Any]]:
    """Return the rows of the committed table."""
    return [json.loads(line) for line in TABLE.read_text().splitlines()]


def differences(row: dict[str, Any]) -> dict[str, str]:
    """Return what the planner reads otherwise than vLLM, by kind: "ours, and not theirs". Empty if all is equal.

    The kinds are "refused", "length", "dtype", "runner", "layers", "tokens", "weights" and "towers". "weights" are
    those of the language model. "towers" are all weights, with the towers of images and sound.
    """
    facts = row["facts"]
    try:
        model = build(row["name"], Checkpoint(None, {"config.json": row["config"]}, None, ()), {}, pessimistic=False)
    except UsageError as error:
        return {"refused": str(error)}
    run = RunConfig(
        max_model_len=facts["max_model_len"], max_num_seqs=256, max_num_batched_tokens=facts["max_num_batched_tokens"],
        dtype=model.dtype, language_model_only=True,
    )  # fmt: skip
    placement = Placement(model, run, Layout(), H200)
    ours = {"length": model.max_model_len, "dtype": model.dtype, "runner": model.task}
    theirs = {"length": facts["max_model_len"], "dtype": facts["dtype"], "runner": facts["runner"]}
    ours["layers"], theirs["layers"] = _caches(placement), _their_caches(facts)
    if "tokens" in facts:
        ours["tokens"], theirs["tokens"] = kv.kv_cache(placement, KV_BYTES).tokens, facts["tokens"]
    found = {kind: f"{ours[kind]}, and not {theirs[kind]}" for kind in ours if ours[kind] != theirs[kind]}
    tower = facts["tower"] if _has_tower(model) else 0
    language = msgspec.structs.replace(model, tensors=tuple(part for part in model.tensors if part.tower is None))
    found |= _other_size("weights", _bytes(language, run), facts["weights"] - tower)
    if tower and "weights" not in found:
        whole = msgspec.structs.replace(run, language_model_only=False)
        found |= _other_size("towers", _bytes(model, whole), facts["weights"])
    return found


def _bytes(model: Model, run: RunConfig) -> int:
    return sum(part.size for fused in fused_tensors(model, run) for part in fused.parts)


def _other_size(kind: str, size: int, expected: int) -> dict[str, str]:
    if abs(size - expected) <= TOLERANCE * expected:
        return {}
    return {kind: f"{size / GIB:.3f} GiB, and not {expected / GIB:.3f} ({size / expected - 1:+.1%})"}


def _has_tower(model: Model) -> bool:
    """Whether vLLM's language model is a part of it. The halves of an encoder-decoder are one model for the planner."""
    return model.model_type != "whisper"


def _caches(placement: Placement) -> str:
    specs = Counter(
        (spec.kind, spec.block, spec.page, spec.window if spec.kind != "cross" else 0)
        for layer in layer_specs(placement)
        for spec in layer
    )
    return _text(specs)


def _their_caches(facts: dict[str, Any]) -> str:
    specs: Counter[tuple[str, int, int, int]] = Counter()
    for cache in facts["caches"]:
        window = cache.get("sliding_window") or cache.get("attention_chunk_size") or 0
        kind = KINDS.get(cache["type"], cache["type"])
        specs[kind, cache["block_size"], cache["page_size_bytes"], window] += cache["layers"]
    return _text(specs)


def _text(specs: Counter[tuple[str, int, int, int]]) -> str:
    """Return ``specs`` as text: the number of layers, the kind, tokens and bytes of a page, and the window."""
    return "; ".join(
        f"{count} {kind} {block} tokens {page} B" + (f" window {window}" if window else "")
        for (kind, block, page, window), count in sorted(specs.items())
    )
