"""Computes the memory of sparse attention in bytes, by the rules of vLLM 0.32.0. Pure.

Sparse attention reads only the tokens that an indexer chooses.
"""

from __future__ import annotations

import math

from vllm_launch.model.model import Model
from vllm_launch.sizing.kv_layers import is_sparse, stored_dtype
from vllm_launch.sizing.placement import Placement
from vllm_launch.units import MIB

INDEXER_LOGITS = 512 * MIB
"""Bytes of the indexer's logits that vLLM allows at once. Source: envs.py:VLLM_SPARSE_INDEXER_MAX_LOGITS_MB."""

RADIX_WORKSPACE = MIB
"""Bytes for choosing the tokens with the largest logits (layers/indexer_topk.py:RADIX_TOPK_WORKSPACE_SIZE)."""

LONG_CONTEXT = 256 * 1024
"""Largest max_model_len for which the workspace holds 5 contexts of that length. Above it, the workspace holds 2.
Source: config/vllm.py: sparse_mla_prefill_workspace_factor."""

GATHERED_REQUESTS = 4
"""Number of prefill requests whose vectors DeepSeek V4 gathers at the same time.
Source: deepseek_v4/attention.py:PREFILL_CHUNK_SIZE."""

PACKED_ROPE = 64
"""Number of values in a packed FP8 vector that hold the rotary part of a key. The format has this part even if the
model has no rotary embeddings."""


def has_dense_attention(model: Model) -> bool:
    """Whether a layer's attention reads its whole context or window, instead of tokens that an indexer chose.

    With ``index_topk`` all layers read chosen tokens. MiniMax M3 has layers of both kinds.
    """
    if is_sparse(model) and model.index_topk:
        return False
    return any(layer.kind in {"full", "sliding", "chunked", "mla"} and not layer.index_bytes for layer in model.layers)


def chosen_indices(placement: Placement) -> int:
    """Return the bytes of the buffer with the tokens that the indexers chose, which all layers share."""
    return 4 * placement.run_config.max_num_batched_tokens * placement.model.index_topk


def sparse_workspace(placement: Placement) -> int:
    """Return the bytes of the workspace that sparse attention reserves. MoE layers use the same memory.

    Source: layers/sparse_attn_indexer.py (_gather_workspace_shapes), backends/mla/indexer.py
    (get_max_prefill_buffer_size), backends/mla/flashmla_sparse.py (workspace_specs), deepseek_v4/nvidia/flashmla.py.
    """
    model, run = placement.model, placement.run_config
    if not is_sparse(model):
        return 0
    contexts = 5 if run.max_model_len <= LONG_CONTEXT else 2
    gathered = 0
    for layer in model.layers:
        if layer.index_bytes:
            tokens = run.max_model_len * (576 * 2 // 132) * contexts // max(1, layer.compression)
            gathered = max(gathered, tokens * layer.index_bytes + RADIX_WORKSPACE)
    return max(gathered, _compressed_workspace(placement), _packed_workspace(placement, contexts))


def padded_query_heads(placement: Placement) -> int:
    """Return the query heads on one GPU, padded to a multiple of 64 as FlashMLA's kernels need them."""
    return math.ceil(placement.model.heads // placement.layout.tensor / 64) * 64


def _compressed_workspace(placement: Placement) -> int:
    """Return the bytes for the gathered vectors of DeepSeek V4 in bfloat16, and for the indices of those it reads."""
    model, run = placement.model, placement.run_config
    tokens, most = run.max_num_batched_tokens, 0
    for layer in model.layers:
        if layer.kind == "compressed":
            vectors = math.ceil(run.max_model_len / layer.compression) if layer.compression > 1 else 0
            rows = vectors + (layer.window or 0) + tokens
            indices = math.ceil((model.index_topk + (layer.window or 0)) / 128) * 128
            most = max(most, GATHERED_REQUESTS * rows * layer.head_dim * 2 + 4 * tokens * (indices + 1))
    return most


def _packed_workspace(placement: Placement, contexts: int) -> int:
    """Return the bytes that FlashMLA's sparse kernels reserve.

    Without packed vectors these are padded queries. With packed FP8 vectors they are the vectors of ``contexts``
    contexts, queries with and without padding, and outputs with and without padding.
    """
    model, run, mla = placement.model, placement.run_config, placement.model.mla
    if mla is None or placement.gpu is None:
        return 0
    latent = mla.kv_lora_rank
    width = latent + mla.qk_rope_head_dim
    heads, padded = model.heads // placement.layout.tensor, padded_query_heads(placement)
    if not stored_dtype(placement).startswith("fp8"):
        return 2 * run.max_num_batched_tokens * padded * width
    width = max(width, latent + PACKED_ROPE)
    per_token = heads * width + padded * (width + latent) + heads * latent
    return 2 * (contexts * run.max_model_len * width + run.max_num_batched_tokens * per_token)
