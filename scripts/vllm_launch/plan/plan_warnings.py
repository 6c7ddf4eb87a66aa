"""Warns of what the user should know before using a plan. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator

import msgspec

from vllm_launch.machine.gpus import Hardware, gpu_too_old
from vllm_launch.model.model import Model
from vllm_launch.plan.explain import AMX_FAULT, unused_gpus
from vllm_launch.plan.explain_memory import requests_that_fit
from vllm_launch.plan.fit import Candidate
from vllm_launch.plan.request import PlanRequest, amx_attention, only_bfloat16
from vllm_launch.sizing import kv, memory
from vllm_launch.sizing.encoder import active_items
from vllm_launch.sizing.placement import Placement
from vllm_launch.sizing.weights import offloaded_by_rank
from vllm_launch.units import GIB, gib

MODALITIES = ("image", "video", "audio")
"""Modalities of vLLM's limits (config/multimodal.py). vLLM ignores other names without a message."""

WARNING_SHARE = 1 / 20
"""Share of the KV cache that must be lost before the plan warns."""


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
        yield f"the KV cache is small: it holds {requests_that_fit(chosen)} at a time. Other requests wait"
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
        yield f"the plan does not use {unused_gpus(request, hardware, chosen)}"
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
    """Yield warnings about options for images, videos and audio that do not do what the user expects.

    Also yield a warning about a processor cache that is larger than the available host memory.
    """
    limits = request.limit_mm_per_prompt or {}
    options = {name for limit in limits.values() if isinstance(limit, dict) for name in limit} - {"count"}
    if model.media is None:
        return
    known = {*MODALITIES, *(item.modality for item in model.media.items)}
    if unknown := sorted(name for name in limits if name not in known):
        yield (f"vLLM ignores {', '.join(unknown)} in --limit-mm-per-prompt. It knows {', '.join(sorted(known))}")
    size = 4.0 if request.mm_processor_cache_gb is None else request.mm_processor_cache_gb
    caches = 1 + chosen.layout.data  # the API server's, and one for each engine
    cached = int(size * GIB) * caches
    if active_items(model, chosen.run_config) and hardware.cpu and cached > hardware.cpu.memory_available:
        most = math.floor(10 * hardware.cpu.memory_available / GIB / caches) / 10
        yield (
            f"vLLM keeps processed images, videos and audio in up to {gib(cached)} of host memory, and "
            f"{gib(hardware.cpu.memory_available)} are available: set --mm-processor-cache-gb to at most {most:.1f}"
        )
    if options and active_items(model, chosen.run_config):
        reduce = "reduces" if len(options) == 1 else "reduce"
        yield (
            f"--limit-mm-per-prompt: {', '.join(sorted(options))} {reduce} only the memory that vLLM measures at "
            "start-up. Clients can still send the largest item, so the plan counts the largest item"
        )
    if request.mm_encoder_tp_mode == "data" and not model.media.encoder_tp_data:
        yield "this model does not support --mm-encoder-tp-mode data, so vLLM uses --mm-encoder-tp-mode weights"
