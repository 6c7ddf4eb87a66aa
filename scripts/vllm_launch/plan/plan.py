"""Decides how vLLM should run: a pure function from the user's request, the hardware and the model to a Plan.

``fit`` computes what one split on certain GPUs holds. ``choose`` chooses the best split. ``alternatives`` finds changes
that would fit when no split fits. ``explain`` explains the choice in words, and ``plan_warnings`` warns.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from vllm_launch.engine.allocator import EXPANDABLE
from vllm_launch.errors import UsageError
from vllm_launch.machine.gpus import Gpu, Hardware, gpu_too_old, usable
from vllm_launch.model.model import Model
from vllm_launch.plan import explain, plan_warnings
from vllm_launch.plan.alternatives import nothing_fits, unsafe_utilization
from vllm_launch.plan.choose import choose
from vllm_launch.plan.clients import clients
from vllm_launch.plan.fit import Candidate, NoFit, fit_on_cpu, kv_cache_on_host, watermark_of
from vllm_launch.plan.reason import Reason, Rejected
from vllm_launch.plan.request import Objective, PlanRequest, batch_of, run_of, unsplit_item
from vllm_launch.sizing.allocator import uses_expandable_segments
from vllm_launch.sizing.kv import KvCache
from vllm_launch.sizing.memory import Memory
from vllm_launch.sizing.parallel import Layout
from vllm_launch.sizing.run_config import default_batch
from vllm_launch.sizing.weights import offloaded_on_host
from vllm_launch.units import gib


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How vLLM should run. Its JSON form is a stable interface (``plan --format json``). Sizes are in bytes.

    ``memory`` is of the GPU with the least memory left. ``options`` are the vLLM options that the plan sets, by
    dest, without the options that the user set.
    """

    model: str
    objective: Objective
    tensor_parallel_size: int
    pipeline_parallel_size: int
    data_parallel_size: int
    gpus: tuple[Gpu, ...]  # of all replicas, in the order in which vLLM uses them; empty on the CPU engine
    gpus_per_replica: int  # 0 on the CPU engine
    gpu_memory_utilization: float  # 0.0 on the CPU engine, which gets kv_cache_memory_bytes instead
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    watermark: float  # share of the KV cache
    kv_cache: KvCache
    memory: Memory
    options: dict[str, object]
    env: dict[str, str]
    reasons: list[Reason]
    rejected: list[Rejected]
    warnings: list[str]


class PlanWithCommand(Plan, frozen=True, kw_only=True):
    """A plan and its command line. ``env`` is the complete environment that the command line needs."""

    argv: list[str]


def plan(request: PlanRequest, hardware: Hardware, model: Model) -> Plan:
    """Return how to run ``model`` on ``hardware``.

    Raises:
        UsageError: the request does not fit, or vLLM would refuse it. The text names changes that would fit.
    """
    if request.length is not None and request.length > model.max_model_len and not request.long_max_model_len:
        raise UsageError(
            f"max_model_len {request.length}",
            f"the model supports at most {model.max_model_len} tokens, and vLLM refuses more",
            "lower it, or set VLLM_ALLOW_LONG_MAX_MODEL_LEN=1 if you know that the model works beyond that length",
        )
    for modality, tokens in unsplit_item(request, model):
        if request.max_num_batched_tokens is not None and request.max_num_batched_tokens < tokens:
            raise UsageError(
                f"max_num_batched_tokens {request.max_num_batched_tokens}",
                f"one {modality} has up to {tokens:,} tokens, and a batch of this model must hold all of them",
                f"set --max-num-batched-tokens {tokens} or more",
            )
    if not hardware.gpus:
        return _plan_cpu(request, hardware, model)
    gpus = usable(hardware.gpus)
    if not gpus:
        why = "; ".join(dict.fromkeys(gpu_too_old(gpu) or "" for gpu in hardware.gpus))
        remedy = "use newer GPUs, or the CPU: install 'vllm-launch[cpu]' and set CUDA_VISIBLE_DEVICES= to hide these"
        raise UsageError("hardware", why, remedy)
    chosen, no_fits = choose(request, hardware, gpus, model)
    if chosen is None:
        raise nothing_fits(request, hardware, gpus, model, no_fits)
    _check_host_memory(request, hardware, chosen)
    return _plan_of(request, hardware, model, chosen, no_fits)


def _check_host_memory(request: PlanRequest, hardware: Hardware, chosen: Candidate) -> None:
    """Refuse a plan whose weights and KV cache in host memory exceed the memory that is available there."""
    weights = sum(moved.host for moved in offloaded_on_host(chosen.placement))
    host = weights + kv_cache_on_host(request, chosen)
    if hardware.cpu and host > hardware.cpu.memory_available:
        why = f"{gib(host)} would be in host memory, and {gib(hardware.cpu.memory_available)} are available"
        raise UsageError("offloading", why, "offload less, or raise the memory limit")


