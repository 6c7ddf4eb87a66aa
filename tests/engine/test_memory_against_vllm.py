"""Compares batch sizes, captured sizes and pipeline stages with vLLM's. The platform is simulated: there are no GPUs."""

# ruff: noqa: TID251 - the engine is what these tests compare with

import random
import warnings
from types import SimpleNamespace

import psutil
import pynvml
import pytest
import torch

from vllm_launch.machine.catalogue import parse_hardware_name
from vllm_launch.machine.cpu import host_memory
from vllm_launch.machine.generation import generation_of
from vllm_launch.machine.gpus import Gpu
from vllm_launch.sizing.cuda_graphs import capture_sizes
from vllm_launch.sizing.parallel import layer_split
from vllm_launch.sizing.run_config import RunConfig, default_batch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch deprecates what its own import uses
    from vllm.config import VllmConfig
    from vllm.config.compilation import CUDAGraphMode
    from vllm.distributed.utils import get_pp_indices
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform
    from vllm.usage.usage_lib import UsageContext
    from vllm.utils.mem_utils import MemorySnapshot

GIB = 1 << 30


def gpu(name="NVIDIA H200", total=140 * GIB, capability=(9, 0)):
    return Gpu(index=0, uuid="GPU-0", name=name, memory_total=total, memory_free=total, compute_capability=capability)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (12, 0)])
def test_captured_sizes_equal_vllms_on_a_simulated_gpu(monkeypatch, capability):
    monkeypatch.setattr(
        type(current_platform),
        "is_device_capability_family",
        classmethod(lambda _, family: capability[0] == family // 10),
        raising=False,
    )
    rng = random.Random(0)
    for _ in range(500):
        seqs, tokens = rng.randint(1, 1100), rng.choice([rng.randint(1, 600), 2048, 8192])
        max_size = rng.choice([None, None, rng.randint(1, 2000)])
        compilation = SimpleNamespace(
            cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE,
            max_cudagraph_capture_size=max_size,
            cudagraph_capture_sizes=None,
            post_init_cudagraph_sizes=lambda: None,
        )
        VllmConfig._set_cudagraph_sizes(
            SimpleNamespace(
                model_config=SimpleNamespace(enforce_eager=False),
                compilation_config=compilation,
                scheduler_config=SimpleNamespace(max_num_seqs=seqs, max_num_batched_tokens=tokens),
                uniform_decode_query_len=1,
                performance_mode="balanced",
            )
        )
        run = RunConfig(
            max_model_len=8192,
            max_num_seqs=seqs,
            max_num_batched_tokens=tokens,
            dtype="bfloat16",
            max_cudagraph_capture_size=max_size,
        )
        assert capture_sizes(run, generation_of(capability)) == sorted(compilation.cudagraph_capture_sizes), run


@pytest.mark.parametrize("name", ["NVIDIA H200", "NVIDIA A100-SXM4-80GB", "NVIDIA L4"])
@pytest.mark.parametrize("total", [22 * GIB, 70 * GIB - 1, 70 * GIB, 80 * GIB, 160 * GIB - 1, 160 * GIB])
def test_default_batches_equal_vllms_on_a_simulated_gpu(monkeypatch, name, total):
    platform = type(current_platform)
    monkeypatch.setattr(platform, "is_cpu", lambda _: False)
    monkeypatch.setattr(platform, "get_device_total_memory", classmethod(lambda _: total))
    monkeypatch.setattr(platform, "get_device_name", classmethod(lambda _: name))
    tokens, seqs = EngineArgs.get_batch_defaults(2)
    server = UsageContext.OPENAI_API_SERVER
    assert default_batch(gpu(name, total), 2) == (tokens[server], seqs[server])


def test_the_default_batch_equals_vllms_if_nvml_does_not_support_the_question_for_memory_simulated(monkeypatch):
    def not_supported(_):
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    platform = type(current_platform)
    monkeypatch.setattr(platform, "is_cpu", lambda _: False)
    monkeypatch.setattr(platform, "get_device_total_memory", classmethod(not_supported))
    tokens, seqs = EngineArgs.get_batch_defaults(1)
    server = UsageContext.OPENAI_API_SERVER
    assert default_batch(parse_hardware_name("GB10").gpus[0]) == (tokens[server], seqs[server])


def test_unified_memory_is_what_vllm_measures_on_a_simulated_integrated_gpu(monkeypatch):
    """The host's memory is this machine's. CUDA's answers are simulated."""
    total, available = host_memory()
    monkeypatch.setattr(type(current_platform), "is_integrated_gpu", classmethod(lambda *_: True), raising=False)
    monkeypatch.setattr(torch.accelerator, "memory_stats", lambda _: {})
    monkeypatch.setattr(torch.accelerator, "memory_reserved", lambda _: 0)
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda _: (GIB, total))
    measured = MemorySnapshot(device="cpu")
    assert measured.total_memory == total == psutil.virtual_memory().total
    assert measured.free_memory == pytest.approx(available, rel=0.05)  # other programs run meanwhile


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_default_batches_equal_vllms_on_the_cpu(world_size):
    tokens, seqs = EngineArgs.get_batch_defaults(world_size)
    server = UsageContext.OPENAI_API_SERVER
    assert default_batch(None, world_size) == (tokens[server], seqs[server])


def test_pipeline_stages_have_the_same_layers_as_in_vllm(monkeypatch):
    monkeypatch.delenv("VLLM_PP_LAYER_PARTITION", raising=False)
    for layers in range(1, 130):
        for pipeline in range(1, min(layers, 16) + 1):
            bounds = [get_pp_indices(layers, rank, pipeline) for rank in range(pipeline)]
            assert layer_split(layers, pipeline) == tuple(end - start for start, end in bounds)
