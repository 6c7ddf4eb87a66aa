"""Explains a decision in words: the reason for each value, the rejected plans, and the warnings. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import StrEnum

import msgspec

from vllm_launch.engine.architectures import only_transcribes
from vllm_launch.machine.gpus import Gpu, Hardware, alike, gpu_too_old
from vllm_launch.model.model import Model
from vllm_launch.plan.fit import (
    USEFUL_REQUESTS,
    USEFUL_TOKENS,
    Candidate,
    NoFit,
    cpu_cache_bytes,
    kv_cache_on_host,
    tightest,
    watermark_of,
)
from vllm_launch.plan.request import AUTO, PlanRequest, amx_attention, batch_of, only_bfloat16
from vllm_launch.sizing import kv, memory
from vllm_launch.sizing.allocator import uses_expandable_segments
from vllm_launch.sizing.encoder import active_items, encoder_memory
from vllm_launch.sizing.parallel import problems
from vllm_launch.sizing.placement import Placement
from vllm_launch.sizing.run_config import default_batch
from vllm_launch.sizing.weights import offloaded_by_rank, offloaded_on_host
from vllm_launch.units import GIB, counted, gib

MODALITIES = ("image", "video", "audio")
"""Modalities of vLLM's limits (config/multimodal.py). vLLM ignores other names without a message."""

LARGE_MARGIN = 1 / 10
"""Share of a GPU's memory from which on the plan names the largest part of the safety margin."""

LOWERED = 3 / 4
"""Share to which a part of the safety margin must shrink at half of an option, for the plan to name the option."""

MARGIN_PARTS = {"encoder": "the multimodal encoder", "other": "buffers that vLLM does not profile"}

WARNING_SHARE = 1 / 20
"""Share of the KV cache that must be lost before the plan warns."""


AMX_FAULT = "this CPU has AMX, and on some such CPUs vLLM's bfloat16 attention crashes the engine with SIGILL"


class Source(StrEnum):
    """Where a value comes from."""

    YOU = "you"  # the user set it
    MODEL = "model"  # config.json
    HARDWARE = "hardware"  # the memory and number of GPUs, or the CPU
    VLLM = "vLLM"  # vLLM's own default
    LAUNCHER = "launcher"  # a rule of this planner


class Reason(msgspec.Struct, frozen=True, kw_only=True):
    """The reason for one value of the plan.

    ``field`` is a vLLM option by dest, or "kv_cache", which is not an option. ``value`` is None if the plan does not
    set the option. ``origin`` is where the user set the
    value, such as "flag --max-model-len". It is None if the user did not set it.
    """

    field: str
    value: object
    why: str
    source: Source
    origin: str | None = None


class Rejected(msgspec.Struct, frozen=True, kw_only=True):
    """A plan that was considered and rejected, such as "TP=3", and the reason."""

    plan: str
    why: str


def reasons(request: PlanRequest, hardware: Hardware, model: Model, chosen: Candidate) -> list[Reason]:
    """Return one reason for each value of the plan, including the values that the user set."""
    planned = [
        *_parallel_reasons(request, hardware, model, chosen),
        *_memory_reasons(request, model, chosen),
        *_media_reasons(model, chosen),
        *_dtype_reasons(request, model, chosen),
        *_batch_reasons(request, model, chosen),
    ]
    user_values = msgspec.structs.asdict(request)
    return [_with_user_as_source(reason, user_values.get(reason.field)) for reason in planned]


def _with_user_as_source(reason: Reason, user_value: object) -> Reason:
    """Return ``reason``, or one that names the user as the source if the user set the value."""
    if user_value is None or reason.source is Source.YOU:
        return reason
    why = "set by you to auto: the longest request that fits" if user_value == AUTO else "set by you"
    return msgspec.structs.replace(reason, source=Source.YOU, why=why)


def _parallel_reasons(request: PlanRequest, hardware: Hardware, model: Model, chosen: Candidate) -> Iterator[Reason]:
    layout, gpus_per_replica = chosen.layout, chosen.layout.gpus_per_replica
    if not chosen.gpus:
        why = "runs on the CPU: one worker uses all cores that are available to it"
        yield Reason(field="tensor_parallel_size", value=layout.tensor, why=why, source=Source.HARDWARE)
    else:
        why = f"{_why_gpus_per_replica(request, model, chosen)}: {_cache_size(chosen)}"
        yield Reason(field="tensor_parallel_size", value=layout.tensor, why=why, source=Source.LAUNCHER)
    if layout.pipeline > 1 or request.pipeline_parallel_size:
        why = _why_pipeline(hardware, model, chosen)
        yield Reason(field="pipeline_parallel_size", value=layout.pipeline, why=why, source=Source.HARDWARE)
    used = len(chosen.gpus)
    why = _replicas(layout.data, gpus_per_replica, used, len(hardware.gpus)) if used else "one replica on the CPU"
    if used and used < len(hardware.gpus):
        why += f". The plan does not use {_unused_gpus(request, hardware, chosen)}"
    yield Reason(field="data_parallel_size", value=layout.data, why=why, source=Source.HARDWARE)
    if layout.expert_parallel:
        why = "the experts' intermediate size cannot be split over this many GPUs, so each GPU holds whole experts"
        yield Reason(field="enable_expert_parallel", value=True, why=why, source=Source.MODEL)


