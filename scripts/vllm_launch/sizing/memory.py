"""Where a GPU's memory goes when vLLM runs a model: bytes, by physics. Pure; vLLM 0.32.0 is the authority."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import msgspec

from vllm_launch.machine.gpus import Gpu
from vllm_launch.model.model import Model
from vllm_launch.sizing import kv
from vllm_launch.sizing.cuda_graphs import SPLIT_REQUESTS, cuda_graphs
from vllm_launch.sizing.parallel import Layout, expert_width, layer_split, padded_vocab
from vllm_launch.sizing.run_config import Run, activation_bytes
from vllm_launch.sizing.weights import by_rank
from vllm_launch.units import MIB

CONTEXT_HOPPER, CONTEXT_A100, CONTEXT_SMALL = 522 * MIB, 460 * MIB, 260 * MIB
"""CUDA context and cuBLAS handles before vLLM's first look; it grows with the number of multiprocessors. H200: total
139.80, free 139.29 GiB (2026-11-22); small: 15.55 and 15.32 GiB in vLLM's issues; A100 is in between, by size."""

NCCL_CONTEXT = 123 * MIB
"""NCCL and custom all-reduce before vLLM's first look, on each of several GPUs that share layers. H200, TP=2: 0.63 GiB,
context included; H100, TP=2 without multicast, 2026-11-27: 0.561; PP=2, 2026-11-26: 0.515 as on one GPU, since stages
open their channels later. The most counts: too little would be an out-of-memory, too much is 0.1 % of a cache."""

RUNTIME = 270 * MIB
"""CUDA modules and input buffers that vLLM's profile sees. H200, 2026-11-22: 0.26 to 0.29 GiB on four models after
the sampler's state and the expert workspace are taken off."""

COLLECTIVES = 768 * MIB
"""NCCL channels and symmetric memory that open with the first collective. H200, TP=2, Llama-3-70B, 2026-11-22:
2.05 GiB consumed besides weights, less the sampler's state, RUNTIME and the fused all-reduce's 512 MiB."""

FUSED_ALL_REDUCE: dict[tuple[int, int], dict[int, float]] = {
    (9, 0): {2: 64, 4: 2, 8: 0.5},
    (10, 0): {2: 64, 4: 32, 8: 1},
}
"""MiB of a message of FlashInfer's fused all-reduce, by capability and TP (compilation/passes/fusion/
allreduce_rms_fusion.py: FI_ALLREDUCE_FUSION_MAX_SIZE_MB); its workspace holds four of them for each rank."""

PIPELINE_CHANNELS = 256 * MIB
"""NCCL's send and receive channels between pipeline stages, which the profile does not open."""

FLASHINFER_WORKSPACE, FLASHINFER_BYTES = 394 * MIB, 16
"""Of FlashInfer's attention: at least, and for each element of a batch's queries (v1/attention/backends/flashinfer.py,
VLLM_FLASHINFER_WORKSPACE_BUFFER_SIZE and FLASHINFER_PREFILL_WORKSPACE_BYTES_PER_ELEM)."""

SOFT_CAPPED = {"gemma2", "gemma3n", "gemma3n_text", "gemma4", "gemma4_text"}
"""Model types whose logits are divided, bent and multiplied, each time into a copy (layers/logits_processor.py)."""

TIMED_BEFORE = 50 * MIB
"""Of what the profile leaves allocated, cuBLAS' workspaces above all, what comes after the first kernels were compiled.
H100, 2026-11-26, three runs of 1.06, 0.96 and 1.56 GiB: 49.7 to 50.0 MiB."""

SAMPLER_COPIES = 4
"""Float32 copies of the logits that sampling needs at once, which vLLM's profile does not run
(v1/worker/gpu/model_runner.py:_dummy_sampler_run). With top-k and top-p in all requests of a batch 3.5: the model's own
logits, which are half as wide, the processed ones, FlashInfer's masked ones and their probabilities
(v1/worker/gpu/sample/sampler.py:sample, v1/sample/ops/topk_topp_sampler.py:flashinfer_sample); other ways need less.
H200, Llama-3-8B, 1,024 streams with top-k, top-p, penalties and logprobs: utilisation 0.985 holds, 0.99 runs out of
memory."""

