"""What a GPU holds for a moment during a pass: hidden states, attention, experts, logits. Bytes. Pure."""

from __future__ import annotations

import functools
import math

from vllm_launch.machine.generation import Generation
from vllm_launch.sizing.cuda_graphs import SPLIT_REQUESTS
from vllm_launch.sizing.parallel import expert_width, padded_vocab
from vllm_launch.sizing.placement import Placement
from vllm_launch.units import MIB

SOFT_CAPPED = {"gemma2", "gemma3n", "gemma3n_text", "gemma4", "gemma4_text"}
"""Model types whose logits are divided, bent and multiplied, each time into a copy (layers/logits_processor.py)."""

TIMED_BEFORE = 50 * MIB
"""Of what the profile leaves allocated, cuBLAS' workspaces above all, what comes after the first kernels were compiled.
H100, 2026-11-26, three runs of 1.06, 0.96 and 1.56 GiB: 49.7 to 50.0 MiB."""

MULTIPROCESSORS = 132
"""Of an H100 SXM, H200 or GH200 (NVIDIA's data sheets); an H100 PCIe has 114, which needs less."""


def activation_peak(placement: Placement, *, first: bool, last: bool) -> int:
    """The most that the profile's forward pass or, on the last rank, its sampler holds for a moment.

    A compiled feed-forward holds its input, the residual, its output, and gate, up and their product; the greedy
    sampler keeps one copy of the logits. Source: v1/worker/gpu/model_runner.py:profile_run.
    """
    model, run, layout = placement.model, placement.run_config, placement.layout
    tokens, width, hidden = run.max_num_batched_tokens, run.activation_bytes, model.hidden_size
    # What arrives from the stage before is copied, since a compiled graph may not change what it is given.
    stream = (3 if first or run.enforce_eager else 4) * tokens * hidden * width
    tensor = layout.tensor
    inner = [_around_attention(placement)]
    if model.experts is None or any(not layer.moe for layer in model.layers):
        inner.append(3 * tokens * width * model.intermediate_size // tensor)
    if model.experts and model.experts.shared_intermediate_size:
        inner.append(3 * tokens * width * model.experts.shared_intermediate_size // tensor)
    if model.experts:
        expanded = 0
        if _in_kernel(placement):
            # The Triton kernels allocate gate and up, before and after their activation, for every chosen expert.
            cut = expert_width(model.experts, layout)
            expanded = tokens * layout.data * model.experts.per_token * width * (4 * cut + 2 * hidden)
        inner.append(_arriving(placement) + expanded)
    peak = stream + max(inner)
    if last and model.task == "generate":
        seqs = min(run.max_num_seqs, tokens)
        logits = seqs * padded_vocab(model.vocab_size) * width
        if tensor > 1:  # the shard, what all ranks sent, and that in the vocabulary's order
            logits = logits // tensor + 2 * logits
        elif model.model_type in SOFT_CAPPED:
            logits *= 2
        peak = max(peak, tokens * hidden * width + seqs * hidden * width + logits + 16 * MIB)
    if first and model.multimodal and not run.language_model_only:
        peak += 2 * tokens * hidden * width + 512 * MIB  # the encoder's largest item and its cache
    return peak


def _around_attention(placement: Placement) -> int:
    """What is alive around a layer's attention, which the profile does not run, beside input, residual and output.

    Normed queries and keys stand beside those they were normed from, but the layer's own norm is done with. For MLA
    vLLM reserves what its longest prefill expands. Source: models/qwen3_moe.py and layers/mla.py (forward),
    mla_attention.py:determine_chunked_prefill_workspace_size.
    """
    model, run, layout = placement.model, placement.run_config, placement.layout
    tokens, width, mla = run.max_num_batched_tokens, run.activation_bytes, model.mla
    if mla is None:
        queries, keys = model.heads * model.head_dim // layout.tensor, model.kv_heads * model.head_dim // layout.tensor
        normed = 3 * (queries + keys) - model.hidden_size if model.qk_norm else 0
        return tokens * width * max(queries + 2 * keys, normed)
    heads, head = model.heads // layout.tensor, mla.qk_nope_head_dim + mla.v_head_dim
    kept = min(max(8 * run.max_model_len, 4 * run.max_num_seqs * 16), 64 * 1024)
    latent = 2 * mla.kv_lora_rank + mla.qk_rope_head_dim  # before and after its norm
    alive = heads * (head + mla.qk_rope_head_dim) + latent - model.hidden_size
    return width * (kept * heads * head + tokens * alive)


def timing_peak(placement: Placement) -> int:
    """What the profile holds on the first rank while Inductor times the first graph's kernels: an embedding table more.

    They are timed on arguments of their own where the graph looks tokens up and normalises them (config/compilation.py:
    benchmark_combo_kernel). An all-reduce between the two, or embeddings from outside, leave nothing to combine; and
    with a compiled model in the cache nothing is timed, so that a later start has this for more KV cache.
    """
    model, run, layout = placement.model, placement.run_config, placement.layout
    from_outside = model.multimodal and not run.language_model_only
    if layout.tensor > 1 or run.enforce_eager or from_outside:
        return 0
    row = model.hidden_size * run.activation_bytes
    later = TIMED_BEFORE + workspace(placement)
    return (padded_vocab(model.vocab_size) + 2 * run.max_num_batched_tokens) * row - later


def attention_peak(placement: Placement) -> int:
    """The most that a layer's attention holds for a moment while serving; the profile runs none.

    FlashAttention 3 splits long contexts so that few queries still fill the GPU, and keeps each split's output in
    float32 for every token of the batch. It plans as if the longest request were alone, so the worst is a batch full
    of short prompts beside one long context. Source: vllm-project/flash-attention, hopper/flash_api.cpp:mha_fwd and
    get_num_splits; H100, 2026-11-26: it asked for 896 MiB at once and ran out of memory.
    """
    model, run, layout = placement.model, placement.run_config, placement.layout
    heads, groups = model.heads // layout.tensor, max(1, model.kv_heads // layout.tensor)
    if placement.generation is not Generation.HOPPER or model.mla or heads < groups:
        return 0
    tile = 192 if model.head_dim <= 96 else 128  # noqa: PLR2004 - hopper/tile_size.h:tile_size_fwd_sm90
    requests, most = min(run.max_num_seqs, SPLIT_REQUESTS), run.max_num_batched_tokens
    scratch = 0
    for tiles in range(1, math.ceil(0.8 * MULTIPROCESSORS / groups)):
        queries = min(most, requests * (tiles * tile // (heads // groups)))
        splits = _splits(tiles * groups, math.ceil(run.max_model_len / 128))
        scratch = max(scratch, splits * queries * heads * (model.head_dim + 1) * 4)
    held = 2 * model.hidden_size + 2 * (heads + groups) * model.head_dim  # input, residual, Q, K, V, output
    return scratch + most * held * run.activation_bytes


@functools.cache
def _splits(tiles: int, blocks: int) -> int:
    """Into how many a context of ``blocks`` tiles of keys is split for ``tiles`` of queries: 85 % of the best filling.

    Source: hopper/heuristics.h:num_splits_heuristic.
    """
    if blocks <= 4:  # noqa: PLR2004 - as the heuristic has it
        return 1
    waves = [tiles * number / MULTIPROCESSORS for number in range(1, min(128, blocks) + 1)]
    filled = [wave / math.ceil(wave) for wave in waves]
    return next(number for number, share in enumerate(filled, 1) if share >= 0.85 * max(filled))


def _arriving(placement: Placement) -> int:
    """Bytes of hidden states that this rank's experts receive from the other replicas.

    Without and with expert parallelism vLLM's default gathers every replica's batch before the experts and scatters
    the sum after them. Source: fused_moe/prepare_finalize/naive_dp_ep.py, device_communicators/all2all.py:
    AgRsAll2AllManager.
    """
    model, run, layout = placement.model, placement.run_config, placement.layout
    if layout.data == 1:
        return 0
    return run.max_num_batched_tokens * layout.data * model.hidden_size * run.activation_bytes


def workspace(placement: Placement) -> int:
    """What the experts share from one layer to the next (fused_moe/experts/triton_moe.py:workspace_shapes)."""
    model, run, layout = placement.model, placement.run_config, placement.layout
    if not model.experts:
        return 0
    # Every replica's tokens pass a rank's experts (_arriving).
    chosen = run.max_num_batched_tokens * layout.data * model.experts.per_token
    cut = expert_width(model.experts, layout)
    if _in_kernel(placement):
        return chosen * cut * run.activation_bytes
    return chosen * (max(cut, model.hidden_size) + max(2 * cut, model.hidden_size)) * run.activation_bytes


def _in_kernel(placement: Placement) -> bool:
    """Whether experts allocate their own scratch: the kernels for MXFP4 on Hopper and data-centre Blackwell do.

    Marlin, in their stead on other GPUs, shares a workspace as Triton's other experts do. Source:
    fused_moe/oracle/mxfp4.py, experts/gpt_oss_triton_kernels_moe.py and marlin_moe.py (workspace_shapes).
    """
    model = placement.model
    mxfp4 = model.quantization is not None and "mxfp4" in model.quantization.method
    return mxfp4 and placement.generation in {None, Generation.HOPPER, Generation.BLACKWELL}
