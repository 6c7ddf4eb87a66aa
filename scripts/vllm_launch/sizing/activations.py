"""Temporary memory of a GPU during a forward pass, in bytes: hidden states, attention, experts, logits. Pure."""

from __future__ import annotations

import functools
import math

from vllm_launch.machine.generation import Generation
from vllm_launch.sizing.cuda_graphs import MAX_SPLIT_REQUESTS
from vllm_launch.sizing.encoder import active_items
from vllm_launch.sizing.kv_layers import is_sparse
from vllm_launch.sizing.parallel import expert_width, padded_vocab
from vllm_launch.sizing.placement import Placement
from vllm_launch.sizing.sparse import INDEXER_LOGITS, has_dense_attention, padded_query_heads, sparse_workspace
from vllm_launch.units import MIB

SOFT_CAPPED = {"gemma2", "gemma3n", "gemma3n_text", "gemma4", "gemma4_text"}
"""Model types with soft-capped logits: divide, tanh and multiply each make a copy (layers/logits_processor.py)."""

ALLOCATED_AFTER_TIMING = 50 * MIB
"""Bytes that vLLM's profile allocates and keeps after Inductor compiled the first kernels, mainly cuBLAS workspaces.
Measured: H100, 2026-11-26, three runs of 1.06, 0.96 and 1.56 GiB: 49.7 to 50.0 MiB."""

MULTIPROCESSORS = 132
"""Number of multiprocessors of an H100 SXM, H200 or GH200. An H100 PCIe has 114 and needs less memory.
Source: NVIDIA's data sheets."""


