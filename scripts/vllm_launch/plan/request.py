"""The user's request for a plan, and the engine arguments that follow from it. Pure."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from vllm_launch.machine.cpu import Cpu
from vllm_launch.machine.generation import Generation
from vllm_launch.model.dtypes import ALIASES, NO_FLOAT16, ONLY_BFLOAT16
from vllm_launch.model.model import Model
from vllm_launch.plan.compilation import compilation_of
from vllm_launch.sizing.offload import Offload
from vllm_launch.sizing.run_config import RunConfig
from vllm_launch.units import GIB

Objective = Literal["throughput", "latency"]

AUTO = -1
"""Value of ``max_model_len`` for "auto": the longest request that fits (vllm/config/model.py)."""


class PlanRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The vLLM arguments that the user set, under vLLM's names, and the launcher's own settings.

    None means that the plan chooses the value. The plan never changes a value that is set.
    """

    objective: Objective = "throughput"
    fp8_kv: bool = False  # launch.quality: the plan may choose an FP8 cache
    parsers: bool = True  # launch.parsers: the plan may choose parsers of reasoning and tool calls
    fuse_allreduce_rms: bool = True  # False if vLLM must not use NVLink multicast
    tensor_parallel_size: int | None = None
    pipeline_parallel_size: int | None = None
    data_parallel_size: int | None = None
    gpu_memory_utilization: float | None = None
    kv_cache_memory_bytes: int | None = None
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    num_gpu_blocks_override: int | None = None
    enable_prefix_caching: bool | None = None
    disable_hybrid_kv_cache_manager: bool | None = None
    disable_sliding_window: bool = False
    async_scheduling: bool | None = None
    watermark: float | None = None
    kv_cache_dtype: str | None = None
    block_size: int | None = None
    dtype: str | None = None
    quantization: str | None = None
    enforce_eager: bool = False
    optimization_level: str | None = None
    compilation_config: dict[str, Any] = {}
    cudagraph_capture_sizes: tuple[int, ...] | None = None
    offload_backend: str = "auto"
    cpu_offload_gb: float = 0
    cpu_offload_params: tuple[str, ...] = ()
    offload_group_size: int = 0
    offload_num_in_group: int = 1
    offload_prefetch_step: int = 1
    offload_params: tuple[str, ...] = ()
    kv_offloading_size: float = 0  # GiB of host memory for each replica
    num_speculative_tokens: int = 0  # of speculative decoding; 0 without it
    redundant_experts: int = 0  # num_redundant_experts of eplb_config
    verifies_in_chunks: bool = True  # as in ``RunConfig``
    enable_expert_parallel: bool | None = None
    language_model_only: bool = False
    limit_mm_per_prompt: dict[str, int | dict[str, int | None]] | None = None
    skip_mm_profiling: bool = False
    mm_encoder_tp_mode: str | None = None
    disable_chunked_mm_input: bool = False
    mm_processor_cache_gb: float | None = None
    enable_lora: bool = False
    max_loras: int | None = None
    max_lora_rank: int | None = None
    max_cudagraph_capture_size: int | None = None
    enable_chunked_prefill: bool | None = None
    performance_mode: str | None = None
    tool_call_parser: str | None = None
    enable_auto_tool_choice: bool | None = None
    reasoning_parser: str | None = None
    long_max_model_len: bool = False  # VLLM_ALLOW_LONG_MAX_MODEL_LEN=1 or --hf-overrides: do not check the length
    cpu_kv_cache_bytes: int | None = None  # VLLM_CPU_KVCACHE_SPACE, overrides kv_cache_memory_bytes
    estimate_cudagraphs: bool | None = None  # VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS
    disable_custom_all_reduce: bool = False
    expandable_segments: bool | None = None  # PYTORCH_CUDA_ALLOC_CONF, or False if an option forbids them

    @property
    def vllm_estimates_graphs(self) -> bool:
        """Whether vLLM estimates the memory of CUDA graphs.

        VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS decides if the user sets it. Otherwise vLLM estimates only if the user
        sets gpu_memory_utilization or kv_cache_memory_bytes. If vLLM does not estimate, the plan reserves the memory.
        """
        if self.estimate_cudagraphs is not None:
            return self.estimate_cudagraphs
        return self.gpu_memory_utilization is not None or self.kv_cache_memory_bytes is not None

    @property
    def item_limits(self) -> dict[str, int]:
        """Return the items that a prompt may have, by modality. A limit with options can leave the number open."""
        limits = self.limit_mm_per_prompt or {}
        counts = {name: limit.get("count") if isinstance(limit, dict) else limit for name, limit in limits.items()}
        return {name: count for name, count in counts.items() if count is not None}

    @property
    def gpus_needed(self) -> int:
        """Return the least number of GPUs that the user's parallel sizes need."""
        return (self.tensor_parallel_size or 1) * (self.pipeline_parallel_size or 1) * (self.data_parallel_size or 1)

    @property
    def length(self) -> int | None:
        """Return ``max_model_len`` in tokens, or None if it is not set or "auto"."""
        return None if self.max_model_len == AUTO else self.max_model_len

    @property
    def offload(self) -> Offload | None:
        """Return how vLLM offloads weights, or None if it does not (model_executor/offloader/base.py).

        With the backend "auto" a group size selects "prefetch", and otherwise cpu_offload_gb selects "uva".
        """
        backend = self.offload_backend
        if self.offload_group_size > 0 and backend != "uva":
            return Offload(
                backend="prefetch",
                group_size=self.offload_group_size,
                num_in_group=self.offload_num_in_group,
                prefetch_step=self.offload_prefetch_step,
                params=self.offload_params,
            )
        if self.cpu_offload_gb > 0 and backend != "prefetch":
            return Offload(backend="uva", limit=int(self.cpu_offload_gb * GIB), params=self.cpu_offload_params)
        return None


