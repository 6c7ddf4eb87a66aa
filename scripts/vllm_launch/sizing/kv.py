"""Computes how many tokens a KV cache of a given size holds, with vLLM 0.32.0's groups and exact blocks. Pure."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Sequence

import msgspec

from vllm_launch.sizing.kv_layers import kv_dtype, layer_specs
from vllm_launch.sizing.kv_packed import packed_groups
from vllm_launch.sizing.kv_spec import Spec
from vllm_launch.sizing.placement import Placement
from vllm_launch.sizing.run_config import RunConfig

CacheBytes = int | Sequence[int]
"""Bytes for the KV cache on one GPU: one number for all GPUs, or one number for each pipeline rank."""


class KvCache(msgspec.Struct, frozen=True, kw_only=True):
    """The KV cache of one replica.

    vLLM reports ``tokens`` as ``kv_cache_size_tokens`` in ``vllm:cache_config_info``.
    """

    dtype: str
    bytes: int
    tokens: int
    bytes_per_token: int


class Grouping(msgspec.Struct, frozen=True, kw_only=True):
    """How vLLM shares its pool of blocks: groups of layers allocate blocks of one size from it.

    ``groups`` holds the distinct specs of each group. The spec that needs the most blocks counts. ``block_bytes`` is
    the size of a block on a GPU of each pipeline rank, and 0 on a rank without a cache.
    """

    groups: tuple[tuple[Spec, ...], ...]
    block_bytes: tuple[int, ...]


def kv_cache(placement: Placement, kv_bytes: CacheBytes) -> KvCache:
    """Return the KV cache of one replica whose GPUs have ``kv_bytes`` each for it.

    ``tokens`` is ``int(blocks / blocks of a longest request * max_model_len)``, or 0 if vLLM would refuse to start.
    Source: vllm/v1/core/kv_cache_utils.py:get_kv_cache_configs, get_kv_cache_capacity.
    """
    model, run, layout = placement.model, placement.run_config, placement.layout
    grouping = grouping_of(placement)
    dtype = kv_dtype(model, run)
    if not grouping.groups:
        return KvCache(dtype=dtype, bytes=0, tokens=0, bytes_per_token=0)
    blocks = _block_count(grouping, run, kv_bytes)
    longest = _blocks_per_request(grouping, placement, run.max_model_len)
    tokens = int(blocks / longest * run.max_model_len) if blocks > longest else 0  # one of the blocks is the null block
    total = blocks * sum(grouping.block_bytes) * layout.tensor
    per_token = bytes_per_request(placement, run.max_model_len) / run.max_model_len
    return KvCache(dtype=dtype, bytes=total, tokens=tokens, bytes_per_token=math.ceil(per_token))


def longest_that_fits(placement: Placement, kv_bytes: CacheBytes) -> int:
    """Return the largest ``max_model_len`` up to the run's with which vLLM starts, or 0 if there is none.

    One block of the pool is the null block. Source: kv_cache_utils.py:_estimate_max_model_len_from_groups.
    """
    run = placement.run_config
    grouping = grouping_of(placement)
    if not grouping.groups:
        return run.max_model_len
    usable = _block_count(grouping, run, kv_bytes) - 1
    low, high = 0, run.max_model_len
    while low < high:
        middle = (low + high + 1) // 2
        if _blocks_per_request(grouping, placement, middle) <= usable:
            low = middle
        else:
            high = middle - 1
    return low


def _block_count(grouping: Grouping, run: RunConfig, kv_bytes: CacheBytes) -> int:
    """Return the number of blocks on every rank: the user's, or that of the rank that can hold the fewest.

    This need not be the rank with the least memory, because the first ranks can have one layer more
    (get_kv_cache_configs, step 5). The user's number does not depend on the memory (may_override_num_blocks).
    """
    if run.num_gpu_blocks_override is not None:
        return run.num_gpu_blocks_override
    by_rank = [kv_bytes] * len(grouping.block_bytes) if isinstance(kv_bytes, int) else kv_bytes
    return min(max(0, available) // size for available, size in zip(by_rank, grouping.block_bytes, strict=True) if size)


def override_bytes(placement: Placement) -> tuple[int, ...]:
    """Return the bytes of the user's number of blocks on a GPU of each pipeline rank. Empty without a number."""
    number = placement.run_config.num_gpu_blocks_override
    return tuple(number * size for size in grouping_of(placement).block_bytes) if number is not None else ()


def bytes_per_request(placement: Placement, tokens: int) -> int:
    """Return the bytes of one request of ``tokens`` tokens on all GPUs of the replica together."""
    layout = placement.layout
    grouping = grouping_of(placement)
    if not grouping.groups:
        return 0
    return _blocks_per_request(grouping, placement, tokens) * sum(grouping.block_bytes) * layout.tensor