MULTIPROCESSORS = 132
"""Of an H100 SXM, H200 or GH200 (NVIDIA's data sheets); an H100 PCIe has 114, which needs less."""

FRAGMENTS = 256 * MIB
"""What PyTorch's allocator cannot hand out again while requests come and go."""

MOST = 0.99


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """Where the memory of one GPU goes besides the KV cache, in bytes.

    ``cuda_graphs`` is vLLM's estimate where it counts that (``Run.estimate_cudagraphs``), else what they take.
    """

    weights: int
    activation_peak: int
    cuda_graphs: int
    non_torch: int
    context: int
    safety: int


def of_ranks(model: Model, run: Run, layout: Layout, gpu: Gpu) -> tuple[Memory, ...]:
    """Where the memory of one GPU of each pipeline rank goes besides the KV cache.

    The first four are what vLLM counts against ``gpu_memory_utilization``: what ``memory_profiling`` calls consumed is
    ``weights + non_torch``, and ``cuda_graphs`` is its estimate, which is more than they take in the end; told not
    to, it counts none. Source: v1/worker/gpu_worker.py:determine_available_memory,
    utils/mem_utils.py.
    """
    graphs = [cuda_graphs(model, run, layout, gpu, count) for count in layer_split(len(model.layers), layout.pipeline)]
    sampler, attention = _sampler(model, run), _attention(model, run, layout, gpu)
    beyond = _beyond(model, run, layout, gpu)
    ranks = []
    for rank, held in enumerate(by_rank(model, run, layout, gpu)):
        first, last = rank == 0, rank == layout.pipeline - 1
        forward = _activation_peak(model, run, layout, gpu, first=first, last=last)
        ranks.append(
            Memory(
                weights=held,
                activation_peak=max(forward, _timing_peak(model, run, layout, gpu) if first else 0),
                cuda_graphs=graphs[rank],
                non_torch=_non_torch(model, run, layout, gpu, first=first, last=last),
                context=_context(model, layout, gpu),
                safety=beyond + max(sampler, attention - forward),  # a pass' activations have ``forward`` already
            )
        )
    return tuple(ranks)


def of_gpu(model: Model, run: Run, layout: Layout, gpu: Gpu) -> Memory:
    """Where the memory of one GPU goes besides the KV cache, on the pipeline rank that has the least left."""
    return fullest(of_ranks(model, run, layout, gpu), run)


def fullest(ranks: Sequence[Memory], run: Run) -> Memory:
    """The rank that leaves the least for the KV cache."""
    return max(ranks, key=lambda rank: _counted(rank, run))


def requested(gpu: Gpu, utilization: float) -> int:
    """Bytes that vLLM takes for itself (v1/worker/utils.py:request_memory)."""
    return math.ceil(gpu.memory_total * utilization)


def kv_bytes(memory: Memory, run: Run, gpu: Gpu, utilization: float) -> int:
    """Bytes that vLLM's profiling leaves for the KV cache of one GPU; negative by what is missing."""
    return requested(gpu, utilization) - _counted(memory, run)


def safe_utilization(memory: Memory, run: Run, gpu: Gpu) -> float:
    """The largest ``gpu_memory_utilization``, four decimals, that leaves of what is free all that vLLM does not count.

    At most 0.99; zero or less when nothing is left. vLLM's own check that so much is free at the start then passes.
    """
    graphs = 0 if run.estimate_cudagraphs else memory.cuda_graphs
    spare = gpu.memory_free - memory.context - memory.safety - graphs
    return min(MOST, math.floor(spare / gpu.memory_total * 10_000) / 10_000)


