"""Tests of the splits that vLLM accepts, and of the sentence for each split that it refuses."""

from __future__ import annotations

import itertools

import msgspec
import pytest
from builders import DEEPSEEK, EXPERTS, FULL, LATENT, MOE, STATE, gpu, model, quantized, run
from hypothesis import given
from hypothesis import strategies as st

from vllm_launch.model.model import Experts
from vllm_launch.sizing.parallel import Layout, expert_ranks, layer_split, padded_vocab, problems

TP2, TP4, TP8 = Layout(tensor=2), Layout(tensor=4), Layout(tensor=8)


def pp(pipeline: int) -> Layout:
    return Layout(pipeline=pipeline)


# --- Layout


@pytest.mark.parametrize(
    ("layout", "title"),
    [
        (Layout(), "TP=1"),
        (Layout(tensor=2), "TP=2"),
        (Layout(tensor=2, pipeline=2, data=2, expert_parallel=True), "TP=2 PP=2 DP=2 EP"),
        (Layout(data=4), "TP=1 DP=4"),
        (Layout(pipeline=3), "TP=1 PP=3"),
        (Layout(tensor=8, expert_parallel=True), "TP=8 EP"),
    ],
)
def test_the_title_of_a_layout(layout, title):
    assert layout.title == title


def test_experts_are_spread_over_tensor_and_data_parallel_ranks_but_not_over_stages():
    assert expert_ranks(Layout(tensor=2, pipeline=3, data=5)) == 10


# --- vocabulary and layers


@pytest.mark.parametrize(("size", "padded"), [(1, 64), (64, 64), (65, 128), (128_256, 128_256), (151_665, 151_680)])
def test_the_vocabulary_is_padded_to_64_rows(size, padded):
    assert padded_vocab(size) == padded


@pytest.mark.parametrize(
    ("layers", "pipeline", "counts"),
    [
        (32, 1, (32,)),
        (32, 2, (16, 16)),
        (33, 2, (17, 16)),  # one remaining layer: not on the last stage, which has the head
        (34, 4, (8, 9, 9, 8)),  # two remaining layers: on the middle stages
        (35, 4, (9, 9, 9, 8)),
        (33, 4, (8, 8, 9, 8)),
        (61, 8, (7, 7, 8, 8, 8, 8, 8, 7)),
        (2, 4, (0, 1, 1, 0)),
    ],
)
def test_remaining_layers_go_to_the_stages_before_the_last(layers, pipeline, counts):
    assert layer_split(layers, pipeline) == counts


@given(st.integers(1, 200), st.integers(1, 32))
def test_stages_share_all_layers_and_the_last_stage_never_has_the_most(layers, pipeline):
    counts = layer_split(layers, pipeline)
    assert sum(counts) == layers
    assert len(counts) == pipeline
    assert max(counts) - min(counts) <= 1
    assert counts[-1] == min(counts)


# --- attention heads and the vocabulary


def test_a_model_whose_sizes_are_divisible_by_the_ranks_has_no_problems():
    for tensor, pipeline in itertools.product([1, 2, 4, 8], [1, 2, 4]):
        assert problems(model(), run(), Layout(tensor=tensor, pipeline=pipeline), [gpu()] * 32) == []


def test_attention_heads_must_be_divisible_by_the_ranks():
    assert problems(model(heads=36, layers=(msgspec.structs.replace(FULL, kv_heads=4),)), run(), TP8, ()) == [
        "36 attention heads are not divisible by TP=8"
    ]


def test_kv_heads_must_divide_or_replicate_evenly():
    six = model(heads=24, layers=(msgspec.structs.replace(FULL, kv_heads=6),))
    assert problems(six, run(), TP2, ()) == []
    assert problems(six, run(), TP4, ()) == ["6 KV heads are not divisible by TP=4"]
    assert problems(six, run(), TP8, ()) == [
        "TP=8 is not a multiple of the 6 KV heads, so they cannot be replicated evenly"
    ]
    single_head = model(layers=(msgspec.structs.replace(FULL, kv_heads=1),))
    assert problems(single_head, run(), TP8, ()) == []


def test_each_number_of_kv_heads_is_reported_once_in_ascending_order():
    layers = tuple(msgspec.structs.replace(FULL, kv_heads=count) for count in (10, 8, 6, 10))
    assert problems(model(layers=(*layers, STATE), heads=64), run(), TP4, ()) == [
        "6 KV heads are not divisible by TP=4",
        "10 KV heads are not divisible by TP=4",
    ]


def test_as_many_kv_heads_as_ranks_are_accepted():
    assert problems(model(layers=(msgspec.structs.replace(FULL, kv_heads=4),)), run(), TP4, ()) == []


