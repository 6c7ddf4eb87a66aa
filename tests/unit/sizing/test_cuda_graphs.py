"""Tests of CUDA graphs, in bytes. Expected values follow from vLLM's sources or from constants in cuda_graphs.py."""

from __future__ import annotations

import math

import pytest
from builders import DEEPSEEK, EXPERTS, MIB, MOE, gpu, model, placed, run

from vllm_launch.machine.generation import Generation, generation_of
from vllm_launch.sizing import cuda_graphs
from vllm_launch.sizing.cuda_graphs import capture_sizes
from vllm_launch.sizing.memory import kv_bytes, memory_of_gpu, safe_utilization
from vllm_launch.sizing.parallel import Layout

ONE = Layout()
AMPERE = gpu(capability=(8, 0))
"""A GPU on which attention does not split contexts."""
NO_ESTIMATE = run(estimate_cudagraphs=False)
"""A run in which vLLM does not estimate CUDA graphs, because the plan reserves their memory."""


@pytest.mark.parametrize(
    ("changes", "capability", "count"),
    [
        # 1, 2, 4, then 31 from 8 to 248, then 17 from 256 to 512
        ({}, (9, 0), 51),
        ({"max_num_seqs": 256}, (8, 9), 51),
        ({"max_num_seqs": 1024}, (12, 0), 51),
        # data-centre Blackwell goes to 1,024: 49 from 256
        ({"max_num_seqs": 1024}, (10, 0), 3 + 31 + 49),
        ({"max_num_seqs": 1024}, (10, 3), 3 + 31 + 49),
        # a full batch above the ceiling is not captured
        ({"max_num_seqs": 513}, (9, 0), 51),
        ({"max_num_seqs": 1025}, (10, 0), 3 + 31 + 49),
        ({"max_num_seqs": 1}, (9, 0), 2),  # 1, 2
        ({"max_num_seqs": 4}, (9, 0), 4),  # 1, 2, 4, 8
        ({"max_num_seqs": 5}, (9, 0), 5),  # 1, 2, 4, 8, and a full batch: 5
        ({"max_num_seqs": 36}, (9, 0), 3 + 9 + 1),  # 8 to 72, and 36
        ({"max_num_seqs": 127}, (9, 0), 3 + 31 + 1),  # up to 254: 8 to 248, and 127
        ({"max_num_seqs": 128}, (9, 0), 3 + 31 + 1),  # 256
        ({"max_num_seqs": 150}, (9, 0), 3 + 31 + 3 + 1),  # up to 300: 256, 272, 288; and 150
        ({"max_num_batched_tokens": 20}, (9, 0), 3 + 2 + 1),  # 8, 16, and the full batch: 20
        ({"max_num_batched_tokens": 100, "max_num_seqs": 50}, (9, 0), 3 + 12 + 2),  # 8 to 96; 50 and 100
        ({"max_cudagraph_capture_size": 100}, (9, 0), 3 + 12),  # set by the user: no size of a full batch is added
        ({"max_cudagraph_capture_size": 2048}, (9, 0), 3 + 31 + 113),
        ({"max_cudagraph_capture_size": 1}, (9, 0), 1),
        ({"max_cudagraph_capture_size": 0}, (9, 0), 0),
        ({"cudagraph_mode": "NONE"}, (9, 0), 0),
    ],
)
def test_the_number_of_captured_batch_sizes(changes, capability, count):
    assert len(capture_sizes(run(**changes), generation_of(capability))) == count


def graphs(batch=None, layout=ONE, layers=32):
    return memory_of_gpu(placed(model(layers=layers), batch or run(), layout, gpu())).cuda_graphs


def splits(size, heads=32, width=128):
    """Return the bytes of 32 splits of ``size`` requests, and a sum for each (FlashAttention 3)."""
    return 32 * size * heads * (width + 1) * 4


