"""Where a GPU's memory goes when vLLM runs a model: bytes, by physics. Pure; vLLM 0.32.0 is the authority."""

from __future__ import annotations

import msgspec


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """The engine arguments that change memory, all decided. Names are vLLM's."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_cache_dtype: str = "auto"
    block_size: int | None = None
    enforce_eager: bool = False
    max_cudagraph_capture_size: int | None = None
    language_model_only: bool = False
    quantization: str | None = None  # asked at start on top of the checkpoint ("fp8"); None: the checkpoint's own
    dtype: str | None = None


class KvCache(msgspec.Struct, frozen=True, kw_only=True):
    """Per replica. ``tokens`` is what vLLM will report as ``kv_cache_size_tokens`` in ``vllm:cache_config_info``."""

    dtype: str
    bytes: int
    tokens: int
    bytes_per_token: int


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """Where the memory of one GPU goes besides the KV cache, in bytes."""

    weights: int
    activation_peak: int
    cuda_graphs: int
    non_torch: int
    context: int
    safety: int