def activation_peak(placement: Placement, *, first: bool, last: bool) -> int:
    """Return the peak of temporary bytes in the profile's forward pass or, on the last rank, in its sampler.

    A compiled feed-forward layer holds its input, the residual, its output, gate, up, and their product. The greedy
    sampler holds one copy of the logits. Source: v1/worker/gpu/model_runner.py:profile_run.
    """
    model, run, layout = placement.model, placement.run_config, placement.layout
    tokens, width, hidden = run.max_num_batched_tokens, run.activation_bytes, model.hidden_size
    # A compiled graph must not change its input, so vLLM copies the input that comes from the previous stage.
    copies = model.residual_copies
    residual_stream = (2 * copies + 1 + (0 if first or not run.compiled else copies)) * tokens * hidden * width
    tensor = layout.tensor
    layer_parts = [_attention_tensors(placement)]
    if model.experts is None or any(not layer.moe for layer in model.layers):
        layer_parts.append(3 * tokens * width * model.intermediate_size // tensor)
    if model.experts and model.experts.shared_intermediate_size:
        layer_parts.append(3 * tokens * width * model.experts.shared_intermediate_size // tensor)
    if model.experts:
        scratch = 0
        if _experts_allocate_scratch(placement):
            # The Triton kernels allocate gate and up for every chosen expert, before and after the activation function.
            shard = expert_width(model.experts, layout)
            scratch = tokens * layout.data * model.experts.per_token * width * (4 * shard + 2 * hidden)
        layer_parts.append(_gathered_hidden_states(placement) + scratch)
    peak = residual_stream + max(layer_parts)
    if last and model.task == "generate":
        seqs = min(run.max_num_seqs, tokens)
        logits = seqs * padded_vocab(model.vocab_size) * width
        if tensor > 1:  # the rank's shard, the shards of all ranks, and a copy in the vocabulary's order
            logits = logits // tensor + 2 * logits
        elif model.model_type in SOFT_CAPPED:
            logits *= 2
        peak = max(peak, tokens * hidden * width + seqs * hidden * width + logits + 16 * MIB)
    if first and active_items(model, run):
        peak += tokens * hidden * width  # embeddings of text and items, before they are copied into their buffer
    return peak


def _attention_tensors(placement: Placement) -> int:
    """Return the bytes that are alive around a layer's attention, besides input, residual and output.

    The profile does not run attention itself. Normalised queries and keys are alive together with their inputs, but
    the result of the layer's own norm is no longer needed. For MLA vLLM reserves a workspace for keys and values of
    the longest prefill. Source: models/qwen3_moe.py and layers/mla.py (forward),
    mla_attention.py:determine_chunked_prefill_workspace_size.
    """
    model, run, layout = placement.model, placement.run_config, placement.layout
    tokens, width, mla = run.max_num_batched_tokens, run.activation_bytes, model.mla
    logits = INDEXER_LOGITS if is_sparse(model) else 0
    if any(layer.kind == "compressed" for layer in model.layers):
        # Queries and outputs are padded. Compressors compute keys and scores in float32, twice as wide if they overlap.
        compressors = 3 * 2 * 2 * 4 * model.head_dim
        return logits + tokens * (2 * padded_query_heads(placement) * model.head_dim * width + compressors)
    if mla is None:
        queries, keys = model.heads * model.head_dim // layout.tensor, model.kv_heads * model.head_dim // layout.tensor
        with_norm = 3 * (queries + keys) - model.hidden_size if model.qk_norm else 0
        return logits + tokens * width * max(queries + 2 * keys, with_norm)
    heads, head = model.heads // layout.tensor, mla.qk_nope_head_dim + mla.v_head_dim
    workspace_tokens = min(max(8 * run.max_model_len, 4 * run.max_num_seqs * 16), 64 * 1024)
    latent = 2 * mla.kv_lora_rank + mla.qk_rope_head_dim  # before and after its norm
    alive = heads * (head + mla.qk_rope_head_dim) + latent - model.hidden_size
    return max(logits, width * workspace_tokens * heads * head) + width * tokens * alive


def timing_peak(placement: Placement) -> int:
    """Return the peak of temporary bytes on the first rank while Inductor times the kernels of the first graph.

    This graph looks up tokens and normalises them. Inductor times the combined kernel on its own arguments, which need
    a second embedding table (config/compilation.py: benchmark_combo_kernel). Inductor combines nothing if an all-reduce
    is between the two, or if the embeddings come from outside the graph. It times nothing if the compile cache has the
    model. So a later start has this memory for its KV cache.
    """
    model, run, layout = placement.model, placement.run_config, placement.layout
    external_embeddings = bool(active_items(model, run))
    if layout.tensor > 1 or not run.compiled or external_embeddings:
        return 0
    row = model.hidden_size * run.activation_bytes
    allocated_later = ALLOCATED_AFTER_TIMING + workspace(placement)
    return (padded_vocab(model.vocab_size) + 2 * run.max_num_batched_tokens) * row - allocated_later


def attention_peak(placement: Placement) -> int:
    """Return the peak of temporary bytes in a layer's attention while vLLM serves. The profile runs no attention.

    FlashAttention 3 splits long contexts so that few queries still use the whole GPU. It keeps the output of each
    split in float32 for every token of the batch. It chooses the number of splits as if the longest request were alone.
    So the worst case is a batch full of short prompts with one long context. Source: vllm-project/flash-attention,
    hopper/flash_api.cpp:mha_fwd and get_num_splits. Measured: H100, 2026-11-26: it requested 896 MiB at once and ran
    out of memory.
    """
    model, run, layout = placement.model, placement.run_config, placement.layout
    heads, groups = model.heads // layout.tensor, max(1, model.kv_heads // layout.tensor)
    dense = has_dense_attention(model)
    if placement.generation is not Generation.HOPPER or model.mla or not dense or heads < groups:
        return 0
    tile = 192 if model.head_dim <= 96 else 128  # noqa: PLR2004 - hopper/tile_size.h:tile_size_fwd_sm90
    requests, tokens = min(run.max_num_seqs, MAX_SPLIT_REQUESTS), run.max_num_batched_tokens
    scratch = 0
    for tiles in range(1, math.ceil(0.8 * MULTIPROCESSORS / groups)):
        queries = min(tokens, requests * (tiles * tile // (heads // groups)))
        splits = _split_count(tiles * groups, math.ceil(run.max_model_len / 128))
        scratch = max(scratch, splits * queries * heads * (model.head_dim + 1) * 4)
    channels = 2 * model.hidden_size + 2 * (heads + groups) * model.head_dim  # input, residual, Q, K, V, output
    return scratch + tokens * channels * run.activation_bytes


@functools.cache
def _split_count(tiles: int, blocks: int) -> int:
    """Return the number of splits of a context of ``blocks`` tiles of keys, for ``tiles`` tiles of queries.

    It is the smallest number that uses at least 85 % as much of the GPU as the best number does.
    Source: hopper/heuristics.h:num_splits_heuristic.
    """
    if blocks <= 4:  # noqa: PLR2004 - the heuristic's own limit
        return 1
    waves = [tiles * number / MULTIPROCESSORS for number in range(1, min(128, blocks) + 1)]
    shares = [wave / math.ceil(wave) for wave in waves]
    return next(number for number, share in enumerate(shares, 1) if share >= 0.85 * max(shares))


def _gathered_hidden_states(placement: Placement) -> int:
    """Bytes of hidden states that this rank's experts receive from the other replicas.

    vLLM's default gathers the batches of all replicas before the experts and scatters the sum after them, with and
    without expert parallelism. Source: fused_moe/prepare_finalize/naive_dp_ep.py, device_communicators/all2all.py:
    AgRsAll2AllManager.
    """
    model, run, layout = placement.model, placement.run_config, placement.layout
    if layout.data == 1:
        return 0
    return run.max_num_batched_tokens * layout.data * model.hidden_size * run.activation_bytes


def workspace(placement: Placement) -> int:
    """Return the bytes of the workspace that MoE layers and sparse attention share (v1/worker/workspace.py).

    Source of MoE layers: fused_moe/experts/triton_moe.py:workspace_shapes.
    """
    model, run, layout = placement.model, placement.run_config, placement.layout
    attention = sparse_workspace(placement)
    if not model.experts:
        return attention
    # The tokens of all replicas pass through a rank's experts (_gathered_hidden_states).
    rows = run.max_num_batched_tokens * layout.data * model.experts.per_token
    shard = expert_width(model.experts, layout)
    if _experts_allocate_scratch(placement):
        return max(attention, rows * shard * run.activation_bytes)
    experts = rows * (max(shard, model.hidden_size) + max(2 * shard, model.hidden_size)) * run.activation_bytes
    return max(attention, experts)


def _experts_allocate_scratch(placement: Placement) -> bool:
    """Whether the expert kernels allocate their own scratch memory instead of using the shared workspace.

    The MXFP4 kernels on Hopper and data-centre Blackwell do. On other GPUs Marlin uses the shared workspace, like
    Triton's other expert kernels. Source:
    fused_moe/oracle/mxfp4.py, experts/gpt_oss_triton_kernels_moe.py and marlin_moe.py (workspace_shapes).
    """
    model = placement.model
    mxfp4 = model.quantization is not None and "mxfp4" in model.quantization.method
    return mxfp4 and placement.generation in {None, Generation.HOPPER, Generation.BLACKWELL}
