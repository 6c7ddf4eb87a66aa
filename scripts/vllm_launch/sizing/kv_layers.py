"""The KV caches of each layer on one GPU: dtypes, block sizes and pages, by the rules of vLLM 0.32.0. Pure."""

from __future__ import annotations

import math

import msgspec

from vllm_launch.machine.generation import Generation
from vllm_launch.model.dtypes import COMPUTE_BITS, STORED_BITS
from vllm_launch.model.layer_kinds import ATTENTION_FREE
from vllm_launch.model.model import Layer, Model
from vllm_launch.sizing.kv_compressed import COMPRESSED_BLOCK, compressed_specs
from vllm_launch.sizing.kv_spec import Spec
from vllm_launch.sizing.parallel import Layout
from vllm_launch.sizing.placement import Placement
from vllm_launch.sizing.run_config import RunConfig

FP8 = {"fp8", "fp8_e4m3"}

INDEX_PAGE = 32
"""Keys in the smallest page of an indexer's kernel (v1/attention/backends/mla/indexer.py: get_paged_mqa_page_sizes)."""

_SCALE_BYTES = 4  # float32, one per token and head for keys, and one for values
_PACKED_LATENT = {"fp8_ds_mla": 656, "nvfp4_ds_mla": 352}
"""Bytes of a token in formats that pack the latent vector and its scales (MLAAttention.get_kv_cache_spec)."""


def kv_dtype(model: Model, run: RunConfig) -> str:
    """Return the cache's dtype. "auto" means the checkpoint's cache dtype, or else the model's dtype.

    Source: vllm/utils/torch_utils.py:resolve_kv_cache_dtype_string, layers/attention/attention.py.
    """
    if run.kv_cache_dtype != "auto":
        return run.kv_cache_dtype
    if model.quantization and model.quantization.kv_cache_dtype:
        return model.quantization.kv_cache_dtype
    return run.dtype


def stored_dtype(placement: Placement) -> str:
    """Return ``kv_dtype`` as the layers store it. FlashMLA's sparse kernels pack FP8 in their own format.

    Source: layers/attention/mla_attention.py:_canonicalize_sparse_mla_kv_cache_dtype, and the first backend that
    platforms/cuda.py:_get_backend_priorities lists for the GPU.
    """
    dtype = kv_dtype(placement.model, placement.run_config)
    packs_fp8 = placement.generation in {Generation.HOPPER, Generation.BLACKWELL_RTX}
    if packs_fp8 and is_sparse(placement.model) and dtype in FP8:
        return "fp8_ds_mla"
    return dtype


def is_sparse(model: Model) -> bool:
    """Whether layers choose the tokens that they read."""
    return any(layer.index_bytes for layer in model.layers)


def block_size(placement: Placement) -> int:  # noqa: PLR0911 - one return for each kind of backend
    """Return the tokens in a block. For hybrid models, ``layer_specs`` increases it.

    Source: platforms/interface.py:update_block_size_for_backend, platforms/cpu.py, and the first MLA backend that
    platforms/cuda.py:_get_backend_priorities lists for the GPU.
    """
    model, run, gpu = placement.model, placement.run_config, placement.gpu
    if gpu is None:
        return 16 if model.mla else run.block_size or 128
    if run.block_size is not None:
        return run.block_size
    if any(layer.kind == "compressed" for layer in model.layers):
        return COMPRESSED_BLOCK
    if ratio := max((layer.compression for layer in model.layers if layer.index_ring), default=0):
        # GLM 5 Next and Qwen 4. The block grows to hold a recurrent state.
        keys = 64 if placement.generation is Generation.BLACKWELL_RTX else INDEX_PAGE
        return ratio * keys if model.mla else 16
    if is_sparse(model) and model.mla is None:
        return 128  # MiniMax M3's blocks of keys (models/minimax_m3/nvidia)
    if is_sparse(model):
        return 64  # mla/indexer.py. A multiple of the block size of every sparse backend.
    if model.mla and placement.generation is Generation.BLACKWELL:
        return 32  # FLASHINFER_MLA: the smallest of [32, 64]
    if model.mla and placement.generation is Generation.HOPPER and kv_dtype(model, run) in FP8:
        return 64  # FLASHMLA: FLASH_ATTN_MLA reads no FP8
    return 16