def test_latent_attention_has_no_kv_heads_to_divide():
    odd = msgspec.structs.replace(LATENT, kv_heads=3)
    assert problems(model(layers=(odd,), mla=DEEPSEEK), run(), TP2, ()) == []
    assert problems(model(layers=(odd,)), run(), TP2, ()) != []


def test_the_padded_vocabulary_must_be_divisible_by_the_ranks():
    # 100 pads to 128: 128 / 3 leaves 2; 129 pads to 192: 192 / 3 is 64.
    three = model(heads=30, layers=(msgspec.structs.replace(FULL, kv_heads=3),), intermediate_size=300)
    small, larger = (msgspec.structs.replace(three, vocab_size=size) for size in (100, 129))
    assert problems(small, run(), Layout(tensor=3), ()) == [
        "the vocabulary, 100 padded to 128, is not divisible by TP=3"
    ]
    assert problems(larger, run(), Layout(tensor=3), ()) == []
    exact = msgspec.structs.replace(three, vocab_size=128)
    assert problems(exact, run(), Layout(tensor=3), ()) == ["the vocabulary, 128, is not divisible by TP=3"]


# --- widths


def test_the_intermediate_size_must_be_divisible_by_the_ranks():
    assert problems(model(intermediate_size=14_340), run(), TP8, ()) == [
        "the intermediate size 14340 is not divisible by 8 ranks"
    ]
    assert problems(model(intermediate_size=14_340), run(), Layout(), ()) == []


def test_the_dense_intermediate_size_counts_only_if_a_layer_uses_it():
    assert problems(model(intermediate_size=14_340, layers=(MOE,), experts=EXPERTS), run(), TP8, ()) == []
    mixed = model(intermediate_size=14_340, layers=(MOE, FULL), experts=EXPERTS)
    assert problems(mixed, run(), TP8, ()) == ["the intermediate size 14340 is not divisible by 8 ranks"]
    assert problems(model(intermediate_size=0), run(), TP8, ()) == []


def test_each_expert_is_split_over_tensor_and_data_parallel_ranks_without_expert_parallelism():
    experts = model(layers=(MOE,), experts=Experts(count=64, per_token=8, intermediate_size=1028))
    assert problems(experts, run(), TP4, ()) == []
    assert problems(experts, run(), Layout(tensor=4, data=2), ()) == [
        "the expert intermediate size 1028 is not divisible by 8 ranks"
    ]
    assert problems(experts, run(), Layout(tensor=4, data=2, expert_parallel=True), ()) == []


def test_a_shared_expert_is_split_only_over_tensor_parallel_ranks():
    experts = Experts(count=64, per_token=8, intermediate_size=1024, shared_intermediate_size=1028)
    shared = model(layers=(MOE,), experts=experts)
    assert problems(shared, run(), Layout(tensor=4, data=2), ()) == []
    assert problems(shared, run(), TP8, ()) == ["the shared-expert intermediate size 1028 is not divisible by 8 ranks"]
    ep = Layout(tensor=8, expert_parallel=True)
    assert problems(shared, run(), ep, ()) == problems(shared, run(), TP8, ())


# --- quantised widths


FP8_BLOCKS = quantized("fp8", bits=8, block_shape=(128, 128))


def test_an_fp8_shard_must_be_a_multiple_of_the_block_size():
    # 18,432 / 8 = 2,304 = 18 blocks of 128; 12,288 + 64 = 12,352: / 2 = 6,176 is 48.25 blocks
    assert problems(model(intermediate_size=18_432, quantization=FP8_BLOCKS), run(), TP8, ()) == []
    (problem,) = problems(model(intermediate_size=12_352, quantization=FP8_BLOCKS), run(), TP2, ())
    assert problem == (
        "the intermediate size 12352 split over 2 ranks is 6176, which is not a multiple of the FP8 block size 128 x 128"
    )


def test_a_width_that_is_not_split_need_not_be_a_multiple_of_the_block_size():
    assert problems(model(intermediate_size=12_352, quantization=FP8_BLOCKS), run(), Layout(), ()) == []


@pytest.mark.parametrize("blocks", [(64, 128), (128, 64)])
def test_a_shard_must_be_a_multiple_of_both_sides_of_a_block(blocks):
    """down_proj is split along its input, gate_proj and up_proj are split along their output."""
    narrow = model(intermediate_size=2 * 192, quantization=quantized("fp8", bits=8, block_shape=blocks))
    (problem,) = problems(narrow, run(), TP2, ())
    assert problem == (
        "the intermediate size 384 split over 2 ranks is 192, which is not a multiple of the FP8 block size "
        f"{blocks[0]} x {blocks[1]}"
    )


