"""Rules for options of memory: draft tokens, sizes of CUDA graphs, offloading. vLLM refuses the same."""

from __future__ import annotations

import math
from collections.abc import Iterator

from vllm_launch.engine import speculative
from vllm_launch.settings.mistake import Mistake, number
from vllm_launch.settings.settings import Settings


def _speculative(settings: Settings) -> Iterator[Mistake]:
    """Yield keys that are set twice, and batches that are too small for draft tokens with adapters.

    Source: engine/arg_utils.py (create_speculative_config, create_engine_config).
    """
    config = settings.engine.get("speculative_config")
    keys = {str(key).replace("-", "_") for key in config} if isinstance(config, dict) else set()
    for dest, key in speculative.FLAGS.items():
        if settings.engine.get(dest) is not None and key in keys:
            yield Mistake(dest, f"{key} is also a key of speculative_config", "keep one of them")
    tokens, each = settings.engine.get("max_num_batched_tokens"), 1 + speculative.draft_tokens(settings.engine)
    seqs = number(settings.engine, "max_num_seqs", 1)
    if settings.engine.get("enable_lora") and each > 1 and isinstance(tokens, int) and tokens < seqs * each:
        problem = f"with adapters and draft tokens {seqs} requests need {seqs * each} tokens in a batch, not {tokens}"
        yield Mistake("max_num_batched_tokens", problem, "raise it, or lower max_num_seqs")


def _capture_sizes(settings: Settings) -> Iterator[Mistake]:
    """Yield contradictions in the sizes of CUDA graphs (engine/arg_utils.py:create_engine_config, config/vllm.py)."""
    engine = settings.engine
    config = engine.get("compilation_config")
    keys = config if isinstance(config, dict) else {}
    values = {}
    for name in ("cudagraph_capture_sizes", "max_cudagraph_capture_size"):
        if engine.get(name) is not None and keys.get(name) is not None:
            yield Mistake(name, f"{name} is also a key of compilation_config", "keep one of them")
        values[name] = engine.get(name) if engine.get(name) is not None else keys.get(name)
    sizes, largest = values["cudagraph_capture_sizes"], values["max_cudagraph_capture_size"]
    where = next((name for name in values if name in settings.origin), "compilation_config")
    if largest is not None and (not isinstance(largest, int) or largest < 0):
        yield Mistake(where, f"max_cudagraph_capture_size is {largest!r}", "give a whole number of tokens")
    if sizes is not None and not _are_counts(sizes):
        yield Mistake(where, f"cudagraph_capture_sizes is {sizes!r}", "give a list of whole numbers of 1 or more")
    elif sizes == []:
        yield Mistake(
            where, "cudagraph_capture_sizes is empty", "give a size, or set --enforce-eager for no CUDA graphs"
        )
    elif isinstance(sizes, list) and isinstance(largest, int) and max(sizes) != largest:
        problem = f"the largest of cudagraph_capture_sizes is {max(sizes)}, and max_cudagraph_capture_size is {largest}"
        yield Mistake(where, problem, "leave max_cudagraph_capture_size out")


def _are_counts(values: object) -> bool:
    """Whether ``values`` is a list of whole numbers of at least 1."""
    return isinstance(values, list) and all(isinstance(value, int) and value >= 1 for value in values)


def _offload(settings: Settings) -> Iterator[Mistake]:
    """Yield numbers that vLLM's offloading refuses (config/offload.py:validate_offload_config)."""
    engine = settings.engine
    group, layers = number(engine, "offload_group_size", 0), number(engine, "offload_num_in_group", 1)
    if isinstance(size := engine.get("cpu_offload_gb"), float) and not 0 <= size < math.inf:
        yield Mistake("cpu_offload_gb", f"cpu_offload_gb is {size}", "give 0 or more GiB")
    if group < 0:
        yield Mistake("offload_group_size", f"offload_group_size is {group}", "give 0 or more layers")
    if layers < 1:
        yield Mistake("offload_num_in_group", f"offload_num_in_group is {layers}", "give 1 or more layers")
    if group == 0 and engine.get("offload_backend") != "prefetch":
        return
    if layers > group:
        keys = ("offload_num_in_group", "offload_group_size", "offload_backend")
        problem = f"offload_num_in_group {layers} is more than offload_group_size {group}"
        yield Mistake(next(key for key in keys if key in settings.origin), problem, "set a larger group of layers")
    if (step := number(engine, "offload_prefetch_step", 1)) < 1:
        yield Mistake("offload_prefetch_step", f"offload_prefetch_step is {step}", "give 1 or more layers")


RULES = (_speculative, _capture_sizes, _offload)
"""Rules in the order of their checks."""
