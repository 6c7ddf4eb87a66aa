"""Explains the memory of a plan: utilisation, KV cache, length, encoder, offloading. Pure."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from vllm_launch.engine.architectures import only_transcribes
from vllm_launch.machine.gpus import Gpu
from vllm_launch.model.model import Model
from vllm_launch.plan.fit import USEFUL_TOKENS, Candidate, cpu_cache_bytes, kv_cache_on_host, tightest
from vllm_launch.plan.reason import Reason, Source
from vllm_launch.plan.request import PlanRequest
from vllm_launch.sizing import kv
from vllm_launch.sizing.allocator import uses_expandable_segments
from vllm_launch.sizing.encoder import active_items, encoder_memory
from vllm_launch.sizing.margin import margin_by_rank
from vllm_launch.sizing.memory import memory_by_rank, rank_with_least_room
from vllm_launch.sizing.placement import Placement
from vllm_launch.sizing.weights import offloaded_by_rank, offloaded_on_host
from vllm_launch.units import counted, gib

LARGE_MARGIN = 1 / 10
"""Share of a GPU's memory from which on the plan names the largest part of the safety margin."""

LOWERED = 3 / 4
"""Share to which a part of the safety margin must shrink at half of an option, for the plan to name the option."""

MARGIN_PARTS = {"encoder": "the multimodal encoder", "other": "buffers that vLLM does not profile"}


FRAGMENTATION = " and PyTorch's allocator loses memory to fragmentation"


def memory_reasons(request: PlanRequest, model: Model, chosen: Candidate) -> Iterator[Reason]:
    """Yield the reasons of the utilisation or the size of the KV cache, of the longest request, and of the KV cache."""
    cache, run = chosen.kv_cache, chosen.run_config
    if chosen.gpus:
        yield Reason(
            field="gpu_memory_utilization",
            value=chosen.utilization,
            why=_why_utilization(tightest(chosen.gpus), chosen),
            source=Source.HARDWARE,
        )
        if request.kv_cache_memory_bytes:
            why = "set by you, per GPU. vLLM does not check free memory in this mode"
            yield Reason(field="kv_cache_memory_bytes", value=chosen.kv_bytes, why=why, source=Source.YOU)
    elif request.gpu_memory_utilization is not None and not (
        request.kv_cache_memory_bytes or request.cpu_kv_cache_bytes
    ):
        # The user set it, so ``_with_user_as_source`` gives the reason.
        yield Reason(field="gpu_memory_utilization", value=chosen.utilization, why="", source=Source.LAUNCHER)
    else:
        why = f"holds {run.max_num_seqs} requests of {USEFUL_TOKENS:,} tokens and one request of max_model_len"
        if cache.bytes < cpu_cache_bytes(chosen.placement):
            why = (
                "half of the memory that the weights and vLLM itself leave free. The page cache and other programs use "
                "the rest"
            )
        if request.cpu_kv_cache_bytes:
            why = "set by VLLM_CPU_KVCACHE_SPACE, which overrides --kv-cache-memory-bytes"
        source = Source.YOU if request.cpu_kv_cache_bytes else Source.LAUNCHER
        yield Reason(field="kv_cache_memory_bytes", value=chosen.kv_bytes, why=why, source=source)
    yield from _set_memory_reasons(request, chosen)
    source, why = Source.MODEL, "the model's own limit, and it fits"
    if run.max_model_len < model.max_model_len:
        source, why = (
            Source.HARDWARE,
            f"cut from the model's limit of {model.max_model_len:,}: the KV cache cannot hold a longer request",
        )
    yield Reason(field="max_model_len", value=run.max_model_len, why=why, source=source)
    if request.fp8_kv and run.kv_cache_dtype == "fp8":
        why = "allowed by launch.quality fp8-kv: half the bytes of the model's dtype, to store and to read"
        yield Reason(field="kv_cache_dtype", value="fp8", why=why, source=Source.LAUNCHER)
    if cache.bytes_per_token:
        size = (
            f"{gib(cache.bytes)} on {counted(chosen.layout.gpus_per_replica, 'GPU')}"
            if chosen.gpus
            else gib(cache.bytes)
        )
        why = (
            f"{size} hold {cache.tokens:,} tokens of {cache.bytes_per_token:,} bytes each: {requests_that_fit(chosen)}"
        )
        yield Reason(field="kv_cache", value=cache.tokens, why=why, source=Source.HARDWARE)