def _why_gpus_per_replica(request: PlanRequest, model: Model, chosen: Candidate) -> str:
    """Return why a replica has this number of GPUs.

    If the user set the number of stages or replicas, fewer GPUs might be enough with other numbers.
    """
    used = len(chosen.gpus)
    needed = f"the weights and {_useful_kv_cache(chosen)}" if chosen.kv_cache.bytes_per_token else "the weights"
    if request.objective == "latency":
        return "objective latency: the largest size that the model's dimensions allow"
    if chosen.useful and model.experts and chosen.layout.data > 1:
        size = chosen.layout.gpus_per_replica
        return f"attention fits on {counted(size, 'GPU')}, and the experts are spread over all {used} GPUs"
    if not chosen.useful:
        return f"no split has {_useful_kv_cache(chosen)}. This split allows the longest requests"
    if chosen.enough_gpus:
        held = "holds" if chosen.enough_gpus == 1 else "hold"
        spare = "The spare GPUs are too few for another replica, so they enlarge the KV cache"
        return f"{counted(chosen.enough_gpus, 'GPU')} {held} {needed}. {spare}"
    if request.pipeline_parallel_size or request.data_parallel_size:
        return f"with the parallel sizes that you set, the fewest GPUs that hold {needed}"
    return f"the fewest GPUs that hold {needed}"


def _cache_size(chosen: Candidate) -> str:
    return f"{chosen.kv_cache.tokens:,} KV tokens" if chosen.kv_cache.bytes_per_token else "no KV cache is needed"


def _useful_kv_cache(chosen: Candidate) -> str:
    """Return what ``fit`` calls a useful KV cache, for a model of this length."""
    tokens = min(USEFUL_TOKENS, chosen.run_config.max_model_len)
    return f"a useful KV cache ({USEFUL_REQUESTS} requests of {tokens:,} tokens, and one of max_model_len)"


def _replicas(count: int, gpus_per_replica: int, used: int, total: int) -> str:
    """Return "8 replicas, 1 GPU each (8 of 8 GPUs used)"."""
    each = " each" if count > 1 else ""
    return f"{counted(count, 'replica')}, {counted(gpus_per_replica, 'GPU')}{each} ({used} of {total} GPUs used)"


def _unused_gpus(request: PlanRequest, hardware: Hardware, chosen: Candidate) -> str:
    """Return the GPUs that the plan does not use, with the reason, such as "GPU 3 (another replica needs 2 GPUs)"."""
    if any(gpu.mig_profile for gpu in hardware.gpus):
        return f"{len(hardware.gpus) - 1} other MIG slices or GPUs (with MIG, a vLLM process can use only one of them)"
    names: dict[str, list[str]] = {}
    for group in alike(hardware.gpus):
        unused = [gpu for gpu in group if gpu not in chosen.gpus]
        if unused:
            why = _why_unused(request, chosen, group, unused)
            names.setdefault(why, []).extend(f"GPU {gpu.index}" for gpu in unused)
    return " and ".join(f"{', '.join(gpus)} ({why})" for why, gpus in names.items())


def _why_unused(request: PlanRequest, chosen: Candidate, group: Sequence[Gpu], unused: Sequence[Gpu]) -> str:
    """Return why the plan does not use the GPUs ``unused``. ``group``: all GPUs of their model and memory size."""
    size = chosen.layout.gpus_per_replica
    if gpu_too_old(group[0]):
        return "too old for vLLM"
    if len(unused) == len(group):
        return "the plan does not mix GPUs of different models or memory sizes"
    if len(unused) < size:
        return f"another replica needs {size} GPUs"
    if request.data_parallel_size:
        return f"you set data_parallel_size to {request.data_parallel_size}"
    return "so little free memory that every replica would get a smaller KV cache"


