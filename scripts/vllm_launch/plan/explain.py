"""Puts a decision into words: why each value is what it is, what was not taken, what to beware of. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum

import msgspec

from vllm_launch.machine.gpus import Gpu, Hardware, gpu_too_old
from vllm_launch.model.model import Model
from vllm_launch.plan.fit import USEFUL_REQUESTS, USEFUL_TOKENS, Candidate, NoFit, tightest, watermark_of
from vllm_launch.plan.request import AUTO, PlanRequest, amx_attention, batch_of, only_bfloat16
from vllm_launch.sizing import kv, memory
from vllm_launch.sizing.parallel import problems
from vllm_launch.sizing.placement import Placement
from vllm_launch.sizing.run_config import RunConfig, default_batch
from vllm_launch.units import gib

MUCH = 1 / 20
"""Share of the KV cache that is worth a warning."""


AMX_FAULT = "this CPU has AMX, and on some of these vLLM's attention in bfloat16 ends the engine with SIGILL"


class Source(StrEnum):
    """Where a value comes from."""

    YOU = "you"  # the user set it
    MODEL = "model"  # config.json
    HARDWARE = "hardware"  # what the GPUs or the CPU have
    VLLM = "vLLM"  # vLLM's own default
    RULE = "rule"  # a rule of this planner


class Reason(msgspec.Struct, frozen=True, kw_only=True):
    """Why one value is what it is.

    ``field`` is a vLLM option by dest, or "kv_cache", which is no option. ``origin`` says where the user set it, such
    as "flag --max-model-len"; None where nobody did.
    """

    field: str
    value: object
    why: str
    source: Source
    origin: str | None = None


class Rejected(msgspec.Struct, frozen=True, kw_only=True):
    """A plan that was considered and not taken, such as "TP=3", and why."""

    plan: str
    why: str


def reasons(request: PlanRequest, hardware: Hardware, model: Model, chosen: Candidate) -> list[Reason]:
    """One for each value of the plan, what was asked for included."""
    found = [
        *_parallel(request, hardware, model, chosen),
        *_memory(request, model, chosen),
        *_dtype(request, model, chosen),
        *_batch(request, model, chosen),
    ]
    given = msgspec.structs.asdict(request)
    return [_credited(reason, given.get(reason.field)) for reason in found]


def _credited(reason: Reason, given: object) -> Reason:
    """Return ``reason``, or one that names the user where the user set the value."""
    if given is None or reason.source is Source.YOU:
        return reason
    why = "set by you to auto: the longest request that fits" if given == AUTO else "set by you"
    return msgspec.structs.replace(reason, source=Source.YOU, why=why)


def _parallel(request: PlanRequest, hardware: Hardware, model: Model, chosen: Candidate) -> Iterator[Reason]:
    layout, each = chosen.layout, chosen.layout.gpus_per_replica
    if not chosen.gpus:
        why = "no GPU is used: one worker of the CPU engine uses every core it may"
        yield Reason(field="tensor_parallel_size", value=layout.tensor, why=why, source=Source.HARDWARE)
    else:
        what = f"{chosen.kv_cache.tokens:,} KV tokens" if chosen.kv_cache.bytes_per_token else "no KV cache is needed"
        if request.objective == "latency":
            why = f"objective latency: the widest tensor parallelism that the model's sizes allow; {what}"
        elif chosen.useful and model.experts and layout.data > 1:
            why = f"attention fits on {each} of the GPUs; the experts are spread over all {len(chosen.gpus)}: {what}"
        elif chosen.useful:
            why = f"the fewest GPUs that hold the weights and a useful KV cache: {what}"
        else:
            why = f"no split here gives a useful KV cache; this one holds the longest requests: {what}"
        yield Reason(field="tensor_parallel_size", value=layout.tensor, why=why, source=Source.RULE)
    if layout.pipeline > 1 or request.pipeline_parallel_size:
        why = _stages(hardware, model, chosen)
        yield Reason(field="pipeline_parallel_size", value=layout.pipeline, why=why, source=Source.HARDWARE)
    used = len(chosen.gpus)
    why = _replicas(layout.data, each, used, len(hardware.gpus)) if used else "one worker"
    if used and used < len(hardware.gpus):
        why += ". The others stay free: they do not make another replica, or would make all replicas smaller"
    yield Reason(field="data_parallel_size", value=layout.data, why=why, source=Source.HARDWARE)
    if layout.expert_parallel:
        why = "the experts' width cannot be cut over so many GPUs, so each GPU has whole experts"
        yield Reason(field="enable_expert_parallel", value=True, why=why, source=Source.MODEL)


def _replicas(count: int, each: int, used: int, total: int) -> str:
    """Return "8 replicas, 1 GPU each (8 of 8 GPUs used)"."""
    replicas, gpus = f"{count} replica{'s'[: count > 1]}", f"{each} GPU{'s'[: each > 1]}"
    return f"{replicas}, {gpus}{' each' if count > 1 else ''} ({used} of {total} GPUs used)"


def _stages(hardware: Hardware, model: Model, chosen: Candidate) -> str:
    """Why a replica is a pipeline, and not tensor parallelism over as many GPUs."""
    each = chosen.layout.gpus_per_replica
    whole = msgspec.structs.replace(chosen.layout, tensor=each, pipeline=1)
    refused = problems(model, chosen.run_config, whole, chosen.gpus)
    if refused:
        return f"more GPUs are needed, and TP={each} is not possible: {refused[0]}"
    rows = [hardware.gpus.index(gpu) for gpu in chosen.gpus[:each]] if hardware.nvlink else []
    if not all(hardware.nvlink[a][b] for a in rows for b in rows if a != b) or not rows:
        return "more GPUs are needed and NVLink does not join them: stages exchange far less than tensor parallelism"
    return f"more GPUs are needed, and stages leave more KV cache on them than TP={each}"


def _memory(request: PlanRequest, model: Model, chosen: Candidate) -> Iterator[Reason]:
    cache, run, parts = chosen.kv_cache, chosen.run_config, chosen.memory
    if chosen.gpus:
        yield Reason(
            field="gpu_memory_utilization",
            value=chosen.utilization,
            why=_utilization(tightest(chosen.gpus), chosen.run_config, parts),
            source=Source.HARDWARE,
        )
        if request.kv_cache_memory_bytes:
            why = "set by you, per GPU. vLLM does not check free memory in this mode"
            yield Reason(field="kv_cache_memory_bytes", value=chosen.kv_bytes, why=why, source=Source.YOU)
    elif request.gpu_memory_utilization is not None and not (
        request.kv_cache_memory_bytes or request.cpu_kv_cache_bytes
    ):
        # The user set it, so ``_credited`` gives the reason.
        yield Reason(field="gpu_memory_utilization", value=chosen.utilization, why="", source=Source.RULE)
    else:
        why = f"for {run.max_num_seqs} requests of {USEFUL_TOKENS:,} tokens and one of max_model_len"
        if cache.tokens < run.max_model_len + run.max_num_seqs * min(USEFUL_TOKENS, run.max_model_len):
            why = "half of the memory that is left; the rest is the page cache's and other programs'"
        if request.cpu_kv_cache_bytes:
            why = "set by VLLM_CPU_KVCACHE_SPACE, which vLLM prefers to its flag"
        source = Source.YOU if request.cpu_kv_cache_bytes else Source.RULE
        yield Reason(field="kv_cache_memory_bytes", value=chosen.kv_bytes, why=why, source=source)
    source, why = Source.MODEL, "what the model is made for, and it fits"
    if run.max_model_len < model.max_model_len:
        source, why = (
            Source.HARDWARE,
            f"cut from the model's own {model.max_model_len:,}: the KV cache holds no longer request",
        )
    yield Reason(field="max_model_len", value=run.max_model_len, why=why, source=source)
    if request.fp8_kv and run.kv_cache_dtype == "fp8":
        why = "as launch.quality fp8-kv allows: half the bytes of the model's own dtype, and half to read for a token"
        yield Reason(field="kv_cache_dtype", value="fp8", why=why, source=Source.RULE)
    if cache.bytes_per_token:
        size = (
            f"{gib(cache.bytes)} on {max(1, len(chosen.gpus) // chosen.layout.data)} GPU(s)"
            if chosen.gpus
            else gib(cache.bytes)
        )
        why = f"{size} hold {cache.tokens:,} tokens of {cache.bytes_per_token:,} bytes: {_streams(chosen)}"
        yield Reason(field="kv_cache", value=cache.tokens, why=why, source=Source.HARDWARE)


def _dtype(request: PlanRequest, model: Model, chosen: Candidate) -> Iterator[Reason]:
    dtype = chosen.run_config.dtype
    if not chosen.gpus and request.dtype is None and dtype != model.dtype:
        why = f"not the model's {model.dtype}: {AMX_FAULT}. The cost: no AMX for matrix products, which are slower"
        yield Reason(field="dtype", value=dtype, why=why, source=Source.HARDWARE)


def _streams(chosen: Candidate) -> str:
    tokens, longest = chosen.kv_cache.tokens, chosen.run_config.max_model_len
    usual = min(USEFUL_TOKENS, longest)
    return f"{tokens / longest:,.1f} requests of {longest:,} tokens, or {tokens // usual:,} of {usual:,}"


def _utilization(gpu: Gpu, run: RunConfig, parts: memory.Memory) -> str:
    """What stands between a GPU's memory and what vLLM may claim of it."""
    taken = gpu.memory_total - gpu.memory_free
    others = f" less {gib(taken)} that is taken already" if taken else ""
    graphs = "" if run.estimate_cudagraphs or not parts.cuda_graphs else f", CUDA graphs {gib(parts.cuda_graphs)}"
    return (
        f"{gib(gpu.memory_total)} on GPU {gpu.index}{others}, less what vLLM does not count: the CUDA context "
        f"{gib(parts.context)}{graphs} and {gib(parts.safety)} for what serving takes beyond the profile"
    )


