"""What the user asks of a plan."""

from __future__ import annotations

from typing import Literal

import msgspec

Objective = Literal["throughput", "latency"]

AUTO = -1
"""``max_model_len`` "auto": as long as one request fits (vllm/config/model.py)."""


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What the person set of vLLM's own arguments, under vLLM's names; None where they left it to the plan.

    Values are taken as given; the rest is computed around them. The launcher's own wishes come in too.
    """

    objective: Objective = "throughput"
    fp8_kv: bool = False  # launch.quality: the plan may choose an FP8 cache
    fuse_allreduce_rms: bool = True  # not where NVLink multicast must stay unused
    tensor_parallel_size: int | None = None
    pipeline_parallel_size: int | None = None
    data_parallel_size: int | None = None
    gpu_memory_utilization: float | None = None
    kv_cache_memory_bytes: int | None = None
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    watermark: float | None = None
    kv_cache_dtype: str | None = None
    block_size: int | None = None
    dtype: str | None = None
    quantization: str | None = None
    enforce_eager: bool = False
    enable_expert_parallel: bool | None = None
    language_model_only: bool = False
    enable_lora: bool = False
    max_loras: int | None = None
    max_lora_rank: int | None = None
    max_cudagraph_capture_size: int | None = None
    enable_chunked_prefill: bool | None = None
    performance_mode: str | None = None
    long_max_model_len: bool = False  # VLLM_ALLOW_LONG_MAX_MODEL_LEN=1 or --hf-overrides: the person knows better
    cpu_kv_cache_bytes: int | None = None  # VLLM_CPU_KVCACHE_SPACE, which wins over kv_cache_memory_bytes there
    estimate_cudagraphs: bool | None = None  # VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS

    @property
    def guesses_graphs(self) -> bool:
        """Whether vLLM guesses what CUDA graphs will take: where the plan decides on memory, it knows better."""
        if self.estimate_cudagraphs is not None:
            return self.estimate_cudagraphs
        return self.gpu_memory_utilization is not None or self.kv_cache_memory_bytes is not None

    @property
    def length(self) -> int | None:
        """``max_model_len`` where it is a number of tokens."""
        return None if self.max_model_len == AUTO else self.max_model_len