def _why_pipeline(hardware: Hardware, model: Model, chosen: Candidate) -> str:
    """Return why a replica is a pipeline instead of tensor parallelism over the same number of GPUs."""
    size = chosen.layout.gpus_per_replica
    only_tensor = msgspec.structs.replace(chosen.layout, tensor=size, pipeline=1)
    refused = problems(model, chosen.run_config, only_tensor, chosen.gpus)
    if refused:
        return f"a replica uses {size} GPUs, and TP={size} is not possible: {refused[0]}"
    rows = [hardware.gpus.index(gpu) for gpu in chosen.gpus[:size]] if hardware.nvlink else []
    if not all(hardware.nvlink[a][b] for a in rows for b in rows if a != b) or not rows:
        return (
            f"a replica uses {size} GPUs, and NVLink does not join them: pipeline stages exchange far less data than "
            "tensor parallelism"
        )
    return f"a replica uses {size} GPUs, and pipeline stages leave more memory for the KV cache than TP={size}"


def _memory_reasons(request: PlanRequest, model: Model, chosen: Candidate) -> Iterator[Reason]:
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
            f"{size} hold {cache.tokens:,} tokens of {cache.bytes_per_token:,} bytes each: {_requests_that_fit(chosen)}"
        )
        yield Reason(field="kv_cache", value=cache.tokens, why=why, source=Source.HARDWARE)


def _set_memory_reasons(request: PlanRequest, chosen: Candidate) -> Iterator[Reason]:
    """Yield the reasons of the number of blocks and of what is offloaded, which only the user sets."""
    if (blocks := request.num_gpu_blocks_override) is not None:
        why = "set by you. The KV cache has this many blocks, however much memory is left. One of them stays empty"
        yield Reason(field="num_gpu_blocks_override", value=blocks, why=why, source=Source.YOU)
    if host := kv_cache_on_host(request, chosen):
        why = f"set by you. {gib(host)} of host memory on this machine hold KV cache blocks that left the GPU"
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


def _media_reasons(model: Model, chosen: Candidate) -> Iterator[Reason]:
    """Yield the size of the encoder's cache, and what it and the encoder need."""
    run, encoder = chosen.run_config, encoder_memory(chosen.placement)
    if encoder is None:
        if model.media is not None:
            why = "you disabled images, videos and audio, so vLLM loads no encoder for them and reserves no memory"
            yield Reason(field="encoder_cache", value=0, why=why, source=Source.YOU)
        return
    sizes = [f"{item.modality} {item.tokens_within(run.max_model_len):,}" for item in active_items(model, run)]
    held = "a batch" if encoder.tokens == run.max_num_batched_tokens else "the largest item"
    why = (
        f"tokens of {held}. The largest items: {', '.join(sizes)} tokens. The encoder needs up to {gib(encoder.peak)}, "
        f"its cache {gib(encoder.cache)}, its buffers {gib(encoder.buffers)}"
    )
    if not only_transcribes(model.architecture):
        why += ". If requests are text only, set --language-model-only"
    yield Reason(field="encoder_cache", value=encoder.tokens, why=why, source=Source.MODEL)


def _dtype_reasons(request: PlanRequest, model: Model, chosen: Candidate) -> Iterator[Reason]:
    dtype = chosen.run_config.dtype
    if not chosen.gpus and request.dtype is None and dtype != model.dtype:
        why = f"replaces the model's {model.dtype}: {AMX_FAULT}. Matrix products then run without AMX and are slower"
        yield Reason(field="dtype", value=dtype, why=why, source=Source.HARDWARE)


def _requests_that_fit(chosen: Candidate) -> str:
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
        + ("" if uses_expandable_segments(chosen.placement) else " and PyTorch's allocator loses memory to fragments")
        + (_largest_margin_part(chosen) if parts.safety > gpu.memory_total * LARGE_MARGIN else "")
    )