def test_block_size_of_the_quantization_option_is_checked_like_that_of_the_checkpoint():
    wide = model(intermediate_size=12_352)
    assert len(problems(wide, run(quantization="fp8_per_block"), TP2, ())) == 1
    assert problems(model(intermediate_size=256), run(quantization="fp8_per_block"), TP2, ()) == []
    assert problems(wide, run(quantization="fp8"), TP2, ()) == []
    assert problems(wide, run(), TP2, ()) == []


@pytest.mark.parametrize(
    "method",
    ["gptq", "auto_gptq", "gptq_marlin", "awq", "auto_awq", "awq_marlin", "compressed-tensors", "modelopt_fp4"],
)
def test_a_shard_must_be_a_multiple_of_the_quantisation_group_size(method):
    # 29,568 / 8 = 3,696 = 28.875 groups of 128 (Qwen2.5-72B's width; vLLM refuses its AWQ checkpoint on 8 GPUs)
    grouped = model(intermediate_size=29_568, quantization=quantized(method, group_size=128))
    assert problems(grouped, run(), TP8, ()) == [
        "a shard of the intermediate size is 3696, which is not a multiple of the quantisation group size 128"
    ]
    odd = msgspec.structs.replace(grouped, intermediate_size=29_600)  # accepted if nothing is split
    assert problems(odd, run(), Layout(), ()) == []
    assert problems(msgspec.structs.replace(grouped, intermediate_size=14_336), run(), TP8, ()) == []


def test_methods_without_groups_accept_any_shard():
    for quantization in (
        quantized("bitsandbytes", group_size=128),
        quantized("awq", group_size=-1),  # one group for a whole column
        quantized("awq"),
    ):
        assert problems(model(intermediate_size=29_568, quantization=quantization), run(), TP8, ()) == []


@pytest.mark.parametrize("method", ["gptq", "auto_gptq", "gptq_marlin"])
@pytest.mark.parametrize("group", [None, -1, 32])
def test_shards_that_are_not_a_multiple_of_marlins_tiles_are_padded(method, group):
    """marlin_utils.py:marlin_padded_nk. 192 inputs: six groups of 32, and one and a half tiles of 128."""
    narrow = model(intermediate_size=384, quantization=quantized(method, group_size=group))
    assert problems(narrow, run(), TP2, ()) == []


def test_shards_of_quantised_experts_must_be_multiples_of_the_group_size():
    experts = Experts(count=8, per_token=2, intermediate_size=384, shared_intermediate_size=640)
    quantized_experts = model(layers=(MOE,), experts=experts, quantization=quantized("awq", group_size=128))
    assert problems(quantized_experts, run(), TP2, ()) == [
        "a shard of the expert intermediate size is 192, which is not a multiple of the quantisation group size 128",
        "a shard of the shared-expert intermediate size is 320, which is not a multiple of the quantisation group size 128",
    ]


# --- pipelines and experts


def test_a_stage_needs_a_layer():
    assert problems(model(layers=3), run(), pp(4), ()) == ["3 layers are fewer than PP=4"]
    assert problems(model(layers=4), run(), pp(4), ()) == []


def test_an_architecture_without_pipeline_support_is_named():
    bert = model(architecture="BertModel", task="pooling")
    assert problems(bert, run(), pp(2), ()) == ["BertModel does not support pipeline parallelism"]
    assert problems(bert, run(), Layout(), ()) == []


@pytest.mark.parametrize("architecture", ["BitNetForCausalLM", "CustomCodeForCausalLM"])
def test_the_transformers_backend_supports_pipelines(architecture):
    """models/transformers/base.py: Base(..., SupportsPP), for transformers' own models and for custom code."""
    assert problems(model(architecture=architecture), run(), pp(2), ()) == []


def test_expert_parallelism_needs_experts():
    expert_parallel = Layout(tensor=2, expert_parallel=True)
    assert problems(model(), run(), expert_parallel, ()) == [
        "expert parallelism needs a mixture-of-experts model, and this model has no experts"
    ]
    assert problems(model(layers=(MOE,), experts=EXPERTS), run(), expert_parallel, ()) == []


def test_each_rank_of_expert_parallelism_needs_an_expert():
    few = model(layers=(MOE,), experts=Experts(count=8, per_token=2, intermediate_size=1024))
    assert problems(few, run(), Layout(tensor=4, data=2, expert_parallel=True), ()) == []
    assert problems(few, run(), Layout(tensor=8, data=2, expert_parallel=True), ()) == [
        "8 experts are fewer than the 16 ranks of expert parallelism"
    ]
    assert problems(few, run(), Layout(tensor=8, data=2), ()) == []


# --- GPUs


