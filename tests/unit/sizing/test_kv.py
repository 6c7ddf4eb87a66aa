"""Tests of the tokens that a KV cache holds. Expected numbers follow from shapes and vLLM's kv_cache_utils.py.

A token of the usual layer (8 KV heads of 128, keys and values, two bytes) has 4 KiB, and a block of 16 tokens has
64 KiB. tests/engine compares the same arithmetic with vLLM's own code on made-up models.
"""

from __future__ import annotations

import msgspec
import pytest
from builders import CHUNKED, DEEPSEEK, FULL, GIB, LATENT, MIB, SLIDING, STATE, gpu, model, placed, quantized, run
from hypothesis import given
from hypothesis import strategies as st

from vllm_launch.model.model import Layer
from vllm_launch.sizing.kv import (
    bytes_per_request,
    grouping_of,
    kv_cache,
    longest_that_fits,
    override_bytes,
    requests_that_fit,
)
from vllm_launch.sizing.kv_layers import block_size, kv_dtype, layer_specs
from vllm_launch.sizing.kv_spec import Spec
from vllm_launch.sizing.parallel import Layout

KIB = 1 << 10
ONE, H200 = Layout(), gpu()
NONE = Layer(kind="none")


def blocks(layers, length=32_768, layout=ONE, device=H200, **changes):
    """Return the blocks that a request of ``length`` tokens needs in all groups together."""
    llm = model(layers=layers)
    grouping = grouping_of(placed(llm, run(**changes), layout, device))
    request_bytes = bytes_per_request(placed(llm, run(**changes), layout, device), length)
    return request_bytes // (sum(grouping.block_bytes) * layout.tensor)


def token_bytes(layer, llm=None, **changes):
    """Return the bytes of one token in one layer."""
    (spec,), *_ = layer_specs(placed(llm or model(layers=(layer,)), run(**changes), ONE, H200))
    assert isinstance(spec.page, int)
    return spec.page / spec.block


# --- dtypes


def test_the_caches_dtype_is_the_users_then_the_checkpoints_then_the_runs():
    stored = model(quantization=quantized("modelopt", bits=8, kv_cache_dtype="fp8_e4m3"))
    assert kv_dtype(stored, run(kv_cache_dtype="fp8_e5m2")) == "fp8_e5m2"
    assert kv_dtype(stored, run()) == "fp8_e4m3"
    assert kv_dtype(model(quantization=quantized("awq")), run()) == "bfloat16"
    assert kv_dtype(model(), run(dtype="float16")) == "float16"


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        # keys and values of 8 heads
        ("auto", 8 * (128 + 128) * 2),
        ("bfloat16", 8 * (128 + 128) * 2),
        ("float16", 8 * (128 + 128) * 2),
        ("fp8", 8 * (128 + 128)),
        ("fp8_e4m3", 8 * (128 + 128)),
        ("fp8_e5m2", 8 * (128 + 128)),
        # triton_attn.py:customize_spec: a float32 scale after each head's keys and values
        ("int8_per_token_head", 8 * (128 + 4 + 128 + 4)),
        ("fp8_per_token_head", 8 * (128 + 4 + 128 + 4)),
        ("int4_per_token_head", 8 * (64 + 4 + 64 + 4)),
        # torch_utils.py:nvfp4_kv_cache_full_dim: half a byte, and an FP8 scale for 16 values
        ("nvfp4", 8 * (64 + 8 + 64 + 8)),
        ("nvfp4_4over6", 8 * (64 + 8 + 64 + 8)),
    ],
)
def test_bytes_of_a_token(dtype, size):
    assert token_bytes(FULL, kv_cache_dtype=dtype) == size


def test_values_may_be_narrower_than_keys():
    layer = msgspec.structs.replace(FULL, head_dim=192, head_dim_v=128)
    assert token_bytes(layer) == 8 * (192 + 128) * 2
    assert token_bytes(layer, kv_cache_dtype="int4_per_token_head") == 8 * (96 + 4 + 64 + 4)
    assert token_bytes(layer, kv_cache_dtype="nvfp4") == 8 * (96 + 12 + 64 + 8)
    assert token_bytes(msgspec.structs.replace(FULL, head_dim_v=0)) == token_bytes(FULL)


def test_the_cache_of_a_float32_model_is_float32():
    assert token_bytes(FULL, dtype="float32") == 8 * 256 * 4


