"""Explains a decision in words: the reason for each value, and why splits were rejected. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from vllm_launch.machine.gpus import Gpu, Hardware, alike, gpu_too_old
from vllm_launch.model.model import Model
from vllm_launch.plan.explain_memory import media_reasons, memory_reasons
from vllm_launch.plan.fit import USEFUL_REQUESTS, USEFUL_TOKENS, Candidate, NoFit, watermark_of
from vllm_launch.plan.reason import Reason, Source
from vllm_launch.plan.request import AUTO, PlanRequest, batch_of
from vllm_launch.sizing import kv
from vllm_launch.sizing.parallel import problems
from vllm_launch.sizing.run_config import default_batch
from vllm_launch.units import counted

AMX_FAULT = "this CPU has AMX, and on some such CPUs vLLM's bfloat16 attention crashes the engine with SIGILL"


def reasons(request: PlanRequest, hardware: Hardware, model: Model, chosen: Candidate) -> list[Reason]:
    """Return one reason for each value of the plan, including the values that the user set."""
    planned = [
        *_parallel_reasons(request, hardware, model, chosen),
        *memory_reasons(request, model, chosen),
        *media_reasons(model, chosen),
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
        why += f". The plan does not use {unused_gpus(request, hardware, chosen)}"
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
    given = (
        "with the parallel sizes that you set, " if request.pipeline_parallel_size or request.data_parallel_size else ""
    )
    has = counted(chosen.layout.gpus_per_replica, "GPU")
    return f"{given}a replica has {has}, the smallest number that holds {needed}"


def _cache_size(chosen: Candidate) -> str:
    return f"{chosen.kv_cache.tokens:,} KV tokens" if chosen.kv_cache.bytes_per_token else "no KV cache is needed"


def _useful_kv_cache(chosen: Candidate) -> str:
    """Return what ``fit`` calls a useful KV cache, for a model of this length."""
    tokens = min(USEFUL_TOKENS, chosen.run_config.max_model_len)
    return f"a useful KV cache (it can hold {USEFUL_REQUESTS} requests of {tokens:,} tokens, or one of max_model_len)"


def _replicas(count: int, gpus_per_replica: int, used: int, total: int) -> str:
    """Return "8 replicas, 1 GPU each (8 of 8 GPUs used)"."""
    each = " each" if count > 1 else ""
    return f"{counted(count, 'replica')}, {counted(gpus_per_replica, 'GPU')}{each} ({used} of {total} GPUs used)"


def unused_gpus(request: PlanRequest, hardware: Hardware, chosen: Candidate) -> str:
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


def _dtype_reasons(request: PlanRequest, model: Model, chosen: Candidate) -> Iterator[Reason]:
    dtype = chosen.run_config.dtype
    if not chosen.gpus and request.dtype is None and dtype != model.dtype:
        why = f"replaces the model's {model.dtype}: {AMX_FAULT}. Matrix products then run without AMX and are slower"
        yield Reason(field="dtype", value=dtype, why=why, source=Source.HARDWARE)


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
