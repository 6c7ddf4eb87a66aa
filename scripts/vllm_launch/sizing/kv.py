"""Computes how many tokens a KV cache of a given size holds, with vLLM 0.32.0's groups and exact blocks. Pure."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Sequence

import msgspec

from vllm_launch.machine.generation import Generation
from vllm_launch.model.dtypes import COMPUTE_BITS, STORED_BITS
from vllm_launch.model.layer_kinds import ATTENTION_FREE
from vllm_launch.model.model import Layer, Model
from vllm_launch.sizing.kv_compressed import COMPRESSED_BLOCK, compressed_specs
from vllm_launch.sizing.kv_packed import packed_groups
from vllm_launch.sizing.kv_spec import Spec
from vllm_launch.sizing.parallel import Layout
from vllm_launch.sizing.placement import Placement
from vllm_launch.sizing.run_config import RunConfig

_SCALE_BYTES = 4  # float32, one per token and head for keys, and one for values
_PACKED_LATENT = {"fp8_ds_mla": 656, "nvfp4_ds_mla": 352}
"""Bytes of a token in formats that pack the latent vector and its scales (MLAAttention.get_kv_cache_spec)."""

FP8 = {"fp8", "fp8_e4m3"}

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


def kv_dtype(model: Model, run: RunConfig) -> str:
    """Return the cache's dtype. "auto" means the checkpoint's cache dtype, or else the model's dtype.

    Source: vllm/utils/torch_utils.py:resolve_kv_cache_dtype_string, layers/attention/attention.py.
    """
    if run.kv_cache_dtype != "auto":
        return run.kv_cache_dtype
    if model.quantization and model.quantization.kv_cache_dtype:
        return model.quantization.kv_cache_dtype
    return run.dtype


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
    if _is_sparse(model) and model.mla is None:
        return 128  # MiniMax M3's blocks of keys (models/minimax_m3/nvidia)
    if _is_sparse(model):
        return 64  # mla/indexer.py. A multiple of the block size of every sparse backend.
    if model.mla and placement.generation is Generation.BLACKWELL:
        return 32  # FLASHINFER_MLA: the smallest of [32, 64]
    if model.mla and placement.generation is Generation.HOPPER and kv_dtype(model, run) in FP8:
        return 64  # FLASHMLA: FLASH_ATTN_MLA reads no FP8
    return 16


def _is_sparse(model: Model) -> bool:
    return any(layer.index_bytes for layer in model.layers)


def _stored_dtype(placement: Placement) -> str:
    """Return ``kv_dtype`` as the layers store it. FlashMLA's sparse kernels pack FP8 in their own format.

    Source: layers/attention/mla_attention.py:_canonicalize_sparse_mla_kv_cache_dtype, and the first backend that
    platforms/cuda.py:_get_backend_priorities lists for the GPU.
    """
    dtype = kv_dtype(placement.model, placement.run_config)
    packs_fp8 = placement.generation in {Generation.HOPPER, Generation.BLACKWELL_RTX}
    if packs_fp8 and _is_sparse(placement.model) and dtype in FP8:
        return "fp8_ds_mla"
    return dtype


def layer_specs(placement: Placement) -> list[tuple[Spec, ...]]:
    """Return the caches of each layer on one GPU, in the model's order.

    A layer has no cache, one cache, or a cache for attention and one for its state. In a hybrid model, attention pages
    grow until they hold a recurrent state, and states are padded to the same size. Prefix caching is vLLM's default for
    these models, but not for models without attention (platforms/interface.py:_align_hybrid_block_size,
    config/model.py:is_prefix_caching_supported).
    """
    model, run, layout = placement.model, placement.run_config, placement.layout
    block = block_size(placement)
    dtype = _stored_dtype(placement)
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
                [_attention_spec(layer, layout, block, dtype, model.dtype)]
                if layer.kind not in {"mamba", "none"}
                else []
            ),
            *([state_spec] if state_spec and layer.state_shapes else []),
            *([Spec(kind="mla", block=block, page=block * layer.index_bytes)] if layer.index_bytes else []),
            *([_cross_spec(layer, placement, block, dtype)] if layer.cross else []),
        )
        for layer in model.layers
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
    if any(spec.kind == "sliding mla" for spec in pages):
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
        case "cross":
            return math.ceil(spec.window / spec.block)
        case _:
            return math.ceil(length / spec.block)


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
