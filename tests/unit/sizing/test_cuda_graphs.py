"""CUDA graphs, in bytes. Expected values follow from vLLM's sources, named at each, or stand in cuda_graphs.py."""

from __future__ import annotations

import math

import pytest
from builders import DEEPSEEK, EXPERTS, MIB, MOE, gpu, model, placed, run

from vllm_launch.machine.generation import generation_of
from vllm_launch.sizing import cuda_graphs
from vllm_launch.sizing.cuda_graphs import capture_sizes
from vllm_launch.sizing.memory import kv_bytes, memory_of_gpu, safe_utilization
from vllm_launch.sizing.parallel import Layout

ONE = Layout()
AMPERE = gpu(capability=(8, 0))
"""Attention splits nothing there."""
NOT_GUESSED = run(estimate_cudagraphs=False)
"""As the plan has vLLM run where it decides on memory."""


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
        ({"max_num_batched_tokens": 20}, (9, 0), 3 + 2 + 1),  # 8, 16, and the whole batch: 20
        ({"max_num_batched_tokens": 100, "max_num_seqs": 50}, (9, 0), 3 + 12 + 2),  # 8 to 96; 50 and 100
        ({"max_cudagraph_capture_size": 100}, (9, 0), 3 + 12),  # asked for: no size of our own
        ({"max_cudagraph_capture_size": 2048}, (9, 0), 3 + 31 + 113),
        ({"max_cudagraph_capture_size": 1}, (9, 0), 1),
        ({"max_cudagraph_capture_size": 0}, (9, 0), 0),
        ({"enforce_eager": True}, (9, 0), 0),
    ],
)
def test_vllm_captures_so_many_batch_sizes(changes, capability, count):
    assert len(capture_sizes(run(**changes), generation_of(capability))) == count


def graphs(batch=None, layout=ONE, layers=32):
    return memory_of_gpu(placed(model(layers=layers), batch or run(), layout, gpu())).cuda_graphs


def splits(size, heads=32, width=128):
    """Room for 32 splits of ``size`` requests, and a sum for each (FlashAttention 3)."""
    return 32 * size * heads * (width + 1) * 4


def test_vllm_sees_a_pool_splits_and_something_for_each_layer_and_size_and_guesses_the_rest():
    # 51 sizes, and the two largest once more as whole batches: 512 and 496
    seen = cuda_graphs.ESTIMATE_BASE + splits(512) + 53 * 32 * cuda_graphs.ESTIMATE_PER_LAYER
    assert graphs() == round(seen) + cuda_graphs.RELEASED_BEFORE_CAPTURE + splits(496) + 50 * MIB
    few = run(max_num_seqs=5)  # 1, 2, 4, 5, 8, of which 8 is no whole batch
    seen = cuda_graphs.ESTIMATE_BASE + splits(5) + 7 * 32 * cuda_graphs.ESTIMATE_PER_LAYER
    assert graphs(few) == round(seen) + cuda_graphs.RELEASED_BEFORE_CAPTURE + splits(4) + 3 * MIB
    one = run(max_num_seqs=1)  # 1 and 2: there is no second
    assert graphs(one) == round(cuda_graphs.ESTIMATE_BASE + splits(1) + 3 * 32 * cuda_graphs.ESTIMATE_PER_LAYER)


def test_where_queries_and_keys_are_normed_twice_the_splits_are_released():
    assert memory_of_gpu(placed(model(qk_norm=True), run(), ONE, gpu())).cuda_graphs - graphs() == splits(496)


def test_a_feed_forward_is_released_where_nothing_is_split():
    # 83 sizes; 1,008 and 1,024 are the two that vLLM looks at, and for so many requests nothing is split
    seen = cuda_graphs.ESTIMATE_BASE + 85 * 32 * cuda_graphs.ESTIMATE_PER_LAYER
    wide = graphs(run(max_cudagraph_capture_size=1024))
    assert wide == round(seen) + cuda_graphs.RELEASED_BEFORE_CAPTURE + 3 * 1008 * 14336 * 2 + 82 * MIB
    seen = cuda_graphs.ESTIMATE_BASE + 53 * 32 * cuda_graphs.ESTIMATE_PER_LAYER  # FlashAttention 2
    older = memory_of_gpu(placed(model(), run(), ONE, AMPERE)).cuda_graphs
    assert older == round(seen) + cuda_graphs.RELEASED_BEFORE_CAPTURE + 3 * 496 * 14336 * 2 + 50 * MIB
    shard = memory_of_gpu(placed(model(), run(), Layout(tensor=2), AMPERE)).cuda_graphs
    assert older - shard == 3 * 496 * 14336 * 2 // 2