def _batch(request: PlanRequest, model: Model, chosen: Candidate) -> Iterator[Reason]:
    default = default_batch(chosen.gpus[0] if chosen.gpus else None, chosen.layout.gpus_per_replica)
    values = chosen.run_config.max_num_batched_tokens, chosen.run_config.max_num_seqs
    own = batch_of(request, model, default)
    states = any(layer.state_shapes for layer in model.layers) and values[0] == own[0]
    for field, value, vllms, usual in zip(
        ("max_num_batched_tokens", "max_num_seqs"), values, own, default, strict=True
    ):
        source, why = Source.VLLM, "vLLM default for this hardware"
        if value != vllms:
            source, why = (
                Source.RULE,
                f"less than vLLM's default, {vllms:,}, whose activations would leave too little KV cache",
            )
            if field == "max_num_seqs" and states:
                why = f"less than vLLM's default, {vllms:,}: each request keeps a recurrent state, and no more fit"
        elif value != usual:
            why = f"what vLLM makes of its default, {usual:,}, for this model and what you set"
        yield Reason(field=field, value=value, why=why, source=source)
    if (share := watermark_of(request, chosen)) or request.watermark is not None:
        why = "share of the KV cache reserved for running requests, so that fewer are preempted and recomputed"
        yield Reason(field="watermark", value=share, why=why, source=Source.RULE)