def layer_specs(placement: Placement) -> list[tuple[Spec, ...]]:
    """Return the caches of each layer on one GPU, in the model's order.

    A layer has no cache, one cache, or a cache for attention and one for its state. In a hybrid model, attention pages
    grow until they hold a recurrent state, and states are padded to the same size. Prefix caching is vLLM's default for
    these models, but not for models without attention (platforms/interface.py:_align_hybrid_block_size,
    config/model.py:is_prefix_caching_supported).
    """
    model, run, layout = placement.model, placement.run_config, placement.layout
    block = block_size(placement)
    dtype = stored_dtype(placement)
    attention = [layer for layer in model.layers if layer.kind not in {"mamba", "none"}]
    state = max((_state_bytes(layer, layout) for layer in set(model.layers)), default=0)
    if state and not attention:
        # A hybrid whose layers happen to have no attention has prefix caching too.
        chosen, default = run.enable_prefix_caching, model.model_type not in ATTENTION_FREE
        state_only = _state_spec(model, run, block, state, caching=default if chosen is None else chosen)
        return [(state_only,) if layer.kind == "mamba" else () for layer in model.layers]
    state_spec = None
    if state:
        token_bytes = max(_page_bytes(layer, layout, 1, dtype, model.dtype) for layer in attention)
        unit = max(block, 128) if model.mla else block
        block = max(block, unit * math.ceil(state / (unit * token_bytes)))
        caching = run.enable_prefix_caching is not False
        state_spec = _state_spec(model, run, block, block * token_bytes, caching=caching)
    if any(layer.kind == "compressed" for layer in model.layers):
        packed = kv_dtype(model, run) not in COMPUTE_BITS or run.kv_cache_dtype == "auto"
        return [compressed_specs(layer, block, packed=packed) for layer in model.layers]
    return [
        (
            *(
                [_attention_spec(layer, layout, block, dtype, model.dtype)] * layer.attentions
                if layer.kind not in {"mamba", "none"}
                else []
            ),
            *(
                _attention_spec(
                    msgspec.structs.replace(layer, kind="sliding", window=window), layout, block, dtype, model.dtype
                )
                for window in layer.loop_windows
            ),
            *([state_spec] if state_spec and layer.state_shapes else []),
            *_index_specs(layer, block),
            *([_cross_spec(layer, placement, block, dtype)] if layer.cross else []),
        )
        for layer in model.layers
    ]


def _index_specs(layer: Layer, block: int) -> list[Spec]:
    """Return the caches of a sparse attention's indexer. A request has one block of a ring."""
    if not layer.index_bytes:
        return []
    index = Spec(kind="mla", block=block, page=block // max(1, layer.compression) * layer.index_bytes)
    return [
        index,
        *([Spec(kind="circular", block=layer.compression, page=layer.index_ring)] if layer.index_ring else []),
    ]


def _state_spec(model: Model, run: RunConfig, block: int, page: int, *, caching: bool) -> Spec:
    """Return the cache of a recurrent state.

    With prefix caching a request has two states, and one more if a prefill stores a checkpoint. Without, it has one
    (MambaSpec.max_memory_usage_bytes, models/config.py:MambaModelConfig).
    """
    if not caching:
        return Spec(kind="mamba", block=run.max_model_len, page=page, states=1)
    checkpoints = max(layer.state_checkpoints for layer in model.layers)
    return Spec(kind="mamba", block=block, page=page, states=2 + checkpoints)


def _attention_spec(layer: Layer, layout: Layout, block: int, dtype: str, model_dtype: str) -> Spec:
    heads = 1 if layer.kind == "mla" else max(1, layer.kv_heads // layout.tensor)
    return Spec(
        kind=layer.kind,
        block=block,
        page=_page_bytes(layer, layout, block, dtype, model_dtype),
        window=layer.window or 0 if layer.kind in {"sliding", "chunked"} else 0,
        shape=(heads, layer.head_dim, layer.head_dim_v),
    )


def _cross_spec(layer: Layer, placement: Placement, block: int, dtype: str) -> Spec:
    """Return the cache of an encoder's states. vLLM plans as many of them for a request as one batch has tokens.

    Source: v1/kv_cache_interface.py:CrossAttentionSpec, config/scheduler.py:max_num_encoder_input_tokens.
    """
    spec = _attention_spec(layer, placement.layout, block, dtype, placement.model.dtype)
    return msgspec.structs.replace(spec, kind="cross", window=placement.run_config.max_num_batched_tokens)


def _page_bytes(layer: Layer, layout: Layout, block: int, dtype: str, model_dtype: str) -> int:
    """Return the bytes of one layer's page on one GPU.

    MLA stores one latent vector per token, complete on every tensor-parallel rank. Source:
    AttentionSpec.unpadded_page_size_bytes and the packing of the backends.
    """
    if layer.kind == "mla":
        return block * (_PACKED_LATENT.get(dtype) or layer.head_dim * _element_bytes(dtype, model_dtype))
    heads = max(1, layer.kv_heads // layout.tensor)
    widths = (layer.head_dim, layer.head_dim_v or layer.head_dim)
    if dtype.startswith("nvfp4"):
        return block * heads * sum(width // 2 + width // 16 for width in widths)
    if dtype == "int4_per_token_head":
        return block * heads * sum(width // 2 + _SCALE_BYTES for width in widths)
    scales = 2 * _SCALE_BYTES if dtype.endswith("_per_token_head") else 0
    return block * heads * (sum(widths) * _element_bytes(dtype, model_dtype) + scales)


def _element_bytes(dtype: str, model_dtype: str) -> int:
    if dtype.startswith(("fp8", "int8")):
        return 1
    return COMPUTE_BITS.get(dtype, COMPUTE_BITS[model_dtype]) // 8


def _state_bytes(layer: Layer, layout: Layout) -> int:
    """Return the bytes of a layer's recurrent state on one GPU. Each state is split over the tensor-parallel ranks."""
    return sum(
        math.ceil(math.prod(shape) / layout.tensor) * STORED_BITS[dtype] // 8
        for shape, dtype in zip(layer.state_shapes, layer.state_dtypes, strict=True)
    )
