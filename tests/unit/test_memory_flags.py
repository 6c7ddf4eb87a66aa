"""Tests of whole plans with options that change memory, for real models, from the words of a command line."""

from pathlib import Path

import msgspec
import pytest

from vllm_launch.decide import decide
from vllm_launch.errors import UsageError
from vllm_launch.machine.catalogue import parse_hardware_name
from vllm_launch.machine.cpu import Cpu
from vllm_launch.settings.flags import parse_flags
from vllm_launch.settings.read import read_settings

MODELS = Path(__file__).parents[1] / "data/models"
GIB = 1 << 30


def planned(model, words, hardware="H100"):
    """Return the plan and the warnings of the settings."""
    settings = read_settings(parse_flags([str(MODELS / model), *words.split()]), {})
    return decide(settings, parse_hardware_name(hardware)), settings.warnings


def test_a_thousand_blocks_hold_999_blocks_of_one_request():
    result, _ = planned("meta-llama--Llama-3.1-8B-Instruct", "--num-gpu-blocks-override 1000")
    assert result.max_model_len == 15_984
    assert result.kv_cache.tokens == 16_000  # as vLLM reports: 1,000 blocks
    with pytest.raises(UsageError, match="the longest that fits: 15,984"):
        planned("meta-llama--Llama-3.1-8B-Instruct", "--num-gpu-blocks-override 1000 --max-model-len 16000")


@pytest.mark.parametrize("hardware", ["H100:8", "H100:2"])
def test_more_gpus_do_not_make_a_cache_with_a_number_of_blocks_larger(hardware):
    result, _ = planned("meta-llama--Meta-Llama-3-8B", "--num-gpu-blocks-override 1000", hardware)
    assert (result.tensor_parallel_size, result.pipeline_parallel_size) == (1, 1)
    assert result.kv_cache.tokens == 16_000


def test_a_model_larger_than_the_gpu_fits_with_offloading():
    with pytest.raises(UsageError, match="lacks"):
        planned("meta-llama--Meta-Llama-3-70B", "--max-model-len 8192", "H100:1")
    result, _ = planned("meta-llama--Meta-Llama-3-70B", "--max-model-len 8192 --cpu-offload-gb 80", "H100:1")
    everything, _ = planned("meta-llama--Meta-Llama-3-70B", "--max-model-len 8192", "B200:1")
    assert everything.memory.weights - result.memory.weights == 80 * GIB
    halves, _ = planned("meta-llama--Meta-Llama-3-70B", "--offload-group-size 2", "H100:1")
    assert halves.memory.weights < 70 * GIB


def test_the_kv_cache_in_host_memory_is_counted_for_each_replica():
    settings = read_settings(
        parse_flags([str(MODELS / "meta-llama--Meta-Llama-3-8B"), "--kv-offloading-size", "20"]), {}
    )
    assert settings.warnings == ()
    hardware = parse_hardware_name("H100:2")
    cpu = Cpu(cores=8, memory_total=64 * GIB, memory_limit=None, memory_available=60 * GIB)
    result = decide(settings, msgspec.structs.replace(hardware, cpu=cpu))
    [reason] = [reason for reason in result.reasons if reason.field == "kv_offloading_size"]
    assert "40.00 GiB of host memory" in reason.why
    small = msgspec.structs.replace(cpu, memory_available=39 * GIB)
    with pytest.raises(UsageError, match=r"40\.00 GiB would be in host memory, and 39\.00 GiB are available"):
        decide(settings, msgspec.structs.replace(hardware, cpu=small))


def test_only_the_named_experts_are_offloaded():
    words = "--offload-group-size 1 --offload-params experts"
    experts, _ = planned("Qwen--Qwen3-30B-A3B", words)
    weights, _ = planned("Qwen--Qwen3-30B-A3B", "--offload-group-size 1")
    whole, _ = planned("Qwen--Qwen3-30B-A3B", "")
    assert weights.memory.weights < experts.memory.weights < 5 * GIB < whole.memory.weights
    names, _ = planned(
        "Qwen--Qwen3-30B-A3B", "--offload-group-size 1 --offload-params w13_weight mlp.experts.w2_weight"
    )
    assert names.memory.weights == experts.memory.weights


@pytest.mark.parametrize("words", ["-O0", "--enforce-eager", "-cc.cudagraph_mode NONE"])
def test_without_cuda_graphs_no_memory_is_kept_for_them(words):
    result, warnings = planned("meta-llama--Meta-Llama-3-8B", words)
    assert result.memory.cuda_graphs == 0
    assert warnings == ()


def test_suffix_decoding_needs_no_draft_model():
    result, warnings = planned("meta-llama--Meta-Llama-3-8B", "--spec-method suffix --spec-tokens 4")
    assert not any("the plan does not consider" in warning for warning in warnings)
    assert not any("draft" in warning for warning in result.warnings)


def test_without_sliding_windows_requests_are_as_long_as_the_window():
    result, _ = planned("mistralai--Mistral-7B-v0.1", "--disable-sliding-window")
    assert result.max_model_len == 4096
    with pytest.raises(UsageError, match="supports at most 4096 tokens"):
        planned("mistralai--Mistral-7B-v0.1", "--disable-sliding-window --max-model-len 8192")


def test_layers_with_a_window_keep_all_tokens_without_the_hybrid_manager():
    windows, _ = planned("google--gemma-3-27b-it", "")
    full, _ = planned("google--gemma-3-27b-it", "--disable-hybrid-kv-cache-manager")
    assert full.kv_cache.bytes_per_token == 62 * 2 * 16 * 128 * 2  # layers, K and V, heads, values, bytes
    assert full.kv_cache.bytes_per_token > 3 * windows.kv_cache.bytes_per_token


def test_a_hybrid_model_without_the_hybrid_manager_is_refused():
    with pytest.raises(UsageError, match="needs vLLM's hybrid KV cache manager"):
        planned("Qwen--Qwen3-Next-80B-A3B-Instruct", "--disable-hybrid-kv-cache-manager", "H200:4")


def test_redundant_experts_are_as_many_more_experts_in_each_layer():
    words = "--enable-expert-parallel --tensor-parallel-size 2 --enable-eplb --eplb-config.num_redundant_experts {}"
    plain, _ = planned("Qwen--Qwen3-30B-A3B", words.format(0), "H100:2")
    more, warnings = planned("Qwen--Qwen3-30B-A3B", words.format(32), "H100:2")
    assert len(warnings) == 1  # of the buffers of load balancing
    expert = 3 * 2048 * 768 * 2
    assert more.memory.weights - plain.memory.weights == pytest.approx(48 * 16 * expert, rel=0.01)
    with pytest.raises(UsageError, match="128 experts and 31 redundant experts are not divisible by the 2 ranks"):
        planned("Qwen--Qwen3-30B-A3B", words.format(31), "H100:2")
