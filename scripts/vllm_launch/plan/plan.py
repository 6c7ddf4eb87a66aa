"""Decides how vLLM should run: a pure function from what was asked, the hardware and the model to a Plan.

``fit`` says what one split on certain GPUs would hold, ``choose`` takes the best of them, ``alternatives`` names what
would fit where nothing does, and ``explain`` puts the choice into words.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from vllm_launch.errors import UsageError
from vllm_launch.machine.gpus import Gpu, Hardware, gpu_too_old
from vllm_launch.model.model import Model
from vllm_launch.plan import explain
from vllm_launch.plan.alternatives import nothing_fits
from vllm_launch.plan.choose import choose
from vllm_launch.plan.explain import Reason, Rejected
from vllm_launch.plan.fit import Candidate, NoFit, on_cpu, watermark_of
from vllm_launch.plan.request import Objective, PlanRequest, batch_of, run_of
from vllm_launch.sizing.kv import KvCache
from vllm_launch.sizing.memory import Memory
from vllm_launch.sizing.parallel import Layout
from vllm_launch.sizing.run_config import default_batch


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How to run. As JSON this is a contract (``plan --format json``). Bytes; ``memory`` is of the tightest GPU.

    ``options`` are the options of vLLM that the plan sets, by dest. What the user set is not among them.
    """

    model: str
    objective: Objective
    tensor_parallel_size: int
    pipeline_parallel_size: int
    data_parallel_size: int
    gpus: tuple[Gpu, ...]  # of all replicas, in the order in which vLLM takes them; none on the CPU engine
    gpus_per_replica: int  # 0 on the CPU engine
    gpu_memory_utilization: float  # 0.0 on the CPU engine, which is given kv_cache_memory_bytes instead
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
    """A plan and the command line that it comes to; ``env`` is all that the command line needs beside it."""

    argv: list[str]


def plan(request: PlanRequest, hardware: Hardware, model: Model) -> Plan:
    """Return how to run ``model`` on ``hardware``.

    Raises:
        UsageError: nothing that was asked for fits, or vLLM would refuse it; the text says what would fit.
    """
    if request.length is not None and request.length > model.max_model_len and not request.long_max_model_len:
        raise UsageError(
            f"max_model_len {request.length}",
            f"the model itself is made for {model.max_model_len} tokens and vLLM refuses more",
            "lower it, or set VLLM_ALLOW_LONG_MAX_MODEL_LEN=1 if the model is known to hold up",
        )
    if not hardware.gpus:
        return _plan_cpu(request, hardware, model)
    usable = tuple(gpu for gpu in hardware.gpus if not gpu_too_old(gpu))
    if not usable:
        why = "; ".join(dict.fromkeys(gpu_too_old(gpu) or "" for gpu in hardware.gpus))
        raise UsageError("hardware", why, "take newer GPUs, or hide these (CUDA_VISIBLE_DEVICES=) to use the CPU")
    chosen, missed = choose(request, hardware, usable, model)
    if chosen is None:
        raise nothing_fits(request, hardware, usable, model, missed)
    return _stated(request, hardware, model, chosen, missed)


def _stated(request: PlanRequest, hardware: Hardware, model: Model, chosen: Candidate, missed: Sequence[NoFit]) -> Plan:
    layout, run = chosen.layout, chosen.run_config
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
        options=_options(request, chosen),
        env=_environment(hardware, chosen),
        reasons=explain.reasons(request, hardware, model, chosen),
        rejected=[Rejected(plan=miss.layout.title, why=miss.why) for miss in missed],
        warnings=[*hardware.warnings, *model.warnings, *explain.warnings(request, hardware, model, chosen)],
    )


def _options(request: PlanRequest, chosen: Candidate) -> dict[str, object]:
    """The options of vLLM that the plan sets, by dest: neither what the user set, nor sizes of 1, which vLLM has."""
    layout, run = chosen.layout, chosen.run_config
    sizes = {
        "tensor_parallel_size": layout.tensor,
        "pipeline_parallel_size": layout.pipeline,
        "data_parallel_size": layout.data,
    }
    found: dict[str, object] = {dest: size for dest, size in sizes.items() if size > 1}
    found |= {
        "max_model_len": run.max_model_len,
        "max_num_seqs": run.max_num_seqs,
        "max_num_batched_tokens": run.max_num_batched_tokens,
    }
    if layout.expert_parallel:
        found["enable_expert_parallel"] = True
    if chosen.gpus:
        found["gpu_memory_utilization"] = chosen.utilization
    elif request.cpu_kv_cache_bytes is None and request.gpu_memory_utilization is None:
        found["kv_cache_memory_bytes"] = chosen.kv_bytes
    if request.fp8_kv and run.kv_cache_dtype == "fp8":
        found["kv_cache_dtype"] = "fp8"
    if not chosen.gpus and run.dtype != chosen.placement.model.dtype:
        found["dtype"] = run.dtype  # on old GPUs vLLM itself takes another
    if share := watermark_of(request, chosen):
        found["watermark"] = share
    return {dest: value for dest, value in found.items() if getattr(request, dest) is None}


def _environment(hardware: Hardware, chosen: Candidate) -> dict[str, str]:
    """Which GPUs vLLM sees, where they are not all in order, and that it need not guess at CUDA graphs.

    GPUs by index in bus order, which is NVML's, because vLLM reads whole numbers there; a MIG slice has only a UUID.
    """
    gpus = chosen.gpus
    if not gpus:
        return {}
    found = {} if chosen.run_config.estimate_cudagraphs else {"VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS": "0"}
    if gpus == hardware.gpus and len({gpu.name for gpu in gpus}) == 1 and not gpus[0].mig_profile:
        return found
    names = [gpu.uuid if gpu.mig_profile else str(gpu.index) for gpu in gpus]
    return found | {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(names)}


def _plan_cpu(request: PlanRequest, hardware: Hardware, model: Model) -> Plan:
    if hardware.cpu is None:
        raise UsageError("hardware", "neither GPUs nor a CPU are described", "give --hardware, such as H100:1")
    layout = Layout(
        tensor=request.tensor_parallel_size or 1,
        pipeline=request.pipeline_parallel_size or 1,
        data=request.data_parallel_size or 1,
        expert_parallel=bool(request.enable_expert_parallel),
    )
    batch = batch_of(request, model, default_batch(None, layout.gpus_per_replica))
    run = run_of(request, model, batch, None, hardware.cpu)
    found = on_cpu(request, layout, hardware.cpu, model, run)
    if isinstance(found, NoFit):
        raise UsageError(f"{model.name} on this CPU", found.why, explain.cpu_remedy(found))
    return _stated(request, hardware, model, found, ())