def batch_of(request: PlanRequest, model: Model, default: tuple[int, int]) -> tuple[int, int]:
    """Return (max_num_batched_tokens, max_num_seqs): the user's values, or else ``default``.

    The default tokens are lowered to what max_num_seqs requests can use. They are raised to max_model_len if one batch
    must hold a whole prompt (``splits_prompts``), and to the largest item if one batch must hold it. With adapters a
    batch must hold all draft tokens of all requests. The result passes
    config/scheduler.py:verify_max_model_len.
    Source: vllm/engine/arg_utils.py:_set_default_max_num_seqs_and_batched_tokens_args, create_engine_config.
    """
    factor = 2 if request.performance_mode == "throughput" else 1
    seqs = request.max_num_seqs or default[1] * factor
    tokens_each = 1 + request.num_speculative_tokens if request.enable_lora else 1
    tokens = request.max_num_batched_tokens
    if tokens is None:
        length = request.length or model.max_model_len
        tokens = min(default[0] * factor, seqs * length)
        if not splits_prompts(request, model):
            tokens = max(tokens, length)
        items = (size for _, size in unsplit_item(request, model))
        tokens = max(tokens, (request.max_num_seqs or 1) * tokens_each, *items)
    return tokens, request.max_num_seqs or max(1, min(seqs, tokens // tokens_each))


def without_windows(model: Model) -> Model:
    """Return ``model`` as vLLM runs it with --disable-sliding-window: every layer keeps all tokens.

    Requests then are at most as long as the window (vllm/config/model.py:_get_and_verify_max_len).
    """
    windows = [layer.window for layer in model.layers if layer.kind == "sliding" and layer.window]
    if not windows:
        return model
    layers = tuple(
        msgspec.structs.replace(layer, kind="full", window=None) if layer.kind == "sliding" else layer
        for layer in model.layers
    )
    return msgspec.structs.replace(model, layers=layers, max_model_len=min(model.max_model_len, *windows))


def unsplit_item(request: PlanRequest, model: Model) -> tuple[tuple[str, int], ...]:
    """Return the largest item as (modality, tokens) if a batch must hold all of it, else ().

    Source: v1/core/encoder_cache_manager.py:compute_mm_encoder_budget ("Chunked MM input disabled").
    """
    media = model.media
    if media is None or request.language_model_only or (media.chunked and not request.disable_chunked_mm_input):
        return ()
    length, limits = request.length or model.max_model_len, request.item_limits
    sizes = [(item.modality, item.tokens_within(length)) for item in media.items if limits.get(item.modality) != 0]
    return (max(sizes, key=lambda size: size[1]),) if sizes else ()


def splits_prompts(request: PlanRequest, model: Model) -> bool:
    """Whether vLLM splits a prompt over several batches: the user's choice, or else what the model allows.

    Source: engine/arg_utils.py:_set_default_chunked_prefill_and_prefix_caching_args, config/scheduler.py.
    """
    if any(layer.cross for layer in model.layers):  # an encoder-decoder model
        return False
    return model.chunked_prefill if request.enable_chunked_prefill is None else request.enable_chunked_prefill


def should_use_fp8_cache(model: Model, oldest: Generation | None) -> bool:
    """Whether the plan should use an FP8 KV cache if it may. ``oldest`` is the oldest GPU generation.

    FlashAttention reads FP8 on Hopper, and FlashInfer reads it on other GPUs from Ada on
    (v1/attention/backends/flash_attn.py, flashinfer.py: supports_kv_cache_dtype). MLA caches are small already and
    would need other kernels. A cache dtype in the checkpoint is kept.
    """
    has_cache = any(layer.kv_heads for layer in model.layers)
    set_by_checkpoint = model.quantization is not None and model.quantization.kv_cache_dtype is not None
    return has_cache and not set_by_checkpoint and model.mla is None and oldest is not None and oldest >= Generation.ADA


def dtype_of(request: PlanRequest, model: Model, oldest: Generation | None, cpu: Cpu | None = None) -> str:
    """Return the dtype that the model computes in: the user's choice, or else the model's own.

    GPUs before the A100 have no bfloat16, so vLLM uses float16, or float32 for models that cannot use float16. On a CPU
    with AMX the plan sets the same dtypes (see ``amx_attention``). Source: vllm/config/model.py:_resolve_auto_dtype.
    """
    if request.dtype not in {None, "auto"}:
        return ALIASES.get(request.dtype, request.dtype)
    if model.dtype != "bfloat16":
        return model.dtype
    too_old = oldest is not None and oldest < Generation.A100
    if not too_old and (only_bfloat16(request, model) or not amx_attention(model, cpu)):
        return "bfloat16"
    return "float32" if model.model_type in NO_FLOAT16 else "float16"


def amx_attention(model: Model, cpu: Cpu | None) -> bool:
    """Whether vLLM's attention uses AMX instructions on ``cpu`` if ``model`` computes in bfloat16.

    On some hosts this attention crashes the engine with SIGILL (docs/decisions/026-no-bfloat16-on-amx.md). MLA and
    heads whose size is not a multiple of 32 use other code. Source:
    v1/attention/backends/cpu_attn.py:_get_attn_isa, platforms/cpu.py:get_attn_backend_cls.
    """
    if cpu is None or not cpu.amx or model.mla is not None:
        return False
    return any(layer.kv_heads and layer.head_dim % 32 == 0 for layer in model.layers)


def only_bfloat16(request: PlanRequest, model: Model) -> bool:
    """Whether the quantisation, set by the user or the checkpoint, supports only bfloat16."""
    checkpoint_method = model.quantization.method if model.quantization else None
    return (request.quantization or checkpoint_method) in ONLY_BFLOAT16


def run_of(
    request: PlanRequest, model: Model, batch: tuple[int, int], oldest: Generation | None, cpu: Cpu | None = None
) -> RunConfig:
    """Return the engine arguments that memory use depends on, with ``batch`` = (max_num_batched_tokens, max_num_seqs).

    ``oldest`` is the oldest generation of the GPUs. It is None on the CPU engine, which runs on ``cpu``.
    """
    config = request.compilation_config
    compilation = compilation_of(
        model, enforce_eager=request.enforce_eager, optimization_level=request.optimization_level, config=config
    )
    return RunConfig(
        max_model_len=request.length or model.max_model_len,
        max_num_seqs=batch[1],
        max_num_batched_tokens=batch[0],
        kv_cache_dtype=request.kv_cache_dtype
        or ("fp8" if request.fp8_kv and should_use_fp8_cache(model, oldest) else "auto"),
        block_size=request.block_size,
        num_gpu_blocks_override=request.num_gpu_blocks_override,
        enable_prefix_caching=request.enable_prefix_caching,
        disable_hybrid_kv_cache_manager=request.disable_hybrid_kv_cache_manager is True,
        async_scheduling=request.async_scheduling is not False,
        compiled=compilation.compiled,
        cudagraph_mode=compilation.cudagraph_mode,
        cudagraph_capture_sizes=request.cudagraph_capture_sizes or config.get("cudagraph_capture_sizes"),
        max_cudagraph_capture_size=request.max_cudagraph_capture_size or config.get("max_cudagraph_capture_size"),
        performance_mode=request.performance_mode or "balanced",
        num_speculative_tokens=request.num_speculative_tokens,
        verifies_in_chunks=request.verifies_in_chunks,
        redundant_experts=request.redundant_experts,
        offload=request.offload,
        language_model_only=request.language_model_only,
        item_limits=request.item_limits,
        skip_mm_profiling=request.skip_mm_profiling,
        mm_encoder_tp_mode=request.mm_encoder_tp_mode or "weights",
        quantization=request.quantization,
        dtype=dtype_of(request, model, oldest, cpu),
        fuse_allreduce_rms=request.fuse_allreduce_rms and compilation.fuse_allreduce_rms,
        adapter_ranks=(request.max_loras or 1) * (request.max_lora_rank or 16) if request.enable_lora else 0,
        estimate_cudagraphs=request.vllm_estimates_graphs,
        expandable_segments=request.expandable_segments,
    )