def too_small(found: Candidate) -> str:
    """Why a split that holds was passed over: its cache is not useful."""
    tokens, longest = found.kv_cache.tokens, found.run_config.max_model_len
    short = tokens < USEFUL_REQUESTS * min(USEFUL_TOKENS, longest)
    few = (
        f"fewer than {USEFUL_REQUESTS} requests of {USEFUL_TOKENS:,}"
        if short
        else f"max_model_len is cut to {longest:,}"
    )
    return f"a KV cache of {tokens:,} tokens: {few}"


def cpu_remedy(miss: NoFit) -> str:
    """What to do where the CPU engine has too little memory."""
    longest = f"give --max-model-len {miss.longest}, or " if miss.longest else ""
    return f"{longest}raise the memory limit, take a smaller model, or plan for GPUs with --hardware"


def warnings(request: PlanRequest, hardware: Hardware, model: Model, chosen: Candidate) -> list[str]:
    """What the person should know before believing the plan."""
    return [
        *_loud_cuts(request, model, chosen),
        *_gpu_warnings(request, hardware, chosen),
        *_guess(request, model, chosen),
    ]


def _loud_cuts(request: PlanRequest, model: Model, chosen: Candidate) -> Iterator[str]:
    longest = chosen.run_config.max_model_len
    if request.length is None and longest < model.max_model_len:
        need = kv.bytes_per_request(chosen.placement, model.max_model_len)
        yield (
            f"max_model_len is cut from the model's own {model.max_model_len:,} to {longest:,} tokens: one request of "
            f"the model's length needs {gib(need)} of KV cache and {gib(chosen.kv_cache.bytes)} are there"
        )
    if not chosen.useful and longest == (request.length or model.max_model_len):
        yield f"the KV cache is small: {_streams(chosen)} at a time; others wait"
    if model.tensors_from == "config":
        yield "there are no safetensors headers to read, so the size of the weights follows from config.json alone"