def _set_memory_reasons(request: PlanRequest, chosen: Candidate) -> Iterator[Reason]:
    """Yield the reasons of the number of blocks and of what is offloaded, which only the user sets."""
    if (blocks := request.num_gpu_blocks_override) is not None:
        why = "set by you. The KV cache has this many blocks, however much memory is left. One of them stays empty"
        yield Reason(field="num_gpu_blocks_override", value=blocks, why=why, source=Source.YOU)
    if host := kv_cache_on_host(request, chosen):
        why = (
            f"set by you. {gib(host)} of host memory on this machine hold KV cache blocks that are offloaded from the "
            "GPU"
        )
        yield Reason(field="kv_offloading_size", value=request.kv_offloading_size, why=why, source=Source.YOU)
    moved = max(offloaded_by_rank(chosen.placement))
    if moved.host:
        total = sum(on_gpu.pinned for on_gpu in offloaded_on_host(chosen.placement))
        why = (
            f"set by you. {gib(moved.host)} of each GPU's weights are in host memory. They need up to {gib(total)} of "
            "pinned memory on this machine"
        )
        uva = request.offload is not None and request.offload.backend == "uva"
        field, value = (
            ("cpu_offload_gb", request.cpu_offload_gb) if uva else ("offload_group_size", request.offload_group_size)
        )
        yield Reason(field=field, value=value, why=why, source=Source.YOU)


def media_reasons(model: Model, chosen: Candidate) -> Iterator[Reason]:
    """Yield the size of the encoder's cache, and what it and the encoder need."""
    run, encoder = chosen.run_config, encoder_memory(chosen.placement)
    if encoder is None:
        if model.media is not None:
            why = "you disabled images, videos and audio, so vLLM loads no encoder for them and reserves no memory"
            yield Reason(field="encoder_cache", value=0, why=why, source=Source.YOU)
        return
    sizes = [f"{item.modality} {item.tokens_within(run.max_model_len):,}" for item in active_items(model, run)]
    batch = encoder.tokens == run.max_num_batched_tokens
    held = "one batch (max_num_batched_tokens)" if batch else "the largest item"
    why = (
        f"as many tokens as {held}. The largest items: {', '.join(sizes)} tokens. The encoder needs up to "
        f"{gib(encoder.peak)}, its cache {gib(encoder.cache)}, its buffers {gib(encoder.buffers)}"
    )
    if not only_transcribes(model.architecture):
        why += ". If requests are text only, set --language-model-only"
    yield Reason(field="encoder_cache", value=encoder.tokens, why=why, source=Source.MODEL)


def requests_that_fit(chosen: Candidate) -> str:
    """Return how many of the longest requests, and of usual ones, the KV cache holds at a time."""
    tokens, longest = chosen.kv_cache.tokens, chosen.run_config.max_model_len
    requests = f"{tokens / longest:,.1f} requests of {longest:,} tokens"
    if longest <= USEFUL_TOKENS:
        return requests
    usual = kv.requests_that_fit(chosen.placement, chosen.kv_cache, USEFUL_TOKENS)
    return f"{requests}, or {usual:,} of {USEFUL_TOKENS:,}"


def _why_utilization(gpu: Gpu, chosen: Candidate) -> str:
    """Return a GPU's memory and what must be subtracted from it, because vLLM may not claim it."""
    run, parts = chosen.run_config, chosen.memory
    used_bytes = gpu.memory_total - gpu.memory_free
    used = f", minus {gib(used_bytes)} already in use" if used_bytes else ""
    graphs = "" if run.estimate_cudagraphs or not parts.cuda_graphs else f", CUDA graphs {gib(parts.cuda_graphs)}"
    if gpu.unified:
        return (
            f"{gib(gpu.memory_total)} that GPU {gpu.index} shares with the host{used}, minus {gib(parts.context)} for "
            f"the CUDA context and vLLM's processes{graphs}, and a safety margin of {gib(parts.safety)}, because the "
            "page cache and other programs use the same memory"
        )
    return (
        f"{gib(gpu.memory_total)} on GPU {gpu.index}{used}, minus the memory that vLLM does not count: CUDA context "
        f"{gib(parts.context)}{graphs}, and a safety margin of {gib(parts.safety)}, because serving can need more than "
        "vLLM measures at start-up"
        + ("" if uses_expandable_segments(chosen.placement) else FRAGMENTATION)
        + (_largest_margin_part(chosen) if parts.safety > gpu.memory_total * LARGE_MARGIN else "")
    )


def _largest_margin_part(chosen: Candidate) -> str:
    """Return a sentence with the largest part of the safety margin, and the options that make it smaller."""
    placement = chosen.placement
    # The plan may have made max_model_len shorter since it computed the memory, so the margin can be smaller now.
    margins, ranks = margin_by_rank(placement), memory_by_rank(placement)
    rank = ranks.index(rank_with_least_room(ranks, placement.run_config))
    part, size = max(margins[rank].items(), key=lambda item: item[1])
    smaller = []
    for option in ("max_num_seqs", "max_num_batched_tokens", "max_model_len"):
        value = getattr(placement.run_config, option)
        run = msgspec.structs.replace(placement.run_config, **{option: max(1, value // 2)})
        halved = margin_by_rank(Placement(placement.model, run, placement.layout, placement.gpu))[rank]
        if halved.get(part, 0) < size * LOWERED:
            smaller.append(f"{option} ({value:,})")
    remedy = f". For a larger KV cache lower {' or '.join(smaller)}" if smaller else ""
    return f". {gib(size)} of the margin are for {MARGIN_PARTS.get(part, part)}{remedy}"
