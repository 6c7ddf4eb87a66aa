"""Computes how vLLM compiles a model and captures CUDA graphs, from the user's options. Pure.

Source: vllm/config/vllm.py (__post_init__, OPTIMIZATION_LEVEL_TO_CONFIG, _normalize_piecewise_cudagraph_mode) and
engine/arg_utils.py (create_engine_config).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, get_args

from vllm_launch.engine import multicast
from vllm_launch.model.model import Model
from vllm_launch.sizing.run_config import CudaGraphMode

MODES = ("NONE", "STOCK_TORCH_COMPILE", "DYNAMO_TRACE_ONCE", "VLLM_COMPILE")
"""vLLM's compilation modes. ``mode`` is an index or a name (vllm/config/compilation.py:CompilationMode)."""

DEFAULT_LEVEL = 2

_GRAPHS_OF_LEVEL: Mapping[int, CudaGraphMode] = {0: "NONE", 1: "PIECEWISE"}
_WITHOUT_PIECEWISE: Mapping[CudaGraphMode, CudaGraphMode] = {
    "PIECEWISE": "NONE",
    "FULL_AND_PIECEWISE": "FULL_DECODE_ONLY",
}


class Compilation(NamedTuple):
    """How vLLM compiles and captures. Fields as in ``RunConfig``."""

    compiled: bool
    cudagraph_mode: CudaGraphMode
    fuse_allreduce_rms: bool


def compilation_of(
    model: Model, *, enforce_eager: bool, optimization_level: str | None, config: Mapping[str, object]
) -> Compilation:
    """Return how vLLM compiles ``model``. ``config``: the user's compilation_config."""
    if enforce_eager:
        return Compilation(compiled=False, cudagraph_mode="NONE", fuse_allreduce_rms=False)
    level = int(text) if (text := optimization_level or "").isdecimal() else DEFAULT_LEVEL
    mode = _mode(config.get("mode"), "VLLM_COMPILE" if level else "NONE")
    compiled = mode == "VLLM_COMPILE"
    fused = multicast.fused_all_reduce(config)
    return Compilation(
        compiled=compiled,
        cudagraph_mode="NONE" if mode == "STOCK_TORCH_COMPILE" else _graphs(model, level, config, compiled=compiled),
        fuse_allreduce_rms=compiled and (level >= DEFAULT_LEVEL if fused is None else fused),
    )


def _mode(value: object, default: str) -> str:
    if isinstance(value, int) and 0 <= value < len(MODES):
        return MODES[value]
    return value.upper() if isinstance(value, str) else default


def _graphs(model: Model, level: int, config: Mapping[str, object], *, compiled: bool) -> CudaGraphMode:
    """Return the mode of CUDA graphs. Piecewise graphs need compilation, and some models allow only one kind."""
    default = _GRAPHS_OF_LEVEL.get(level, "FULL_AND_PIECEWISE")
    asked = str(config.get("cudagraph_mode") or default).upper()
    mode = next((mode for mode in get_args(CudaGraphMode) if mode == asked), default)
    if not compiled:
        mode = _WITHOUT_PIECEWISE.get(mode, mode)
    if model.task == "pooling" and mode.startswith("FULL"):
        mode = "PIECEWISE" if compiled else "NONE"
    elif any(layer.cross for layer in model.layers) and mode != "NONE":
        mode = "FULL_DECODE_ONLY"
    return mode