def test_a_layout_needs_the_gpus_of_all_its_replicas():
    layout = Layout(tensor=2, pipeline=2, data=3)
    assert problems(model(), run(), layout, [gpu()] * 12) == []
    assert problems(model(), run(), layout, [gpu()] * 11) == ["12 GPUs are needed and 11 are available"]
    assert problems(model(), run(), layout, ()) == []  # the CPU engine has no GPUs


T4 = gpu(capability=(7, 5), name="Tesla T4")


def test_the_dtype_that_an_old_gpu_is_offered_is_one_that_the_model_can_use():
    [text] = problems(model(model_type="gemma2"), run(), Layout(), [T4])
    assert text.endswith("Tesla T4 has 7.5: set --dtype float32")
    [text] = problems(model(quantization=quantized("mxfp4")), run(), Layout(), [T4])[:1]
    assert text.endswith("Tesla T4 has 7.5")
    unknown = gpu(capability=(0, 0), name="unknown GPU")
    assert "unknown GPU has an unknown one" in problems(model(), run(), Layout(), [unknown])[0]


def test_bfloat16_needs_ampere_and_the_oldest_gpu_decides():
    sentence = "bfloat16 needs compute capability 8.0 and Tesla T4 has 7.5: set --dtype half"
    assert problems(model(), run(), Layout(), [T4]) == [sentence]
    assert problems(model(), run(), TP2, [gpu(), T4]) == [sentence]
    assert problems(model(), run(), Layout(), [gpu(capability=(8, 0))]) == []


@pytest.mark.parametrize(
    ("stored", "runs", "refused"),
    [
        ("bfloat16", "bfloat16", True),
        ("bfloat16", "float16", False),
        ("float16", "bfloat16", True),
        ("float16", "float16", False),
        ("float32", "float32", False),
    ],
)
def test_the_dtype_of_the_run_counts(stored, runs, refused):
    assert bool(problems(model(dtype=stored), run(dtype=runs), Layout(), [T4])) == refused


def test_quantised_kernels_need_a_capability_that_the_oldest_gpu_has():
    v100 = gpu(capability=(7, 0), name="Tesla V100")
    # quantization/awq.py: minimum capability 75 (7.5)
    awq = model(dtype="float16", quantization=quantized("awq", group_size=128))
    assert problems(awq, run(dtype="float16"), TP2, [v100, gpu()]) == [
        "awq quantisation needs compute capability 7.5 and Tesla V100 has 7.0"
    ]
    assert problems(awq, run(dtype="float16"), Layout(), [T4]) == []


def test_the_quantization_option_needs_a_capability_too():
    plain = model(dtype="float16")
    # quantization/experts_int8.py: minimum capability 80 (8.0)
    experts_int8 = run(quantization="experts_int8", dtype="float16")
    assert problems(plain, experts_int8, Layout(), [T4]) == [
        "experts_int8 quantisation needs compute capability 8.0 and Tesla T4 has 7.5"
    ]
    assert problems(plain, run(quantization="fp8", dtype="float16"), Layout(), [T4]) == []
    assert problems(plain, run(quantization="not-in-the-table", dtype="float16"), Layout(), [T4]) == []


def test_a_gpu_with_unknown_capability_runs_models_that_are_not_quantised():
    assert problems(model(dtype="float16"), run(dtype="float16"), Layout(), [gpu(capability=(0, 0))]) == []


def test_every_problem_is_reported():
    result = problems(model(heads=30), run(), Layout(tensor=4, pipeline=33, expert_parallel=True), [T4])
    assert len(result) == 5


HEADS = st.sampled_from([1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 40, 64])


@given(heads=HEADS, kv=HEADS, tensor=st.integers(1, 16))
def test_kv_heads_are_accepted_exactly_if_they_divide_tp_or_tp_divides_them(heads, kv, tensor):
    """linear.py:QKVParallelLinear splits the KV heads over the ranks, or replicates each KV head TP / kv times."""
    llm = model(heads=heads * tensor, layers=(msgspec.structs.replace(FULL, kv_heads=kv),), vocab_size=64 * tensor)
    wide = msgspec.structs.replace(llm, intermediate_size=tensor)
    assert (problems(wide, run(), Layout(tensor=tensor), ()) == []) == (kv % tensor == 0 or tensor % kv == 0)


# --- the KV cache


def test_a_hybrid_model_needs_the_hybrid_kv_cache_manager():
    without = run(disable_hybrid_kv_cache_manager=True)
    [problem] = problems(model(layers=(STATE, FULL) * 4), without, Layout(), ())
    assert "hybrid KV cache manager" in problem
    assert problems(model(layers=(STATE,) * 4), without, Layout(), ()) == []
    assert problems(model(), without, Layout(), ()) == []