def _largest_margin_part(chosen: Candidate) -> str:
    """Return a sentence with the largest part of the safety margin, and the options that make it smaller."""
    placement = chosen.placement
    margins = memory.margin_by_rank(placement)
    rank = next(rank for rank, margin in enumerate(margins) if sum(margin.values()) == chosen.memory.safety)
    part, size = max(margins[rank].items(), key=lambda item: item[1])
    smaller = []
    for option in ("max_num_seqs", "max_num_batched_tokens", "max_model_len"):
        value = getattr(placement.run_config, option)
        run = msgspec.structs.replace(placement.run_config, **{option: max(1, value // 2)})
        halved = memory.margin_by_rank(Placement(placement.model, run, placement.layout, placement.gpu))[rank]
        if halved.get(part, 0) < size * LOWERED:
            smaller.append(f"{option} ({value:,})")
    remedy = f". For a larger KV cache lower {' or '.join(smaller)}" if smaller else ""
    return f". {gib(size)} of the margin are for {MARGIN_PARTS.get(part, part)}{remedy}"


def _batch_reasons(request: PlanRequest, model: Model, chosen: Candidate) -> Iterator[Reason]:
    hardware_default = default_batch(chosen.gpus[0] if chosen.gpus else None, chosen.layout.gpus_per_replica)
    values = chosen.run_config.max_num_batched_tokens, chosen.run_config.max_num_seqs
    vllm_values = batch_of(request, model, hardware_default)
    has_states = any(layer.state_shapes for layer in model.layers) and values[0] == vllm_values[0]
    for field, value, vllm_value, default in zip(
        ("max_num_batched_tokens", "max_num_seqs"), values, vllm_values, hardware_default, strict=True
    ):
        source, why = Source.VLLM, "vLLM default for this hardware"
        if value != vllm_value:
            source = Source.LAUNCHER
            why = "with more, activations leave too little memory for the KV cache"
            if field == "max_num_seqs" and has_states:
                why = "each request needs a recurrent state, and only this many fit"
            why = f"less than vLLM's default of {vllm_value:,}: {why}"
        elif value != default:
            why = f"vLLM's default of {default:,}, adjusted by vLLM to this model and your settings"
        yield Reason(field=field, value=value, why=why, source=source)
    if (share := watermark_of(request, chosen)) or request.watermark is not None:
        why = "share of the KV cache reserved for running requests, so that fewer are preempted and recomputed"
        yield Reason(field="watermark", value=share, why=why, source=Source.LAUNCHER)


def why_not_useful(candidate: Candidate) -> str:
    """Return why a split that fits was rejected: its KV cache is too small to be useful."""
    tokens, longest = candidate.kv_cache.tokens, candidate.run_config.max_model_len
    usual = min(USEFUL_TOKENS, longest)
    few_requests = kv.requests_that_fit(candidate.placement, candidate.kv_cache, usual) < USEFUL_REQUESTS
    why = (
        f"fewer than {USEFUL_REQUESTS} requests of {usual:,} tokens"
        if few_requests
        else f"max_model_len is cut to {longest:,}"
    )
    return f"the KV cache holds only {tokens:,} tokens: {why}"


def cpu_remedy(no_fit: NoFit) -> str:
    """Return what the user can do if the CPU engine has too little memory."""
    longest = f"set --max-model-len {no_fit.longest}, or " if no_fit.longest else ""
    return f"{longest}raise the memory limit, use a smaller model, or a machine with GPUs"


def warnings(request: PlanRequest, hardware: Hardware, model: Model, chosen: Candidate) -> list[str]:
    """Return what the user should know before using the plan."""
    return [
        *_size_warnings(request, model, chosen),
        *_hardware_warnings(request, hardware, chosen),
        *_cuda_graph_warnings(request, model, chosen),
        *_media_warnings(request, hardware, model, chosen),
    ]


def _size_warnings(request: PlanRequest, model: Model, chosen: Candidate) -> Iterator[str]:
    longest = chosen.run_config.max_model_len
    if request.length is None and longest < model.max_model_len:
        needed = kv.bytes_per_request(chosen.placement, model.max_model_len)
        yield (
            f"max_model_len is cut from the model's limit of {model.max_model_len:,} to {longest:,} tokens: one "
            f"request of {model.max_model_len:,} tokens needs {gib(needed)} of KV cache, and "
            f"{gib(chosen.kv_cache.bytes)} are available"
        )
    if not chosen.useful and longest == (request.length or model.max_model_len):
        yield f"the KV cache is small: it holds {_requests_that_fit(chosen)} at a time. Other requests wait"
    yield from _offload_warnings(chosen)
    if model.tensors_from == "config":
        yield "no safetensors files were found, so the size of the weights is computed from config.json and may differ"


def _offload_warnings(chosen: Candidate) -> Iterator[str]:
    """Yield a warning if the options for offloading move nothing."""
    offload = chosen.run_config.offload
    if offload is None:
        return
    if not chosen.gpus:
        yield "vLLM offloads no weights on a CPU, so the options for offloading have no effect"
    elif not any(moved.host for moved in offloaded_by_rank(chosen.placement)):
        names = f" of {', '.join(offload.params)}" if offload.params else ""
        yield f"the plan finds no weights{names} that vLLM could offload, so it counts all weights on the GPU"


def _hardware_warnings(request: PlanRequest, hardware: Hardware, chosen: Candidate) -> Iterator[str]:
    yield from (f"{why}. The plan does not use this GPU" for gpu in hardware.gpus if (why := gpu_too_old(gpu)))
    for gpu in chosen.gpus:
        yield from (f"GPU {gpu.index}: {fault}" for fault in gpu.faults)
        processes = ", ".join(f"{process.name} (pid {process.pid})" for process in gpu.processes)
        if processes and gpu.unified:  # most of the memory in use is the host's
            yield f"GPU {gpu.index} is shared: {processes} use it too"
        elif processes:
            used = gib(gpu.memory_total - gpu.memory_free)
            yield f"GPU {gpu.index} is shared: {used} are in use by {processes}"
    if not chosen.gpus:
        nodes = len(hardware.cpu.numa_nodes) if hardware.cpu else 1
        if chosen.run_config.dtype == "bfloat16" and amx_attention(chosen.placement.model, hardware.cpu):
            remedy = "set --dtype float16"
            if only_bfloat16(request, chosen.placement.model):
                another = "If the engine crashes, use the model in another quantisation"
                remedy = f"this quantisation supports no other dtype. {another}"
            yield f"{AMX_FAULT}: {remedy}"
        if nodes > 1 and request.tensor_parallel_size is None:
            yield f"the CPU has {nodes} NUMA nodes and vLLM uses one: set --tensor-parallel-size {nodes} to use all"
        return
    if not chosen.useful and len(chosen.gpus) < len(hardware.gpus):
        yield f"the plan does not use {_unused_gpus(request, hardware, chosen)}"
    if request.expandable_segments and chosen.layout.tensor > 1 and not request.disable_custom_all_reduce:
        yield (
            "PyTorch's allocator has expandable_segments:True. With tensor parallelism vLLM's custom all-reduce then "
            "ends the engine at start-up (vllm-project/vllm#42609): remove that setting, or set "
            "--disable-custom-all-reduce"
        )


def _cuda_graph_warnings(request: PlanRequest, model: Model, chosen: Candidate) -> Iterator[str]:
    """Yield a warning if vLLM estimates CUDA graphs by default and the KV cache is much smaller because of it."""
    default_estimate = request.gpu_memory_utilization is not None and request.estimate_cudagraphs is None
    if not chosen.gpus or not default_estimate or request.kv_cache_memory_bytes:
        return
    run = msgspec.structs.replace(chosen.run_config, estimate_cudagraphs=False)
    without_estimate = Placement(model, run, chosen.layout, chosen.placement.gpu)
    estimate, used = chosen.memory.cuda_graphs, memory.memory_of_gpu(without_estimate).cuda_graphs
    if estimate - used > chosen.kv_bytes * WARNING_SHARE:
        yield (
            f"because gpu_memory_utilization is set, vLLM reserves an estimate of {gib(estimate)} for CUDA graphs, but "
            f"they use only {gib(used)}. Remove that option for a larger KV cache: the plan then reserves only "
            f"{gib(used)}"
        )


def _media_warnings(request: PlanRequest, hardware: Hardware, model: Model, chosen: Candidate) -> Iterator[str]:
    """Yield what the options for images, videos and audio do not do, and the host memory of the processor's cache."""
    limits = request.limit_mm_per_prompt or {}
    options = {name for limit in limits.values() if isinstance(limit, dict) for name in limit} - {"count"}
    if model.media is None:
        return
    known = {*MODALITIES, *(item.modality for item in model.media.items)}
    if unknown := sorted(name for name in limits if name not in known):
        yield (
            f"--limit-mm-per-prompt names {', '.join(unknown)}, and this has no effect: vLLM's names are "
            f"{', '.join(sorted(known))}"
        )
    size = 4.0 if request.mm_processor_cache_gb is None else request.mm_processor_cache_gb
    cached = int(size * GIB) * (1 + chosen.layout.data)  # the API server's, and one for each engine
    if active_items(model, chosen.run_config) and hardware.cpu and cached > hardware.cpu.memory_available:
        yield (
            f"vLLM keeps processed images, videos and audio in up to {gib(cached)} of host memory, and "
            f"{gib(hardware.cpu.memory_available)} are available: set --mm-processor-cache-gb to less than {size:g}"
        )
    if options and active_items(model, chosen.run_config):
        yield (
            f"{', '.join(sorted(options))} in --limit-mm-per-prompt make only vLLM's profile smaller, and requests can "
            "still send the largest item. The plan counts the largest item"
        )
    if request.mm_encoder_tp_mode == "data" and not model.media.encoder_tp_data:
        yield "this model does not support --mm-encoder-tp-mode data, so vLLM uses weights"