def requests_that_fit(placement: Placement, cache: KvCache, tokens: int) -> int:
    """Return how many requests of ``tokens`` tokens ``cache`` holds at once.

    With windows, chunks and recurrent states a request does not need memory in proportion to its length. So the
    number does not follow from ``cache.tokens``, which is for requests of ``max_model_len`` tokens.
    """
    needed = bytes_per_request(placement, tokens)
    return cache.bytes // needed if cache.tokens and needed else 0


@functools.lru_cache(maxsize=64)
def grouping_of(placement: Placement) -> Grouping:
    """Return vLLM's groups of layers (v1/core/kv_cache_utils.py:get_kv_cache_groups), for all pipeline ranks."""
    layers = zip(placement.rank_of_layer, layer_specs(placement), strict=True)
    caches = [(rank, spec) for rank, specs in layers for spec in specs]
    pages = [spec for _, spec in caches]
    ranks = [rank for rank, _ in caches]
    if not pages:
        return Grouping(groups=(), block_bytes=())
    if placement.run_config.disable_hybrid_kv_cache_manager:
        pages = _without_windows(pages)
    if any(spec.kind in {"sliding mla", "circular"} for spec in pages):
        groups = packed_groups(pages)
    elif _need_same_block_count(pages):
        groups = [list(range(len(pages)))]
    else:
        pages = _pad_to_one_page_size(pages)
        groups = _group_indices(pages)
    block_bytes = [
        max(sum(pages[index].page for index in group if ranks[index] == rank) for group in groups)
        for rank in range(placement.layout.pipeline)
    ]
    return Grouping(
        groups=tuple(tuple(dict.fromkeys(pages[index] for index in group)) for group in groups),
        block_bytes=tuple(block_bytes),
    )


def _without_windows(specs: Sequence[Spec]) -> list[Spec]:
    """Return ``specs`` as vLLM allocates them without its hybrid manager: a layer with a window keeps all tokens.

    If no layer keeps all tokens, nothing changes. Source: kv_cache_utils.py:_promote_local_kv_cache_specs.
    """
    if not any(spec.kind in {"full", "mla"} for spec in specs):
        return list(specs)
    return [
        msgspec.structs.replace(spec, kind="full", window=0) if spec.kind in {"sliding", "chunked"} else spec
        for spec in specs
    ]


def _need_same_block_count(specs: Sequence[Spec]) -> bool:
    """Whether all layers need the same number of blocks (UniformTypeKVCacheSpecs.is_uniform_type)."""
    if all(spec.kind in {"full", "mla"} for spec in specs):
        return True
    return len({(spec.kind, spec.window) for spec in specs}) == 1


def _pad_to_one_page_size(specs: Sequence[Spec]) -> list[Spec]:
    """Return ``specs`` with pages of one size (unify_kv_cache_spec_page_size).

    A page gets more tokens if its size divides the largest size, or else padding.
    """
    largest = max(spec.page for spec in specs)
    return [
        msgspec.structs.replace(
            spec,
            page=largest,
            block=spec.block if largest % spec.page else spec.block * largest // spec.page,
        )
        for spec in specs
    ]


def _group_indices(specs: Sequence[Spec]) -> list[list[int]]:
    """Return groups of equal size, as indices of ``specs`` (_get_kv_cache_groups_uniform_page_size)."""
    buckets: defaultdict[Spec, list[int]] = defaultdict(list)
    for index, spec in enumerate(specs):
        buckets[spec].append(index)
    smallest, largest = min(map(len, buckets.values())), max(map(len, buckets.values()))
    size = largest if largest < smallest * 1.5 else smallest
    groups = []
    for layers in buckets.values():
        count = math.ceil(len(layers) / size)
        groups += [layers[first::count] for first in range(count)]
    return groups


def _blocks_per_request(grouping: Grouping, placement: Placement, length: int) -> int:
    """Return the largest number of blocks that a request of ``length`` tokens needs, over all groups.

    Tokens in flight occupy blocks that are already outside the window: one batch for each concurrent step. There is
    one step for each pipeline stage and, on GPUs, one more for async scheduling, which pooling models do without
    (config/vllm.py:max_concurrent_batches, platforms/cpu.py).
    """
    run, layout = placement.run_config, placement.layout
    asynchronous = placement.gpu is not None and run.async_scheduling and placement.model.task != "pooling"
    steps = layout.pipeline + asynchronous
    in_flight = steps * run.max_num_batched_tokens
    return sum(max(_blocks_of_spec(spec, in_flight, length) for spec in group) for group in grouping.groups)


def _blocks_of_spec(spec: Spec, in_flight: int, length: int) -> int:
    """Return the blocks that a request needs for ``spec`` (max_memory_usage_bytes / page_size_bytes of each spec)."""
    match spec.kind:
        case "sliding" | "sliding mla":
            return math.ceil(min(spec.window - 1 + in_flight, length) / spec.block) + 1
        case "chunked":
            return math.ceil(min(spec.window + in_flight, length) / spec.block)
        case "mamba":
            return spec.states
        case "circular":
            return 1
        case "cross":
            return math.ceil(spec.window / spec.block)
        case _:
            return math.ceil(length / spec.block)