def _plan_of(
    request: PlanRequest, hardware: Hardware, model: Model, chosen: Candidate, no_fits: Sequence[NoFit]
) -> Plan:
    layout, run = chosen.layout, chosen.run_config
    for_clients = clients(request, model)
    return Plan(
        model=model.name,
        objective=request.objective,
        tensor_parallel_size=layout.tensor,
        pipeline_parallel_size=layout.pipeline,
        data_parallel_size=layout.data,
        gpus=chosen.gpus,
        gpus_per_replica=layout.gpus_per_replica if chosen.gpus else 0,
        gpu_memory_utilization=chosen.utilization,
        max_model_len=run.max_model_len,
        max_num_seqs=run.max_num_seqs,
        max_num_batched_tokens=run.max_num_batched_tokens,
        watermark=watermark_of(request, chosen),
        kv_cache=chosen.kv_cache,
        memory=chosen.memory,
        options=_options(request, chosen) | dict(for_clients.options),
        env=_environment(request, hardware, chosen),
        reasons=[*explain.reasons(request, hardware, model, chosen), *for_clients.reasons],
        rejected=[Rejected(plan=no_fit.layout.title, why=no_fit.why) for no_fit in no_fits],
        warnings=[
            *hardware.warnings,
            *model.warnings,
            *plan_warnings.warnings(request, hardware, model, chosen),
            *unsafe_utilization(request, hardware, model, chosen),
            *for_clients.warnings,
        ],
    )


def _options(request: PlanRequest, chosen: Candidate) -> dict[str, object]:
    """Return the vLLM options that the plan sets, by dest.

    Options that the user set and parallel sizes of 1, vLLM's default, are not among them.
    """
    layout, run = chosen.layout, chosen.run_config
    sizes = {
        "tensor_parallel_size": layout.tensor,
        "pipeline_parallel_size": layout.pipeline,
        "data_parallel_size": layout.data,
    }
    planned: dict[str, object] = {dest: size for dest, size in sizes.items() if size > 1}
    planned |= {
        "max_model_len": run.max_model_len,
        "max_num_seqs": run.max_num_seqs,
        "max_num_batched_tokens": run.max_num_batched_tokens,
    }
    if layout.expert_parallel:
        planned["enable_expert_parallel"] = True
    if chosen.gpus:
        planned["gpu_memory_utilization"] = chosen.utilization
    elif request.cpu_kv_cache_bytes is None and request.gpu_memory_utilization is None:
        planned["kv_cache_memory_bytes"] = chosen.kv_bytes
    if request.fp8_kv and run.kv_cache_dtype == "fp8":
        planned["kv_cache_dtype"] = "fp8"
    if not chosen.gpus and run.dtype != chosen.placement.model.dtype:
        planned["dtype"] = run.dtype  # on old GPUs vLLM changes the dtype itself
    if share := watermark_of(request, chosen):
        planned["watermark"] = share
    return {dest: value for dest, value in planned.items() if getattr(request, dest) is None}


def _environment(request: PlanRequest, hardware: Hardware, chosen: Candidate) -> dict[str, str]:
    """Return the environment of vLLM.

    It names the visible GPUs, unless vLLM uses all GPUs of one kind in their order. It disables vLLM's estimate of
    CUDA graphs, if the plan reserves memory for them. It turns on the allocator's expandable segments, unless they do
    not work or the user decided on them. GPUs are given by index in NVML's bus order, because vLLM expects integers.
    MIG slices are given by UUID, because they have no index.
    """
    gpus = chosen.gpus
    if not gpus:
        return {}
    environment = {} if chosen.run_config.estimate_cudagraphs else {"VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS": "0"}
    if request.expandable_segments is None and uses_expandable_segments(chosen.placement):
        environment |= EXPANDABLE
    if gpus == hardware.gpus and len({gpu.name for gpu in gpus}) == 1 and not gpus[0].mig_profile:
        return environment
    names = [gpu.uuid if gpu.mig_profile else str(gpu.index) for gpu in gpus]
    return environment | {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(names)}


def _plan_cpu(request: PlanRequest, hardware: Hardware, model: Model) -> Plan:
    if hardware.cpu is None:
        raise UsageError(
            "hardware", "neither GPUs nor a CPU are described", "set --hardware, for example --hardware H100:1"
        )
    layout = Layout(
        tensor=request.tensor_parallel_size or 1,
        pipeline=request.pipeline_parallel_size or 1,
        data=request.data_parallel_size or 1,
        expert_parallel=bool(request.enable_expert_parallel),
    )
    batch = batch_of(request, model, default_batch(None, layout.gpus_per_replica))
    run = run_of(request, model, batch, None, hardware.cpu)
    result = fit_on_cpu(request, layout, hardware.cpu, model, run)
    if isinstance(result, NoFit):
        raise UsageError(f"{model.name} on this CPU", result.why, explain.cpu_remedy(result))
    return _plan_of(request, hardware, model, result, ())
