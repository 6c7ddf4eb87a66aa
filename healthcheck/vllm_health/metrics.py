"""The one place where metric names are spelt: vLLM's (v1/metrics/loggers.py of 0.32.0) and ours."""

from __future__ import annotations

from typing import Final

CACHE_CONFIG_INFO: Final = "vllm:cache_config_info"
KV_CACHE_SIZE_TOKENS: Final = "kv_cache_size_tokens"
"""Label of CACHE_CONFIG_INFO: what the KV cache of one engine holds."""
ENGINE: Final = "engine"
"""Label: the data-parallel rank that a sample speaks of."""
