"""Groups of layers whose pages of several sizes share one block. Pure.

vLLM makes them if the attention backends need a cache whose outermost dimension is the block.

Source: v1/core/kv_cache_utils.py:_get_packed_kv_cache_groups.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

from vllm_launch.sizing.kv_spec import Spec

STATES = {"mamba", "circular"}
"""Kinds of caches of which a request has a fixed number of blocks."""


def packed_groups(specs: Sequence[Spec]) -> list[list[int]]:
    """Return the groups, as indices of ``specs``."""
    buckets: defaultdict[tuple[str, int, int], list[int]] = defaultdict(list)
    for index, spec in enumerate(specs):
        kind = "full" if spec.kind == "mla" else spec.kind
        buckets[kind, spec.block, spec.window].append(index)
    counters = [Counter(specs[index].page for index in bucket) for bucket in buckets.values()]
    repeats = _repeats(counters)
    needed = max(map(_widest_group, buckets, counters, [repeats] * len(counters)))
    groups = []
    for (kind, _, _), bucket in buckets.items():
        by_page: defaultdict[int, list[int]] = defaultdict(list)
        for index in bucket:
            by_page[specs[index].page].append(index)
        pattern = list(zip(*by_page.values(), strict=False))
        balanced = len(set(map(len, by_page.values()))) == 1
        count = math.ceil(len(pattern) / repeats) if balanced and repeats else 1
        if kind in STATES:  # a group of states is not wider than the block that other groups need
            count = max(count, math.ceil(len(bucket) / max(1, needed // specs[bucket[0]].page)))
        if count == 1:
            groups.append(bucket)
        else:
            groups += [[index for repeat in pattern[n::count] for index in repeat] for n in range(count)]
    return groups


def _widest_group(key: tuple[str, int, int], pages: Counter[int], repeats: int) -> int:
    """Return the bytes of the widest group of a bucket. A bucket of states can have one state in each group."""
    count = 1
    if key[0] in STATES:
        count = pages.total()
    elif repeats and len(set(pages.values())) == 1:
        count = math.ceil(max(pages.values()) / repeats)
    return sum(math.ceil(layers / count) * page for page, layers in pages.items())


def _repeats(pages: Sequence[Counter[int]]) -> int:
    """Return the repeats of a pattern of layers in one group, or 0 if no bucket mixes sizes of pages in a pattern.

    It is the number that pads the buckets the least, and of several the largest (_approximate_gcd).
    """
    balanced = [counts for counts in pages if len(set(counts.values())) == 1]
    lengths = [max(counts.values()) for counts in balanced]
    least = max((max(counts.values()) for counts in balanced if len(counts) > 1), default=0)
    if not least:
        return 0
    return min(range(least, max(lengths) + 1), key=lambda size: (sum(-length % size for length in lengths), -size))
