"""The engine arguments that memory depends on, with the names and defaults of vLLM 0.32.0. Pure."""

from __future__ import annotations

from typing import Literal

import msgspec

from vllm_launch.machine.gpus import Gpu
from vllm_launch.model.dtypes import COMPUTE_BITS
from vllm_launch.sizing.offload import Offload
from vllm_launch.units import GIB

CudaGraphMode = Literal["NONE", "PIECEWISE", "FULL", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE"]
"""For which batches vLLM captures CUDA graphs (vllm/config/compilation.py:CUDAGraphMode)."""


class RunConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The engine arguments that memory depends on. Each has its final value. Names are vLLM's."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    dtype: str  # the model computes in it: "bfloat16", "float16" or "float32"
    kv_cache_dtype: str = "auto"
    block_size: int | None = None
    num_gpu_blocks_override: int | None = None  # blocks of the KV cache, whatever memory is left for it
    enable_prefix_caching: bool | None = None  # None: on, but off for models without attention
    disable_hybrid_kv_cache_manager: bool = False  # True: sliding-window layers keep all tokens
    async_scheduling: bool = True
    compiled: bool = True  # vLLM compiles the model with Inductor
    cudagraph_mode: CudaGraphMode = "FULL_AND_PIECEWISE"
    cudagraph_capture_sizes: tuple[int, ...] | None = None
    max_cudagraph_capture_size: int | None = None
    performance_mode: str = "balanced"
    num_speculative_tokens: int = 0
    verifies_in_chunks: bool = True  # False: model runner V1, which verifies all draft tokens at once
    offload: Offload | None = None
    redundant_experts: int = 0  # copies of experts that balance the load
    language_model_only: bool = False
    item_limits: dict[str, int] = {}  # --limit-mm-per-prompt: items of each modality
    skip_mm_profiling: bool = False
    mm_encoder_tp_mode: str = "weights"
    quantization: str | None = None  # --quantization, such as "fp8". None: the checkpoint's own
    fuse_allreduce_rms: bool = True  # False if the user disabled it. No effect on one GPU or before Hopper
    adapter_ranks: int = 0  # max_loras * max_lora_rank; 0 without --enable-lora
    estimate_cudagraphs: bool = True  # VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS
    expandable_segments: bool | None = None  # of PyTorch's allocator. None: the split and the GPU decide

    @property
    def disabled_modalities(self) -> frozenset[str]:
        """Return the modalities of which no prompt may have an item."""
        return frozenset(modality for modality, limit in self.item_limits.items() if not limit)

    @property
    def activation_bytes(self) -> int:
        """Return the bytes of one activation."""
        return COMPUTE_BITS[self.dtype] // 8


def default_batch(gpu: Gpu | None, world_size: int = 1) -> tuple[int, int]:
    """Return the default (max_num_batched_tokens, max_num_seqs) of vLLM's server.

    ``gpu`` is None on the CPU engine. ``world_size`` is TP times PP. vLLM asks NVML for the GPU's memory. If the GPU
    has unified memory, NVML does not know it, and vLLM takes the smallest batch.
    Source: vllm/engine/arg_utils.py:get_batch_defaults.
    """
    if gpu is None:
        return 2048 * world_size, 128 * world_size
    if gpu.unified:
        return 2048, 256
    if gpu.memory_total >= 160 * GIB:
        return 16384, 1024
    if gpu.memory_total >= 70 * GIB and "a100" not in gpu.name.lower():
        return 8192, 1024
    return 2048, 256