def test_an_unknown_cache_dtype_counts_as_the_models_dtype():
    assert token_bytes(FULL, kv_cache_dtype="some_new_format") == 8 * 256 * 2


def test_latent_attention_stores_one_vector_for_all_heads():
    assert token_bytes(LATENT) == 576 * 2
    assert token_bytes(LATENT, kv_cache_dtype="fp8") == 576


def test_packed_latent_vectors_have_their_own_size():
    """mla_attention.py:MLAAttention.get_kv_cache_spec."""
    assert token_bytes(LATENT, kv_cache_dtype="fp8_ds_mla") == 656
    assert token_bytes(LATENT, kv_cache_dtype="nvfp4_ds_mla") == 352


@pytest.mark.parametrize(
    ("dtype", "capability", "size"),
    [
        ("auto", (9, 0), 576 * 2),
        ("fp8", (9, 0), 656),  # FLASHMLA_SPARSE
        ("fp8_e4m3", (12, 0), 656),
        ("fp8", (10, 0), 576),  # FLASHINFER_MLA_SPARSE
    ],
)
def test_sparse_attention_stores_an_index_beside_the_latent_vector(dtype, capability, size):
    """deepseek_v2.py:Indexer has a cache of its own, of 128 FP8 values and a float32, in the same blocks of 64 tokens."""
    indexed = msgspec.structs.replace(LATENT, index_bytes=132)
    llm, device = model(layers=(indexed, LATENT), mla=DEEPSEEK), gpu(capability=capability)
    (latent, index), (alone,) = layer_specs(placed(llm, run(kv_cache_dtype=dtype), ONE, device))
    assert (latent.block, latent.page, index.block, index.page) == (64, 64 * size, 64, 64 * 132)
    assert alone == latent
    assert grouping_of(placed(llm, run(kv_cache_dtype=dtype), ONE, device)).block_bytes == (64 * (2 * size + 132),)
    assert kv_cache(placed(llm, run(kv_cache_dtype=dtype), ONE, device), GIB).dtype == (
        "bfloat16" if dtype == "auto" else dtype
    )


