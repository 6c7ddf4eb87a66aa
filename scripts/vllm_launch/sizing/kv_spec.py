"""One layer's page in the KV cache. Pure."""

from __future__ import annotations

import msgspec


class Spec(msgspec.Struct, frozen=True, kw_only=True):
    """One layer's page on one GPU, like vllm/v1/kv_cache_interface.py:KVCacheSpec. ``page`` is in bytes."""

    kind: str  # "full", "mla", "sliding", "sliding mla", "chunked", "mamba", "circular" or "cross"
    block: int  # tokens in a page
    page: int
    window: int = 0  # tokens, only for "sliding", "sliding mla", "chunked" and "cross"
    shape: tuple[int, int, int] = (0, 0, 0)  # heads on one GPU, key width, value width
    states: int = 0  # pages of one request, only for "mamba"
