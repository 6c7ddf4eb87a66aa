"""The safety margin: memory that vLLM needs while it serves and does not count when it starts, in bytes. Pure."""

from __future__ import annotations

import math
from typing import Literal

from vllm_launch.machine.generation import Generation
from vllm_launch.sizing.activations import activation_peak, attention_peak, timing_peak
from vllm_launch.sizing.allocator import fragments
from vllm_launch.sizing.encoder import profiled_encoder
from vllm_launch.sizing.kv import grouping_of
from vllm_launch.sizing.kv_layers import kv_dtype
from vllm_launch.sizing.parallel import padded_vocab
from vllm_launch.sizing.placement import Placement
from vllm_launch.units import MIB

HOST_SHARE = 1 / 16
"""Share of unified memory that stays free for the host: other programs, and the page cache through which the weights
are loaded. An estimate that is not measured. The driver can fail to allocate memory that Linux calls available
(vllm-project/vllm#56824). On a GB10 the plan then comes to a utilisation of 0.86 to 0.87. Users report 0.85 as stable,
and failures from 0.90 on (MiaAI-Lab/DeepSeek-v4-Flash-DSpark-2x-DGX-Spark#5)."""

PIPELINE_CHANNELS = 256 * MIB
"""Bytes of NCCL's send and receive channels between pipeline stages. The profile does not open them."""

FLASHINFER_WORKSPACE, FLASHINFER_BYTES = 394 * MIB, 16
"""Bytes of the workspace of FlashInfer's attention: the minimum, and for each element of a batch's queries.
Source: v1/attention/backends/flashinfer.py, VLLM_FLASHINFER_WORKSPACE_BUFFER_SIZE and
FLASHINFER_PREFILL_WORKSPACE_BYTES_PER_ELEM."""

SAMPLER_COPIES = 4
"""Float32 copies of the logits that sampling needs at once. vLLM's profile does not run sampling
(v1/worker/gpu/model_runner.py:_dummy_sampler_run). If all requests of a batch use top-k and top-p, it needs 3.5: the
model's logits in half the width, the processed logits, FlashInfer's masked logits and their probabilities
(v1/worker/gpu/sample/sampler.py:sample, v1/sample/ops/topk_topp_sampler.py:flashinfer_sample). Other methods need less.
Measured: H200, Llama-3-8B, 1,024 requests with top-k, top-p, penalties and logprobs: utilisation 0.985 works, 0.99 runs
out of memory."""

VERIFIED_BYTES = 1024 * MIB
"""Bytes of float32 logits that vLLM verifies at once in speculative decoding.
Source: v1/worker/gpu/spec_decode/rejection_sampler.py:MAX_CHUNK_BYTES."""

MarginPart = Literal["sampling", "attention", "encoder", "block tables", "fragments", "other"]
"""What the safety margin is for."""


def margin_by_rank(placement: Placement) -> tuple[dict[MarginPart, int], ...]:
    """Return the parts of the safety margin of one GPU of each pipeline rank, in bytes.

    The profile counts the forward pass, but none of sampling, attention and what it leaves out of the encoder. Only
    the largest of these three is a part, because they do not run at the same time.
    """
    sampler, attention = _sampler_copies(placement), attention_peak(placement)
    margins = []
    for rank in range(placement.layout.pipeline):
        first, last = rank == 0, rank == placement.layout.pipeline - 1
        forward = activation_peak(placement, first=first, last=last)
        unprofiled = profiled_encoder(placement, forward, max(forward, timing_peak(placement)))[1] if first else 0
        beyond: dict[MarginPart, int] = {"sampling": sampler, "attention": attention - forward, "encoder": unprofiled}
        largest = max(beyond, key=lambda part: beyond[part])
        temporary = forward + beyond[largest]
        margins.append(
            {
                largest: beyond[largest],
                "block tables": _block_tables(placement),
                "fragments": fragments(placement, temporary),
                "other": _serving_overhead(placement),
            }
        )
    return tuple(margins)


def _sampler_copies(placement: Placement) -> int:
    """Return the bytes of the copies of logits that sampling makes while vLLM serves (``SAMPLER_COPIES``).

    With speculative decoding a batch has logits for each draft token too. The model's logits of all of them are alive
    while vLLM verifies them. Model runner V2 copies at most VERIFIED_BYTES of them at once, V1 copies all.
    """
    model, run = placement.model, placement.run_config
    if model.task != "generate":
        return 0
    vocab = padded_vocab(model.vocab_size)
    copied = min(run.max_num_seqs, run.max_num_batched_tokens)
    if not run.num_speculative_tokens:
        return SAMPLER_COPIES * 4 * copied * vocab
    rows = min(run.max_num_seqs * (1 + run.num_speculative_tokens), run.max_num_batched_tokens)
    copied = min(rows, max(1, VERIFIED_BYTES // (4 * vocab))) if run.verifies_in_chunks else rows
    return rows * vocab * run.activation_bytes + SAMPLER_COPIES * 4 * copied * vocab


def _serving_overhead(placement: Placement) -> int:
    """Return the bytes of channels, FlashInfer's workspace, and the host's share of unified memory."""
    channels = PIPELINE_CHANNELS if placement.layout.pipeline > 1 else 0
    gpu = placement.gpu
    host = round(gpu.memory_total * HOST_SHARE) if gpu is not None and gpu.unified else 0
    return channels + _flashinfer_workspace(placement) + host


def _block_tables(placement: Placement) -> int:
    """Return the bytes of block tables: two rows of int32 for each request and group of layers.

    vLLM allocates them after it chose the size of the KV cache. The row of a sliding window is as long as any other
    row. Source: v1/worker/gpu/block_table.py.
    """
    run = placement.run_config
    row_length = sum(
        math.ceil(run.max_model_len / min(spec.block for spec in group)) for group in grouping_of(placement).groups
    )
    return 2 * 4 * run.max_num_seqs * row_length


def _flashinfer_workspace(placement: Placement) -> int:
    """Return the bytes of FlashInfer's workspace, or 0 if vLLM uses other attention kernels.

    The first batch allocates it, and it is never freed. vLLM prefers FlashInfer on data-centre Blackwell, where kernels
    of TensorRT-LLM need only the minimum. On other GPUs except Hopper, vLLM uses FlashInfer if FlashAttention cannot
    read the KV cache. Source: platforms/cuda.py:_get_backend_priorities.
    """
    model, run, layout = placement.model, placement.run_config, placement.layout
    if placement.generation is Generation.BLACKWELL:
        return FLASHINFER_WORKSPACE
    if placement.generation is Generation.HOPPER or model.mla or not kv_dtype(model, run).startswith("fp8"):
        return 0
    queries = run.max_num_batched_tokens * (model.heads // layout.tensor) * model.head_dim
    return max(FLASHINFER_WORKSPACE, queries * FLASHINFER_BYTES)