def test_the_estimate_is_a_pool_splits_and_a_term_for_each_layer_and_size():
    # 51 sizes, and the two largest again as full batches: 512 and 496
    measured = cuda_graphs.ESTIMATE_BASE + splits(512) + 53 * 32 * cuda_graphs.ESTIMATE_PER_LAYER
    assert graphs() == round(measured) + cuda_graphs.RELEASED_BEFORE_CAPTURE + splits(496) + 50 * MIB
    few = run(max_num_seqs=5)  # 1, 2, 4, 5, 8, of which 8 is not a full batch
    measured = cuda_graphs.ESTIMATE_BASE + splits(5) + 7 * 32 * cuda_graphs.ESTIMATE_PER_LAYER
    assert graphs(few) == round(measured) + cuda_graphs.RELEASED_BEFORE_CAPTURE + splits(4) + 3 * MIB
    single = run(max_num_seqs=1)  # 1 and 2: there is no second full graph
    assert graphs(single) == round(cuda_graphs.ESTIMATE_BASE + splits(1) + 3 * 32 * cuda_graphs.ESTIMATE_PER_LAYER)


def test_the_released_splits_double_with_a_norm_of_queries_and_keys():
    assert memory_of_gpu(placed(model(qk_norm=True), run(), ONE, gpu())).cuda_graphs - graphs() == splits(496)


def test_a_feed_forward_is_released_if_attention_does_not_split():
    # 83 sizes. vLLM captures the full batches of 1,008 and 1,024. Attention does not split for so many requests
    measured = cuda_graphs.ESTIMATE_BASE + 85 * 32 * cuda_graphs.ESTIMATE_PER_LAYER
    wide = graphs(run(max_cudagraph_capture_size=1024))
    assert wide == round(measured) + cuda_graphs.RELEASED_BEFORE_CAPTURE + 3 * 1008 * 14336 * 2 + 82 * MIB
    measured = cuda_graphs.ESTIMATE_BASE + 53 * 32 * cuda_graphs.ESTIMATE_PER_LAYER  # FlashAttention 2
    older = memory_of_gpu(placed(model(), run(), ONE, AMPERE)).cuda_graphs
    assert older == round(measured) + cuda_graphs.RELEASED_BEFORE_CAPTURE + 3 * 496 * 14336 * 2 + 50 * MIB
    shard = memory_of_gpu(placed(model(), run(), Layout(tensor=2), AMPERE)).cuda_graphs
    assert older - shard == 3 * 496 * 14336 * 2 // 2


@pytest.mark.parametrize(
    ("estimated", "per_layer"),
    [(True, 53 * cuda_graphs.ESTIMATE_PER_LAYER), (False, 102 * cuda_graphs.ACTUAL_PER_LAYER)],
)
def test_a_layer_of_latent_attention_needs_more_memory_in_a_graph_than_another(estimated, per_layer):
    batch = run(estimate_cudagraphs=estimated, kv_cache_dtype="fp8")  # its kernels get no memory for splits
    more = [
        memory_of_gpu(placed(model(layers=layers, mla=DEEPSEEK), batch, ONE, gpu())).cuda_graphs for layers in (8, 16)
    ]
    assert more[1] - more[0] == pytest.approx(8 * (1 + cuda_graphs.LATENT_EXTRA) * per_layer, abs=1)
    mixed = memory_of_gpu(placed(model(layers=(MOE,) * 32, experts=EXPERTS), batch, ONE, gpu())).cuda_graphs
    assert mixed == graphs(batch)


def test_with_adapters_every_batch_size_is_captured_twice():
    """v1/worker/gpu/lora_utils.py:get_lora_capture_cases."""
    more = 51 * (32 * cuda_graphs.ESTIMATE_PER_LAYER + MIB)
    assert graphs(run(adapter_ranks=16)) - graphs() == pytest.approx(more, abs=1)


def test_a_shard_has_splits_of_only_its_own_heads():
    assert graphs() - graphs(layout=Layout(tensor=2)) == (splits(512) + splits(496)) // 2


def test_the_splits_of_latent_attention_have_the_width_of_the_latent():
    """FP8 is different: backends/mla/flashattn_mla.py cannot read it, and flashmla.py splits by multiprocessors."""
    latent = model(mla=DEEPSEEK)
    fp8 = memory_of_gpu(placed(latent, run(kv_cache_dtype="fp8"), ONE, gpu())).cuda_graphs
    released = splits(496, width=512) - 3 * 496 * 14336 * 2
    assert memory_of_gpu(placed(latent, run(), ONE, gpu())).cuda_graphs - fp8 == splits(512, width=512) + released


def test_a_stage_captures_only_its_own_layers():
    each = 53 * cuda_graphs.ESTIMATE_PER_LAYER
    assert graphs() - graphs(layout=Layout(pipeline=4)) == pytest.approx(24 * each, abs=1)