def _gpu_warnings(request: PlanRequest, hardware: Hardware, chosen: Candidate) -> Iterator[str]:
    yield from (f"{why}; it is left out" for gpu in hardware.gpus if (why := gpu_too_old(gpu)))
    for gpu in chosen.gpus:
        yield from (f"GPU {gpu.index}: {fault}" for fault in gpu.faults)
        held = ", ".join(f"{process.name} (pid {process.pid})" for process in gpu.processes)
        if held:
            yield f"GPU {gpu.index} is shared: {gib(gpu.memory_total - gpu.memory_free)} are held, by {held}"
    if not chosen.gpus:
        nodes = len(hardware.cpu.numa_nodes) if hardware.cpu else 1
        if chosen.run_config.dtype == "bfloat16" and amx_attention(chosen.placement.model, hardware.cpu):
            way_out = (
                "this quantisation has no other"
                if only_bfloat16(request, chosen.placement.model)
                else "give --dtype float16"
            )
            yield f"{AMX_FAULT}: {way_out}"
        if nodes > 1 and request.tensor_parallel_size is None:
            yield f"the CPU has {nodes} NUMA nodes and one is used: --tensor-parallel-size {nodes} uses all of them"
        return
    if not chosen.useful and len(chosen.gpus) < len(hardware.gpus):
        yield f"{len(hardware.gpus) - len(chosen.gpus)} GPUs are left unused"
    if request.gpu_memory_utilization is not None and chosen.utilization > chosen.safe_utilization:
        yield (
            f"gpu_memory_utilization {chosen.utilization} leaves less than the {gib(chosen.memory.safety)} that "
            f"serving may take beyond vLLM's profile: up to {chosen.safe_utilization} is safe"
        )


def _guess(request: PlanRequest, model: Model, chosen: Candidate) -> Iterator[str]:
    """VLLM's guess at CUDA graphs, where it makes one that nobody asked for and the cache is much smaller for it."""
    left_to_vllm = request.gpu_memory_utilization is not None and request.estimate_cudagraphs is None
    if not chosen.gpus or not left_to_vllm or request.kv_cache_memory_bytes:
        return
    plain = msgspec.structs.replace(chosen.run_config, estimate_cudagraphs=False)
    told_not_to = Placement(model, plain, chosen.layout, chosen.placement.gpu)
    guess, taken = chosen.memory.cuda_graphs, memory.of_gpu(told_not_to).cuda_graphs
    if guess - taken > chosen.kv_bytes * MUCH:
        yield (
            f"vLLM will take {gib(guess)} off the KV cache for CUDA graphs that take {gib(taken)}: it guesses, since "
            "gpu_memory_utilization is set; without it the plan leaves them what they take"
        )
