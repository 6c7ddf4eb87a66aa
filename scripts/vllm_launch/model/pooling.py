"""What vLLM makes of a model that could pool: its task, and whether a prompt may be split over batches. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from vllm_launch.engine.architectures import Architecture

POOLING_MODULES = {
    "sentence_transformers.models.Pooling", "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
}  # fmt: skip
"""Types of a module in modules.json that make a model a pooling model, whatever its architecture
(vllm/config/model.py:_get_default_runner_type, transformers_utils/config.py:get_pooling_config)."""

NEEDS_WHOLE_PROMPT = {"MEAN", "CLS", "STEP"}
"""Pooling types that need all hidden states of a prompt at once
(vllm/config/model.py:ModelConfig.is_chunked_prefill_supported)."""

SEQUENCE_TYPES, TOKEN_TYPES = {"CLS", "LAST", "MEAN"}, {"ALL", "STEP"}
"""Pooling types of a sequence and of tokens (vllm/config/pooler.py)."""

Files = Mapping[str, Mapping[str, Any]]


def task(
    architecture: Architecture, files: Files, runner: str | None, convert: str | None
) -> Literal["generate", "pooling"]:
    """Return what vLLM runs the model for: --runner, or --convert, or modules.json, or else the architecture.

    Source: vllm/config/model.py:_get_runner_type, _get_default_runner_type.
    """
    if runner in {"generate", "pooling"}:
        return "pooling" if runner == "pooling" else "generate"
    if convert in {"classify", "embed"}:
        return "pooling"
    return architecture.task if _pooling_module(files) is None else "pooling"


def pooling_file(files: Files) -> str | None:
    """Return the name of the file that states how sentence-transformers pools, or None if the model has none."""
    module = _pooling_module(files)
    path = None if module is None else module.get("path")
    return f"{path}/config.json" if isinstance(path, str) and path else None


def splits_prompts(
    architecture: Architecture, files: Files, pooler_config: Mapping[str, Any] | None, *, causal: bool
) -> bool:
    """Whether vLLM may split a prompt of this pooling model over batches (chunked prefill).

    ``pooler_config`` is the value of vLLM's option, ``causal`` is config.json's is_causal.
    Source: vllm/config/model.py:ModelConfig.attn_type, is_chunked_prefill_supported.
    """
    if not causal or {"encoder_only", "pools_cls"} & set(architecture.flags):
        return False
    types = {"sequence": "MEAN"} if "pools_mean" in architecture.flags else {}
    types |= {"token": "STEP"} if "pools_step" in architecture.flags else {}
    return NEEDS_WHOLE_PROMPT.isdisjoint((types | _types_in(files) | _stated_types(pooler_config or {})).values())


def _pooling_module(files: Files) -> Mapping[str, Any] | None:
    modules = files.get("modules.json", {}).get("modules", [])
    candidates = [module for module in modules if isinstance(module, Mapping)] if isinstance(modules, list) else []
    return next((module for module in candidates if module.get("type") in POOLING_MODULES), None)


def _stated_types(pooler_config: Mapping[str, Any]) -> dict[str, str]:
    """Return the pooling types that the user states, by "sequence" and "token"."""
    stated: dict[str, str] = {}
    for key in ("pooling_type", "seq_pooling_type", "tok_pooling_type"):
        stated |= _by_kind(pooler_config.get(key))
    return stated


def _types_in(files: Files) -> dict[str, str]:
    """Return the pooling types in the file of sentence-transformers' module, by "sequence" and "token".

    Source: vllm/transformers_utils/config.py:get_pooling_config, parse_pooling_type.
    """
    types: dict[str, str] = {}
    for key, value in files.get(pooling_file(files) or "", {}).items():
        name = value if key == "pooling_mode" and isinstance(value, str) else key if value is True else ""
        short = name.replace("pooling_mode_", "").partition("_")[0]
        types |= _by_kind("LAST" if "lasttoken" in short else short.upper())
    return types


def _by_kind(pooling_type: object) -> dict[str, str]:
    if not isinstance(pooling_type, str):
        return {}
    kinds = {"sequence": SEQUENCE_TYPES, "token": TOKEN_TYPES}
    return {kind: pooling_type for kind, known in kinds.items() if pooling_type in known}