def cpu_memory(model: Model, run: Run, layout: Layout) -> int:
    """Bytes of host memory that one worker of the CPU engine takes besides the KV cache.

    Weights are loaded whole and never on a device; PyTorch, vLLM and the compiled model take about 1.5 GiB more.
    Source: vllm/v1/worker/cpu_worker.py:determine_available_memory (there it is the process's resident size).
    """
    peak = _activation_peak(model, run, layout, None, first=True, last=True)
    return max(by_rank(model, run, layout)) + peak + 1536 * MIB


def _counted(memory: Memory, run: Run) -> int:
    graphs = memory.cuda_graphs if run.estimate_cudagraphs else 0
    return memory.weights + memory.activation_peak + graphs + memory.non_torch


def _activation_peak(model: Model, run: Run, layout: Layout, gpu: Gpu | None, *, first: bool, last: bool) -> int:
    """The most that the profile's forward pass or, on the last rank, its sampler holds for a moment.

    A compiled feed-forward holds its input, the residual, its output, and gate, up and their product; the greedy
    sampler keeps one copy of the logits. Source: v1/worker/gpu/model_runner.py:profile_run.
    """
    tokens, width, hidden = run.max_num_batched_tokens, activation_bytes(model, run), model.hidden_size
    # What arrives from the stage before is copied, since a compiled graph may not change what it is given.
    stream = (3 if first or run.enforce_eager else 4) * tokens * hidden * width
    tensor = layout.tensor
    inner = [_around_attention(model, run, layout)]
    if model.experts is None or any(not layer.moe for layer in model.layers):
        inner.append(3 * tokens * width * model.intermediate_size // tensor)
    if model.experts and model.experts.shared_intermediate_size:
        inner.append(3 * tokens * width * model.experts.shared_intermediate_size // tensor)
    if model.experts:
        expanded = 0
        if _in_kernel(model, gpu):
            # The Triton kernels allocate gate and up, before and after their activation, for every chosen expert.
            cut = expert_width(model.experts, layout)
            expanded = tokens * layout.data * model.experts.per_token * width * (4 * cut + 2 * hidden)
        inner.append(_arriving(model, run, layout) + expanded)
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


def _around_attention(model: Model, run: Run, layout: Layout) -> int:
    """What is alive around a layer's attention, which the profile does not run, beside input, residual and output.

    Normed queries and keys stand beside those they were normed from, but the layer's own norm is done with. For MLA
    vLLM reserves what its longest prefill expands. Source: models/qwen3_moe.py and layers/mla.py (forward),
    mla_attention.py:determine_chunked_prefill_workspace_size.
    """
    tokens, width, mla = run.max_num_batched_tokens, activation_bytes(model, run), model.mla
    if mla is None:
        queries, keys = model.heads * model.head_dim // layout.tensor, model.kv_heads * model.head_dim // layout.tensor
        normed = 3 * (queries + keys) - model.hidden_size if model.qk_norm else 0
        return tokens * width * max(queries + 2 * keys, normed)
    heads, head = model.heads // layout.tensor, mla.qk_nope_head_dim + mla.v_head_dim
    kept = min(max(8 * run.max_model_len, 4 * run.max_num_seqs * 16), 64 * 1024)
    latent = 2 * mla.kv_lora_rank + mla.qk_rope_head_dim  # before and after its norm
    alive = heads * (head + mla.qk_rope_head_dim) + latent - model.hidden_size
    return width * (kept * heads * head + tokens * alive)


def _timing_peak(model: Model, run: Run, layout: Layout, gpu: Gpu) -> int:
    """What the profile holds on the first rank while Inductor times the first graph's kernels: an embedding table more.

    They are timed on arguments of their own where the graph looks tokens up and normalises them (config/compilation.py:
    benchmark_combo_kernel). An all-reduce between the two, or embeddings from outside, leave nothing to combine; and
    with a compiled model in the cache nothing is timed, so that a later start has this for more KV cache.
    """
    from_outside = model.multimodal and not run.language_model_only
    if layout.tensor > 1 or run.enforce_eager or from_outside:
        return 0
    row = model.hidden_size * activation_bytes(model, run)
    later = TIMED_BEFORE + _workspace(model, run, layout, gpu)
    return (padded_vocab(model.vocab_size) + 2 * run.max_num_batched_tokens) * row - later


def _attention(model: Model, run: Run, layout: Layout, gpu: Gpu) -> int:
    """The most that a layer's attention holds for a moment while serving; the profile runs none.

    FlashAttention 3 splits long contexts so that few queries still fill the GPU, and keeps each split's output in
    float32 for every token of the batch. It plans as if the longest request were alone, so the worst is a batch full
    of short prompts beside one long context. Source: vllm-project/flash-attention, hopper/flash_api.cpp:mha_fwd and
    get_num_splits; H100, 2026-11-26: it asked for 896 MiB at once and ran out of memory.
    """
    heads, groups = model.heads // layout.tensor, max(1, model.kv_heads // layout.tensor)
    if gpu.compute_capability[0] != 9 or model.mla or heads < groups:  # noqa: PLR2004 - Hopper's
        return 0
    tile = 192 if model.head_dim <= 96 else 128  # noqa: PLR2004 - hopper/tile_size.h:tile_size_fwd_sm90
    requests, most = min(run.max_num_seqs, SPLIT_REQUESTS), run.max_num_batched_tokens
    scratch = 0
    for tiles in range(1, math.ceil(0.8 * MULTIPROCESSORS / groups)):
        queries = min(most, requests * (tiles * tile // (heads // groups)))
        splits = _splits(tiles * groups, math.ceil(run.max_model_len / 128))
        scratch = max(scratch, splits * queries * heads * (model.head_dim + 1) * 4)
    held = 2 * model.hidden_size + 2 * (heads + groups) * model.head_dim  # input, residual, Q, K, V, output
    return scratch + most * held * activation_bytes(model, run)


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


def _arriving(model: Model, run: Run, layout: Layout) -> int:
    """Bytes of hidden states that a rank's experts get from the other replicas, beside its own.

    Without and with expert parallelism vLLM's default gathers every replica's batch before the experts and scatters
    the sum after them. Source: fused_moe/prepare_finalize/naive_dp_ep.py, device_communicators/all2all.py:
    AgRsAll2AllManager.
    """
    if layout.data == 1:
        return 0
    return run.max_num_batched_tokens * layout.data * model.hidden_size * activation_bytes(model, run)


def _workspace(model: Model, run: Run, layout: Layout, gpu: Gpu | None) -> int:
    """What the experts share from one layer to the next (fused_moe/experts/triton_moe.py:workspace_shapes)."""
    if not model.experts:
        return 0
    # Every replica's tokens pass a rank's experts (_arriving).
    chosen = run.max_num_batched_tokens * layout.data * model.experts.per_token
    cut = expert_width(model.experts, layout)
    if _in_kernel(model, gpu):
        return chosen * cut * activation_bytes(model, run)
    return chosen * (max(cut, model.hidden_size) + max(2 * cut, model.hidden_size)) * activation_bytes(model, run)


def _talks(model: Model, layout: Layout) -> bool:
    """Whether collectives run in every layer: over a replica's GPUs, or over all replicas where they share experts."""
    return layout.tensor > 1 or (model.experts is not None and layout.data > 1)


def _in_kernel(model: Model, gpu: Gpu | None) -> bool:
    """Whether experts allocate their own scratch: the kernels for MXFP4 on Hopper and data-centre Blackwell do.

    Marlin, in their stead on other GPUs, shares a workspace as Triton's other experts do. Source:
    fused_moe/oracle/mxfp4.py, experts/gpt_oss_triton_kernels_moe.py and marlin_moe.py (workspace_shapes).
    """
    mxfp4 = model.quantization is not None and "mxfp4" in model.quantization.method
    return mxfp4 and (gpu is None or gpu.compute_capability[0] in {9, 10})


def _non_torch(model: Model, run: Run, layout: Layout, gpu: Gpu, *, first: bool, last: bool) -> int:
    """What stays allocated besides weights: the sampler's state, the experts' workspace, CUDA modules, collectives.

    Source: v1/worker/gpu/sample/penalties.py (a count and two bits for each token of the vocabulary and request),
    logit_bias.py and bad_words.py (17.4 KB a request).
    """
    total = RUNTIME
    if last and model.task == "generate":
        state = 4 * model.vocab_size + 2 * 4 * math.ceil(model.vocab_size / 32) + 17_400
        total += run.max_num_seqs * state
    total += _workspace(model, run, layout, gpu)
    if _talks(model, layout):
        total += COLLECTIVES
    if layout.tensor > 1:
        message = run.max_num_batched_tokens * model.hidden_size * activation_bytes(model, run)
        limit = FUSED_ALL_REDUCE.get(gpu.compute_capability, {}).get(layout.tensor, 0)
        fused = run.fuse_allreduce_rms and not run.enforce_eager
        total += 4 * layout.tensor * min(round(limit * MIB), message) if fused else 0
    if not first:  # the hidden states and residual that arrive from the rank before
        total += 2 * run.max_num_batched_tokens * model.hidden_size * activation_bytes(model, run)
    return total


def _context(model: Model, layout: Layout, gpu: Gpu) -> int:
    capability = gpu.compute_capability
    base = CONTEXT_HOPPER if capability >= (9, 0) else CONTEXT_A100 if capability == (8, 0) else CONTEXT_SMALL
    if gpu.compute_capability[0] == 12:  # noqa: PLR2004 - GeForce and RTX PRO Blackwell
        base = CONTEXT_SMALL
    return base + (NCCL_CONTEXT if _talks(model, layout) else 0)


def _sampler(model: Model, run: Run) -> int:
    """Copies of the logits that sampling makes while serving (``SAMPLER_COPIES``)."""
    if model.task != "generate":
        return 0
    return SAMPLER_COPIES * 4 * min(run.max_num_seqs, run.max_num_batched_tokens) * padded_vocab(model.vocab_size)


def _beyond(model: Model, run: Run, layout: Layout, gpu: Gpu) -> int:
    """What serving takes beyond the profile in any case: block tables, fragments, channels, FlashInfer's workspace.

    Block tables are two rows of int32 per request and group of layers (v1/worker/gpu/block_table.py), allocated after
    the cache is sized; the row of a window is as long as any other.
    """
    rows = sum(
        math.ceil(run.max_model_len / min(spec.block for spec in group))
        for group in kv.grouping_of(model, run, layout, gpu).groups
    )
    tables = 2 * 4 * run.max_num_seqs * rows
    channels = PIPELINE_CHANNELS if layout.pipeline > 1 else 0
    return tables + FRAGMENTS + channels + _flashinfer(model, run, layout, gpu)


def _flashinfer(model: Model, run: Run, layout: Layout, gpu: Gpu) -> int:
    """FlashInfer's workspace, which the first batch allocates and nobody frees; 0 where other kernels attend.

    vLLM takes FlashInfer first on data-centre Blackwell, where kernels of TensorRT-LLM need no more than the least, and
    on other GPUs but Hopper where FlashAttention does not read the cache (platforms/cuda.py:_get_backend_priorities).
    """
    major = gpu.compute_capability[0]
    if major == 10:  # noqa: PLR2004 - data-centre Blackwell
        return FLASHINFER_WORKSPACE
    if major == 9 or model.mla or not kv.kv_dtype(model, run).startswith("fp8"):  # noqa: PLR2004 - Hopper
        return 0
    queries = run.max_num_batched_tokens * (model.heads // layout.tensor) * model.head_dim
    return max(FLASHINFER_WORKSPACE, queries * FLASHINFER_BYTES)
