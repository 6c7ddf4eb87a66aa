"""The caches of a layer of DeepSeek V4, as vLLM 0.32.0 lays them out. Pure.

Source: vllm/models/deepseek_v4/attention.py (MLAAttentionSpec) and compressor.py (CompressorStateCache). Tensor
parallelism splits none of them (max_tp_shards=1).
"""

from __future__ import annotations

from vllm_launch.model.layers import INDEXED_RATIO
from vllm_launch.model.model import Layer
from vllm_launch.sizing.kv_spec import Spec

COMPRESSED_BLOCK = 256
"""Tokens in a page of compressed vectors. The backends support no other number."""

_WINDOW_BLOCK = 64
_PACKED_VECTOR = 584
"""Bytes of a vector in the packed FP8 format: 448 without position, 128 with it in bfloat16, and 8 of scales."""

_PACKED_ALIGNMENT, _ALIGNMENT = 576, 512
_STATE_BLOCKS = {4: 4, 128: 8}
"""Tokens in a page of a compressor's state, by the tokens in one vector."""


def compressed_specs(layer: Layer, block: int, *, packed: bool) -> tuple[Spec, ...]:
    """Return the caches of ``layer``. ``packed``: vectors are in the packed FP8 format, and not in bfloat16."""
    vector = _PACKED_VECTOR if packed else 2 * layer.head_dim
    align = _PACKED_ALIGNMENT if packed else _ALIGNMENT
    specs = [
        Spec(
            kind="sliding mla",
            block=_WINDOW_BLOCK,
            page=_aligned(_WINDOW_BLOCK * vector, align),
            window=layer.window or 0,
        )
    ]
    ratio = layer.compression
    if ratio <= 1:
        return tuple(specs)
    specs.append(Spec(kind="mla", block=block, page=_aligned(block // ratio * vector, align)))
    specs.append(_state(ratio, layer.head_dim, align))
    if layer.index_bytes:
        specs.append(Spec(kind="mla", block=block, page=_aligned(block // ratio * layer.index_bytes, align)))
        specs.append(_state(ratio, layer.index_bytes // 33 * 32, align))  # 4 bytes of scale beside 128 of values
    return tuple(specs)


def _state(ratio: int, width: int, align: int) -> Spec:
    """Return the cache of a compressor's state: keys and scores in float32, of tokens that are not compressed yet."""
    overlap = 2 if ratio == INDEXED_RATIO else 1
    block = _STATE_BLOCKS.get(ratio, 8)
    return Spec(
        kind="sliding mla", block=block, page=_aligned(block * 2 * overlap * width * 4, align), window=overlap * ratio
    )


def _aligned(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