@pytest.mark.parametrize(
    ("guessed", "of_a_layer"),
    [(True, 53 * cuda_graphs.ESTIMATE_PER_LAYER), (False, 102 * cuda_graphs.ACTUAL_PER_LAYER)],
)
def test_a_layer_of_latent_attention_is_more_of_a_graph_than_another(guessed, of_a_layer):
    batch = run(estimate_cudagraphs=guessed, kv_cache_dtype="fp8")  # whose kernels get no room for splits
    more = [
        memory_of_gpu(placed(model(layers=layers, mla=DEEPSEEK), batch, ONE, gpu())).cuda_graphs for layers in (8, 16)
    ]
    assert more[1] - more[0] == pytest.approx(8 * (1 + cuda_graphs.LATENT_EXTRA) * of_a_layer, abs=1)
    mixed = memory_of_gpu(placed(model(layers=(MOE,) * 32, experts=EXPERTS), batch, ONE, gpu())).cuda_graphs
    assert mixed == graphs(batch)


def test_with_adapters_every_batch_size_is_captured_twice():
    """v1/worker/gpu/lora_utils.py:get_lora_capture_cases."""
    more = 51 * (32 * cuda_graphs.ESTIMATE_PER_LAYER + MIB)
    assert graphs(run(adapter_ranks=16)) - graphs() == pytest.approx(more, abs=1)


def test_a_shard_splits_its_own_heads_alone():
    assert graphs() - graphs(layout=Layout(tensor=2)) == (splits(512) + splits(496)) // 2


def test_latent_attention_splits_what_is_as_wide_as_its_latent():
    """But in FP8: backends/mla/flashattn_mla.py reads none, and flashmla.py splits by multiprocessors."""
    latent = model(mla=DEEPSEEK)
    fp8 = memory_of_gpu(placed(latent, run(kv_cache_dtype="fp8"), ONE, gpu())).cuda_graphs
    released = splits(496, width=512) - 3 * 496 * 14336 * 2
    assert memory_of_gpu(placed(latent, run(), ONE, gpu())).cuda_graphs - fp8 == splits(512, width=512) + released


def test_a_stage_captures_its_own_layers_alone():
    each = 53 * cuda_graphs.ESTIMATE_PER_LAYER
    assert graphs() - graphs(layout=Layout(pipeline=4)) == pytest.approx(24 * each, abs=1)


def test_without_graphs_nothing_is_taken_for_them():
    assert graphs(run(enforce_eager=True)) == 0


def taken(batch=None, layout=ONE, on=AMPERE):
    """Where vLLM is told not to guess."""
    return memory_of_gpu(placed(model(), batch or NOT_GUESSED, layout, on))


def test_what_graphs_take_is_less_than_vllms_guess_and_no_part_of_its_own_count():
    found, guessed = taken(), memory_of_gpu(placed(model(), run(), ONE, AMPERE))
    assert found.cuda_graphs == round(cuda_graphs.ACTUAL_BASE + 102 * 32 * cuda_graphs.ACTUAL_PER_LAYER)
    assert found.safety == memory_of_gpu(placed(model(), run(enforce_eager=True), ONE, AMPERE)).safety
    assert kv_bytes(found, NOT_GUESSED, AMPERE, 0.9) - kv_bytes(guessed, run(), AMPERE, 0.9) == guessed.cuda_graphs
    left = AMPERE.memory_free - found.context - found.safety - found.cuda_graphs
    assert safe_utilization(found, NOT_GUESSED, AMPERE) == math.floor(left / AMPERE.memory_total * 10_000) / 10_000


def test_graphs_on_hopper_hold_the_splits_of_the_largest_batch_that_is_split():
    assert taken(on=gpu()).cuda_graphs == taken().cuda_graphs + splits(512)
    wide = run(max_cudagraph_capture_size=1024, estimate_cudagraphs=False)  # 992 is one of the 83 sizes
    assert taken(wide, on=gpu()).cuda_graphs == taken(wide).cuda_graphs + splits(992)
    more = (166 - 102) * 32 * cuda_graphs.ACTUAL_PER_LAYER
    assert taken(wide).cuda_graphs - taken().cuda_graphs == pytest.approx(more, abs=1)