def test_without_graphs_their_memory_is_zero():
    assert graphs(run(cudagraph_mode="NONE")) == 0


def without_estimate(batch=None, layout=ONE, device=AMPERE):
    """Return the memory of a GPU if vLLM does not estimate CUDA graphs."""
    return memory_of_gpu(placed(model(), batch or NO_ESTIMATE, layout, device))


def test_the_real_memory_of_graphs_is_not_counted_by_vllm():
    result, estimated = without_estimate(), memory_of_gpu(placed(model(), run(), ONE, AMPERE))
    assert result.cuda_graphs == round(cuda_graphs.ACTUAL_BASE + 102 * 32 * cuda_graphs.ACTUAL_PER_LAYER)
    assert result.safety == memory_of_gpu(placed(model(), run(cudagraph_mode="NONE"), ONE, AMPERE)).safety
    assert kv_bytes(result, NO_ESTIMATE, AMPERE, 0.9) - kv_bytes(estimated, run(), AMPERE, 0.9) == estimated.cuda_graphs
    left = AMPERE.memory_free - result.context - result.safety - result.cuda_graphs
    assert safe_utilization(result, NO_ESTIMATE, AMPERE) == math.floor(left / AMPERE.memory_total * 10_000) / 10_000


def test_graphs_on_hopper_have_the_splits_of_the_largest_batch_that_is_split():
    assert without_estimate(device=gpu()).cuda_graphs == without_estimate().cuda_graphs + splits(512)
    wide = run(max_cudagraph_capture_size=1024, estimate_cudagraphs=False)  # 992 is one of the 83 sizes
    assert without_estimate(wide, device=gpu()).cuda_graphs == without_estimate(wide).cuda_graphs + splits(992)
    more = (166 - 102) * 32 * cuda_graphs.ACTUAL_PER_LAYER
    assert without_estimate(wide).cuda_graphs - without_estimate().cuda_graphs == pytest.approx(more, abs=1)


# ---- modes and sizes that the user sets


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ({"cudagraph_capture_sizes": (8, 1, 8, 9000)}, [1, 8]),
        ({"cudagraph_capture_sizes": (4,), "cudagraph_mode": "NONE"}, []),
        ({"max_num_seqs": 2, "performance_mode": "interactivity"}, [1, 2, 3, 4]),
        ({"max_num_seqs": 2, "num_speculative_tokens": 2}, [1, 2, 3, 4, 6, 8]),
        ({"max_num_seqs": 3, "num_speculative_tokens": 1, "max_num_batched_tokens": 7}, [1, 2, 4, 6, 7]),
    ],
)
def test_the_captured_sizes_are_the_users_or_fit_draft_tokens(changes, sizes):
    assert capture_sizes(run(**changes), Generation.HOPPER) == sizes


@pytest.mark.parametrize(
    ("mode", "full"),
    [
        ("NONE", []),
        ("PIECEWISE", []),
        ("FULL_DECODE_ONLY", [1, 2, 4]),
        ("FULL_AND_PIECEWISE", [1, 2, 4]),
        ("FULL", [1, 2, 4, 8]),
    ],
)
def test_full_graphs_are_of_decoding_batches_or_of_all(mode, full):
    assert cuda_graphs.full_graph_sizes(run(max_num_seqs=4, cudagraph_mode=mode), [1, 2, 4, 8]) == full


def test_full_graphs_have_the_same_number_of_draft_tokens_for_each_request():
    drafted = run(max_num_seqs=2, num_speculative_tokens=2)
    assert cuda_graphs.full_graph_sizes(drafted, [1, 2, 4, 8]) == [3, 6]


def test_only_the_graphs_of_the_mode_need_memory():
    each = 32 * cuda_graphs.ESTIMATE_PER_LAYER
    assert graphs(run(cudagraph_mode="PIECEWISE")) == round(cuda_graphs.ESTIMATE_BASE + 51 * each)
    assert graphs() - graphs(run(cudagraph_mode="FULL_DECODE_ONLY")) == pytest.approx(51 * each, abs=1)
    real = 32 * cuda_graphs.ACTUAL_PER_LAYER
    only_full = run(cudagraph_mode="FULL_DECODE_ONLY", estimate_cudagraphs=False)
    assert without_estimate().cuda_graphs - without_estimate(only_full).cuda_graphs == pytest.approx(51 * real, abs=1)