def test_tensor_parallel_ranks_store_their_own_heads_or_a_copy_and_complete_latent_vectors():
    many = msgspec.structs.replace(LATENT, kv_heads=16)
    assert layer_specs(placed(model(layers=(many,)), run(), ONE, H200)) == layer_specs(
        placed(model(layers=(LATENT,)), run(), ONE, H200)
    )
    for layer, ranks, size in [(FULL, 2, 2 * KIB), (FULL, 8, 512), (FULL, 32, 512), (LATENT, 8, 1152)]:
        (spec,) = layer_specs(placed(model(layers=(layer,)), run(), Layout(tensor=ranks), H200))[0]
        assert spec.page == 16 * size
        assert spec.shape[0] == max(1, layer.kv_heads // ranks)


# --- blocks


@pytest.mark.parametrize(
    ("mla", "device", "block_tokens", "tokens"),
    [
        (None, gpu(), None, 16),
        (None, gpu(), 64, 64),
        (None, gpu(capability=(10, 0)), None, 16),
        (DEEPSEEK, gpu(), None, 16),
        (DEEPSEEK, gpu(capability=(10, 0)), None, 32),  # FLASHINFER_MLA: the smallest of [32, 64]
        (DEEPSEEK, gpu(capability=(10, 3)), None, 32),
        (DEEPSEEK, gpu(capability=(10, 0)), 64, 64),
        (DEEPSEEK, gpu(capability=(12, 0)), None, 16),
        (None, None, None, 128),
        (None, None, 32, 32),
        (DEEPSEEK, None, 32, 16),
    ],
)
def test_tokens_in_a_block(mla, device, block_tokens, tokens):
    assert block_size(placed(model(mla=mla), run(block_size=block_tokens), ONE, device)) == tokens


def test_fp8_latent_vectors_on_hopper_are_in_blocks_of_64():
    latent, fp8 = model(mla=DEEPSEEK), run(kv_cache_dtype="fp8")
    stored = model(mla=DEEPSEEK, quantization=quantized("modelopt", bits=8, kv_cache_dtype="fp8"))
    assert block_size(placed(latent, fp8, ONE, gpu())) == block_size(placed(stored, run(), ONE, gpu())) == 64
    assert block_size(placed(latent, fp8, ONE, gpu(capability=(10, 0)))) == 32
    assert block_size(placed(latent, fp8, ONE, gpu(capability=(8, 9)))) == 16  # TRITON_MLA
    assert block_size(placed(model(), fp8, ONE, gpu())) == 16
    assert block_size(placed(latent, run(kv_cache_dtype="fp8", block_size=128), ONE, gpu())) == 128


def test_full_attention_stores_every_token():
    assert blocks((FULL,)) == 32_768 // 16
    assert blocks((FULL,), length=32_769) == 32_768 // 16 + 1
    assert blocks((FULL,), length=1) == 1


def test_a_sliding_window_needs_blocks_for_the_window_and_for_tokens_in_flight():
    """SlidingWindowSpec.max_admission_blocks_per_request: window - 1 and the batches of two steps, and one block more."""
    assert blocks((SLIDING,)) == -(-(4095 + 2 * 8192) // 16) + 1
    assert blocks((SLIDING,), length=1000) == 63 + 1
    assert blocks((SLIDING,), max_num_batched_tokens=100) == -(-(4095 + 200) // 16) + 1
    assert blocks((SLIDING,), max_num_batched_tokens=1) == 257 + 1  # 4,097 tokens
    three = Layout(pipeline=2)  # a batch for each stage, and one that vLLM schedules
    assert blocks((SLIDING,) * 2, layout=three) == -(-(4095 + 3 * 8192) // 16) + 1
    assert blocks((SLIDING,), device=None) == -(-(4095 + 8192) // 128) + 1  # the CPU engine schedules after the step


def test_chunked_attention_needs_blocks_for_the_chunk_and_for_tokens_in_flight():
    assert blocks((CHUNKED,)) == (8192 + 2 * 8192) // 16
    assert blocks((CHUNKED,), length=1000) == 63
    assert blocks((CHUNKED,), max_num_batched_tokens=100) == -(-(8192 + 200) // 16)


def test_short_requests_of_a_model_with_chunks_are_counted_by_their_own_blocks():
    long = run(max_model_len=1_048_576)
    chunks = placed(model(layers=(CHUNKED, CHUNKED, CHUNKED, FULL)), long, on=gpu())
    cache = kv_cache(chunks, 40 * GIB)
    assert requests_that_fit(chunks, cache, 2048) == 40 * GIB // (2048 * 4 * 4096)
    assert requests_that_fit(chunks, cache, 2048) * 3 < cache.tokens // 2048
    dense = placed(model(layers=4), long, on=gpu())
    cache = kv_cache(dense, 40 * GIB)
    assert requests_that_fit(dense, cache, 2048) == cache.tokens // 2048


def test_a_cache_that_holds_no_longest_request_holds_no_request():
    small = placed(model(), run(), on=gpu())
    assert requests_that_fit(small, kv_cache(small, 64 * MIB), 2048) == 0


def test_only_layers_with_a_window_have_one():
    odd = msgspec.structs.replace(FULL, window=4096)
    assert layer_specs(placed(model(layers=(odd,)), run(), ONE, H200))[0][0].window == 0
    assert layer_specs(placed(model(layers=(SLIDING,)), run(), ONE, H200))[0][0].window == 4096
    missing = msgspec.structs.replace(SLIDING, window=None)
    assert layer_specs(placed(model(layers=(missing,)), run(), ONE, H200))[0][0].window == 0


# --- groups


def groups(*layers, layout=ONE, **changes):
    """Return the number of groups, and the bytes of a block on each stage."""
    result = grouping_of(placed(model(layers=layers), run(**changes), layout, H200))
    return len(result.groups), result.block_bytes


PAGE = 64 * KIB


def test_layers_of_one_kind_are_one_group():
    assert groups(*[FULL] * 32) == (1, (32 * PAGE,))
    assert groups(*[SLIDING] * 32) == (1, (32 * PAGE,))
    assert groups(*[LATENT] * 4) == (1, (4 * 16 * 1152,))


def test_full_attention_of_different_widths_is_still_one_group():
    wide = msgspec.structs.replace(FULL, kv_heads=16)
    assert groups(FULL, wide, wide) == (1, (5 * PAGE,))
    assert groups(FULL, LATENT) == (1, (PAGE + 16 * 1152,))


def test_windows_of_different_lengths_are_separate_groups():
    longer = msgspec.structs.replace(SLIDING, window=8192)
    assert groups(SLIDING, longer, SLIDING, longer) == (2, (2 * PAGE,))
    chunked = msgspec.structs.replace(CHUNKED, window=SLIDING.window)
    assert groups(SLIDING, chunked) == (2, (PAGE,))


def test_windows_of_one_length_and_different_widths_are_one_group():
    wide = msgspec.structs.replace(SLIDING, kv_heads=16)
    assert groups(SLIDING, wide) == (1, (3 * PAGE,))


def test_five_window_layers_for_each_full_layer_are_six_groups():
    """Gemma 3: the 10 full layers decide on the size of the groups."""
    layers = ([SLIDING] * 5 + [FULL]) * 10
    assert groups(*layers) == (6, (10 * PAGE,))
    assert blocks(tuple(layers)) == 2048 + 5 * 1281


def test_layer_counts_that_do_not_divide_make_a_smaller_last_group():
    """29 layers with windows and 5 full layers: five groups of five windows and one group of four."""
    assert groups(*[SLIDING] * 29, *[FULL] * 5) == (1 + 6, (5 * PAGE,))


def test_nearly_equal_layer_counts_make_groups_of_the_larger_count():
    assert groups(*[SLIDING] * 29, *[FULL] * 20) == (2, (29 * PAGE,))
    # 30 is one and a half times 20: two groups of 15
    assert groups(*[SLIDING] * 30, *[FULL] * 20) == (3, (20 * PAGE,))


def test_smaller_pages_get_more_tokens_so_that_all_pages_have_one_size():
    """unify_kv_cache_spec_page_size: 64 KiB hold 16 tokens of 8 heads, or 8 tokens of 16 heads.

    So a block of the narrow layer has 32 tokens.
    """
    wide = msgspec.structs.replace(SLIDING, kv_heads=16)
    assert groups(FULL, wide) == (2, (2 * PAGE,))
    # 32,768 / 32, and the window in blocks of 16
    assert blocks((FULL, wide)) == 1024 + 1281


def test_layers_with_the_smaller_page_are_padded_to_the_larger():
    wide = msgspec.structs.replace(SLIDING, kv_heads=16)
    assert groups(*[FULL] * 4, *[wide] * 3) == (2, (4 * 2 * PAGE,))


def test_pages_that_do_not_divide_are_padded():
    wide = msgspec.structs.replace(SLIDING, kv_heads=12)
    assert groups(FULL, wide) == (2, (96 * KIB,))
    assert blocks((FULL, wide)) == 2048 + 1281


def test_layers_without_a_cache_are_in_no_group():
    assert groups(FULL, NONE, FULL, NONE) == (1, (2 * PAGE,))


def test_the_stage_with_the_fewest_blocks_limits_all_stages():
    """get_kv_cache_configs: every rank gets the smallest number of blocks of all ranks."""
    llm, two = model(layers=3), Layout(pipeline=2)  # two layers, then one
    for pages, fewest in [((20, 9), 9), ((18, 10), 9), ((18, 9), 9), ((20, 20), 10), ((0, 20), 0)]:
        result = kv_cache(placed(llm, run(max_model_len=16), two, H200), [size * PAGE for size in pages])
        assert result.tokens == fewest * 16
        assert result.bytes == fewest * 3 * PAGE
        assert (
            longest_that_fits(placed(llm, run(), two, H200), [size * PAGE for size in pages]) == max(0, fewest - 1) * 16
        )
    assert kv_cache(placed(llm, run(), two, H200), 20 * PAGE) == kv_cache(
        placed(llm, run(), two, H200), [20 * PAGE] * 2
    )


def test_a_stage_without_a_cache_does_not_limit_the_number_of_blocks():
    assert groups(FULL, NONE, layout=Layout(pipeline=2)) == (1, (PAGE, 0))
    result = kv_cache(
        placed(model(layers=(FULL, NONE)), run(max_model_len=16), Layout(pipeline=2), H200), [9 * PAGE, 0]
    )
    assert (result.tokens, result.bytes) == (9 * 16, 9 * PAGE)


# --- recurrent states


def test_a_model_with_only_states_stores_one_for_each_request():
    llm = model(layers=(STATE,) * 32, model_type="mamba2")
    assert groups(*[STATE] * 32) == (1, (32 * MIB,))
    assert bytes_per_request(placed(llm, run(), ONE, H200), 1) == 32 * MIB
    assert bytes_per_request(placed(llm, run(), ONE, H200), 100_000) == 32 * MIB
    assert groups(STATE, NONE) == (1, (MIB,))
    cache = kv_cache(placed(llm, run(), ONE, H200), 10 * GIB)
    assert (cache.tokens, cache.bytes) == (320 * 8192, 10 * GIB)


def compressed(ratio: int) -> Layer:
    return Layer(
        kind="compressed", kv_heads=1, head_dim=512, window=128, compression=ratio, index_bytes=132 * (ratio == 4)
    )


def test_compressed_layers_have_a_window_vectors_states_and_keys_of_an_indexer():
    """DeepSeek V4 Flash, as vLLM's own classes give it (tests/data/model_facts.jsonl)."""
    window = ("sliding mla", 64, 37_440, 128)
    few, many = ("mla", 256, 37_440, 0), ("mla", 256, 1_728, 0)
    states = (("sliding mla", 4, 32_832, 8), ("sliding mla", 4, 8_640, 8), ("sliding mla", 8, 32_832, 128))
    specs = layer_specs(placed(model(layers=(compressed(0), compressed(4), compressed(128))), run(), ONE, H200))
    assert [[(spec.kind, spec.block, spec.page, spec.window) for spec in layer] for layer in specs] == [
        [window],
        [window, few, states[0], ("mla", 256, 8_640, 0), states[1]],
        [window, many, states[2]],
    ]


def test_tensor_parallelism_does_not_split_compressed_layers():
    """The field's DeepSeek V4 Flash on 8 H200: less than 29.4 million tokens in 152 GB."""
    layers = tuple(compressed(ratio) for ratio in [0, 0, *[4, 128] * 20, 4])
    llm = model(layers=layers, model_type="deepseek_v4")
    eight, one = (
        kv_cache(placed(llm, run(max_model_len=1 << 20), Layout(tensor=n), H200), 152 * 10**9) for n in (8, 1)
    )
    assert eight.tokens == one.tokens < 29_400_000


def test_attention_blocks_grow_until_they_hold_a_state_and_a_request_has_two_states():
    """platforms/interface.py:_align_hybrid_block_size, MambaSpec.max_memory_usage_bytes in "align" mode."""
    attention, state = layer_specs(placed(model(layers=(FULL, STATE)), run(), ONE, H200))
    assert attention == (Spec(kind="full", block=256, page=MIB, shape=(8, 128, 128)),)
    assert state == (Spec(kind="mamba", block=256, page=MIB, states=2),)
    assert blocks((STATE, STATE, STATE, FULL)) == 32_768 // 256 + 3 * 2


def test_a_checkpoint_of_a_prefill_is_one_more_state():
    """MambaSpec.max_memory_usage_bytes: 2 + num_prefill_checkpoint_blocks."""
    checkpointed = msgspec.structs.replace(STATE, state_checkpoints=1)
    assert blocks((checkpointed, checkpointed, checkpointed, FULL)) == 32_768 // 256 + 3 * 3
    assert blocks((checkpointed,)) == 3  # a hybrid model has a prefix cache, even if no layer has attention
    mamba = placed(model(layers=(checkpointed,), model_type="mamba2"), run(), ONE, H200)
    assert bytes_per_request(mamba, 8192) == MIB  # a model of Mamba alone has none


def test_a_slightly_larger_state_adds_16_tokens_to_a_block():
    larger = msgspec.structs.replace(STATE, state_shapes=((64, 64, 128), (1,)), state_dtypes=("BF16", "BF16"))
    (attention,), (state,) = layer_specs(placed(model(layers=(FULL, larger)), run(), ONE, H200))
    assert (attention.block, attention.page, state.page) == (272, 272 * 4 * KIB, 272 * 4 * KIB)


def test_a_small_state_does_not_change_blocks():
    small = msgspec.structs.replace(STATE, state_shapes=((8,),))
    (attention,), (state,) = layer_specs(placed(model(layers=(FULL, small)), run(), ONE, H200))
    assert (attention.block, state.page) == (16, 64 * KIB)
    (attention,), _ = layer_specs(placed(model(layers=(FULL, small)), run(block_size=64), ONE, H200))
    assert attention.block == 64


def test_with_latent_attention_blocks_grow_by_128():
    (attention,), _ = layer_specs(placed(model(layers=(LATENT, STATE), mla=DEEPSEEK), run(), ONE, H200))
    # 1 MiB / (128 * 1,152) = 7.1
    assert attention.block == 8 * 128
    small = msgspec.structs.replace(STATE, state_shapes=((8,),))
    (attention,), _ = layer_specs(placed(model(layers=(LATENT, small), mla=DEEPSEEK), run(), ONE, H200))
    assert attention.block == 128


def test_the_largest_state_and_the_widest_attention_decide_on_the_block():
    smaller = msgspec.structs.replace(STATE, state_shapes=((64, 64, 64),))
    narrow = msgspec.structs.replace(FULL, kv_heads=4)
    result = layer_specs(placed(model(layers=(smaller, narrow, STATE, FULL)), run(), ONE, H200))
    assert {spec.block for (spec,) in result} == {256}
    assert [result[0][0].page, result[2][0].page] == [MIB, MIB]


def test_a_layer_with_attention_and_a_state_has_two_caches():
    both = msgspec.structs.replace(FULL, state_shapes=STATE.state_shapes, state_dtypes=STATE.state_dtypes)
    (result,) = layer_specs(placed(model(layers=(both,)), run(), ONE, H200))
    assert [spec.kind for spec in result] == ["full", "mamba"]
    assert groups(both, both) == (2, (2 * MIB,))


@pytest.mark.parametrize(
    ("dtypes", "size"),
    [
        (("BF16", "F32"), 2 * 512 + 4 * 1000),
        (("F16", "F8_E4M3"), 2 * 512 + 1000),
        (("I8", "BF16"), 512 + 2 * 1000),
        (("F32", "F8_E5M2"), 4 * 512 + 1000),
    ],
)
def test_states_have_their_own_dtypes(dtypes, size):
    layer = msgspec.structs.replace(STATE, state_shapes=((8, 64), (1000,)), state_dtypes=dtypes)
    assert groups(layer) == (1, (size,))


def test_states_are_split_over_tensor_parallel_ranks_once():
    assert groups(STATE, layout=Layout(tensor=4)) == (1, (MIB // 4,))
    odd = msgspec.structs.replace(STATE, state_shapes=((3, 5),))
    assert groups(odd, layout=Layout(tensor=4)) == (1, (4 * 2,))  # 15 / 4, rounded up


# --- the pool


def cache(kv_bytes, layers=32, layout=ONE, device=H200, **changes):
    return kv_cache(placed(model(layers=layers), run(**changes), layout, device), kv_bytes)


def test_a_cache_holds_the_tokens_of_its_blocks():
    kv = cache(10 * GIB)  # blocks of 2 MiB
    assert (kv.tokens, kv.bytes, kv.bytes_per_token, kv.dtype) == (81_920, 10 * GIB, 128 * KIB, "bfloat16")
    assert cache(10 * GIB + 2 * MIB - 1) == kv
    assert cache(10 * GIB, kv_cache_dtype="fp8").tokens == 2 * 81_920


def test_one_request_needs_one_more_block_because_of_the_null_block():
    assert cache(1 * GIB).tokens == 0
    assert cache(1 * GIB + 2 * MIB).tokens == 8192 + 16
    assert cache(1 * GIB + 2 * MIB - 1).tokens == 0
    assert longest_that_fits(placed(model(), run(), ONE, H200), GIB) == 8192 - 16


def test_a_replica_counts_the_bytes_of_all_its_gpus_and_of_copied_heads():
    kv = cache(10 * GIB, layout=Layout(tensor=2))
    assert (kv.tokens, kv.bytes, kv.bytes_per_token) == (2 * 81_920, 20 * GIB, 128 * KIB)
    assert isinstance(kv.bytes, int)
    copies = cache(10 * GIB, layout=Layout(tensor=16))
    assert (copies.tokens, copies.bytes, copies.bytes_per_token) == (8 * 81_920, 160 * GIB, 256 * KIB)


def test_the_stage_with_the_most_layers_limits_the_number_of_blocks():
    kv = cache(17 * 64 * MIB, layers=33, layout=Layout(pipeline=2))  # 17 and 16 layers of 64 KiB
    assert kv.tokens == 1024 * 16
    assert kv.bytes == 33 * 64 * MIB
    assert kv.bytes_per_token == 33 * 4 * KIB


def test_a_stage_without_a_cache_does_not_limit_the_tokens():
    kv = cache(GIB, layers=(NONE, NONE, FULL, FULL), layout=Layout(pipeline=2))
    assert kv.tokens == GIB // (8 * KIB)


def test_bytes_per_token_are_those_of_the_longest_request_rounded_up():
    # 1,000 tokens are 62.5 blocks
    assert cache(GIB, layers=1, max_model_len=1000).bytes_per_token == -(-63 * 64 * KIB // 1000)


def test_a_model_without_a_cache_accepts_any_length():
    kv = cache(GIB, layers=(NONE,) * 4)
    assert (kv.tokens, kv.bytes, kv.bytes_per_token, kv.dtype) == (0, 0, 0, "bfloat16")
    llm = model(layers=(NONE,) * 4)
    assert longest_that_fits(placed(llm, run(), ONE, H200), 0) == 8192
    assert bytes_per_request(placed(llm, run(), ONE, H200), 100) == 0


def test_a_cache_of_windows_holds_more_tokens_than_its_blocks():
    """A request of 32,768 tokens needs 1,281 blocks on a GPU. On a CPU it needs 97 blocks of 128 tokens."""
    llm, long = model(layers=(SLIDING,)), run(max_model_len=32_768)
    assert kv_cache(placed(llm, long, ONE, H200), 3000 * PAGE).tokens == int(3000 / 1281 * 32_768)
    assert kv_cache(placed(llm, long, ONE), 3000 * PAGE).tokens == int(375 / 97 * 32_768)
    # 1,281 blocks are left besides the null block: the window is full, and no length needs more
    assert longest_that_fits(placed(llm, long, ONE, H200), 1282 * PAGE) == 32_768
    # with one less: 1,279 blocks of tokens, and one in which a window may begin
    assert longest_that_fits(placed(llm, long, ONE, H200), 1281 * PAGE) == 1279 * 16
    assert longest_that_fits(placed(llm, long, ONE), 98 * 8 * PAGE) == 32_768
    assert longest_that_fits(placed(llm, long, ONE), 97 * 8 * PAGE) == 95 * 128


def test_a_cache_without_memory_holds_no_tokens():
    for kv_bytes in (-GIB, 0, 2 * MIB, 2 * MIB - 1):
        assert cache(kv_bytes).tokens == 0
        assert longest_that_fits(placed(model(), run(), ONE, H200), kv_bytes) == 0
    assert cache(-GIB).bytes == 0
    assert longest_that_fits(placed(model(), run(), ONE, H200), 4 * MIB) == 16


def test_the_longest_request_is_never_longer_than_max_model_len():
    assert longest_that_fits(placed(model(), run(max_model_len=100), ONE, H200), 10 * GIB) == 100
    assert longest_that_fits(placed(model(), run(max_model_len=8192), ONE, H200), GIB + 2 * MIB) == 8192


def test_the_bytes_of_a_request_count_on_all_gpus():
    assert bytes_per_request(placed(model(), run(), ONE, H200), 17) == 2 * 2 * MIB
    assert bytes_per_request(placed(model(), run(), Layout(tensor=2, pipeline=2), H200), 17) == 2 * 2 * MIB
    assert bytes_per_request(placed(model(), run(), Layout(tensor=16), H200), 16) == 2 * 2 * MIB


# --- properties

LAYERS = st.lists(
    st.sampled_from([FULL, SLIDING, CHUNKED, msgspec.structs.replace(SLIDING, kv_heads=2), NONE]),
    min_size=4,
    max_size=12,
).map(tuple) | st.lists(st.sampled_from([FULL, STATE]), min_size=4, max_size=12).map(tuple)
LAYOUTS = st.builds(Layout, tensor=st.sampled_from([1, 2, 8, 16]), pipeline=st.integers(1, 3))
SIZES = st.integers(0, 4 * GIB)
LENGTHS = st.integers(1, 200_000)
BATCHES = st.sampled_from([512, 8192])
ENGINES = st.sampled_from([H200, None])


@given(layers=LAYERS, layout=LAYOUTS, kv_bytes=SIZES, more=SIZES, length=LENGTHS, batch=BATCHES, device=ENGINES)
def test_more_memory_never_holds_less(layers, layout, kv_bytes, more, length, batch, device):  # noqa: PLR0917
    llm, batch_run = model(layers=layers), run(max_model_len=length, max_num_batched_tokens=batch)
    less, larger = (kv_cache(placed(llm, batch_run, layout, device), size) for size in (kv_bytes, kv_bytes + more))
    assert larger.tokens >= less.tokens
    assert larger.bytes >= less.bytes
    assert less.bytes <= kv_bytes * layout.tensor * layout.pipeline
    assert longest_that_fits(placed(llm, batch_run, layout, device), kv_bytes + more) >= longest_that_fits(
        placed(llm, batch_run, layout, device), kv_bytes
    )


@given(layers=LAYERS, layout=LAYOUTS, kv_bytes=SIZES, length=LENGTHS, batch=BATCHES, device=ENGINES)
def test_vllm_starts_exactly_up_to_the_longest_length_that_fits(layers, layout, kv_bytes, length, batch, device):  # noqa: PLR0917
    llm, batch_run = model(layers=layers), run(max_model_len=length, max_num_batched_tokens=batch)
    longest = longest_that_fits(placed(llm, batch_run, layout, device), kv_bytes)
    assert 0 <= longest <= length
    if not grouping_of(placed(llm, batch_run, layout, device)).groups:
        assert longest == length
        return

    def starts(tokens):
        return (
            kv_cache(
                placed(llm, msgspec.structs.replace(batch_run, max_model_len=tokens), layout, device), kv_bytes
            ).tokens
            > 0
        )

    assert longest == 0 or starts(longest)
    assert longest == length or not starts(longest + 1)


@given(layers=LAYERS, layout=LAYOUTS, length=LENGTHS, more=st.integers(0, 1000), device=ENGINES)
def test_a_longer_request_never_needs_fewer_bytes(layers, layout, length, more, device):
    llm = model(layers=layers)
    assert bytes_per_request(placed(llm, run(), layout, device), length + more) >= bytes_per_request(
        placed(llm, run(), layout, device), length
    )


@given(tensor=st.sampled_from([1, 2, 4, 8]), length=st.integers(1, 10_000))
def test_splitting_heads_does_not_change_the_bytes_of_a_request(tensor, length):
    whole = bytes_per_request(placed(model(), run(), ONE, H200), length)
    assert bytes_per_request(placed(model(), run(), Layout(tensor=tensor), H200), length) == whole


# ---- options that change the cache


def test_the_users_number_of_blocks_replaces_the_memory():
    """1,000 blocks of 16 tokens. One of them is the null block, so a request has 999."""
    few = run(num_gpu_blocks_override=1000, max_model_len=131_072)
    placement = placed(model(max_model_len=131_072), few, ONE, H200)
    assert longest_that_fits(placement, 100 * GIB) == longest_that_fits(placement, 0) == 15_984
    assert kv_cache(placement, 100 * GIB).tokens == 0  # vLLM refuses this length
    fits = placed(model(), run(num_gpu_blocks_override=1000), ONE, H200)
    assert kv_cache(fits, 0).tokens == 16_000
    assert kv_cache(fits, 0).bytes == 1000 * 16 * 32 * 4096
    assert override_bytes(fits) == (1000 * 16 * 32 * 4096,)
    assert override_bytes(placed(model(), run(), ONE, H200)) == ()


def test_without_the_hybrid_manager_layers_with_a_window_keep_all_tokens():
    layers = (SLIDING, CHUNKED, FULL)
    assert blocks(layers, disable_hybrid_kv_cache_manager=True) == 32_768 // 16
    assert blocks((SLIDING,), disable_hybrid_kv_cache_manager=True) == blocks((SLIDING,))


def test_without_async_scheduling_one_batch_less_is_in_flight():
    assert blocks((SLIDING,), async_scheduling=False) == -(-(4095 + 8192) // 16) + 1


def test_without_prefix_caching_a_request_has_one_state():
    [[_], [state]] = layer_specs(placed(model(layers=(FULL, STATE)), run(enable_prefix_caching=False), ONE, H200))
    assert (state.states, state.block) == (1, 8192)
    [[alone]] = layer_specs(placed(model(layers=(STATE,)), run(enable_prefix_caching=True), ONE, H200))
    assert (alone.states, alone.block) == (2, 16)
