"""Tests of the memory of a GPU. Expected numbers follow, in MiB, from shapes and vLLM's rules.

The usual model is Llama-3-8B: 32 layers, hidden size 4,096, intermediate size 14,336, 32 heads and 8 KV heads of 128,
vocabulary 128,256. The usual batch has 8,192 tokens and 1,024 requests, in two bytes. So one row (4,096 numbers for
each token) has 64 MiB.
"""

from __future__ import annotations

import math

import msgspec
import pytest
from builders import (
    DEEPSEEK,
    EXPERTS,
    FULL,
    GIB,
    IMAGES,
    LATENT,
    MIB,
    MOE,
    SLIDING,
    STATE,
    gpu,
    model,
    placed,
    quantized,
    run,
    tensor,
)
from hypothesis import assume, given
from hypothesis import strategies as st

from vllm_launch.model.model import Experts, Layer
from vllm_launch.sizing import activations, margin, memory
from vllm_launch.sizing.allocator import FRAGMENTS
from vllm_launch.sizing.cuda_graphs import capture_sizes
from vllm_launch.sizing.memory import Memory, cpu_memory, kv_bytes, memory_of_gpu, requested_bytes, safe_utilization
from vllm_launch.sizing.parallel import Layout
from vllm_launch.sizing.run_config import default_batch
from vllm_launch.units import gib

ONE = Layout()
AMPERE = gpu(capability=(8, 0))
"""A GPU on which attention does not split contexts."""
ROW = 64 * MIB
POOLING = {"task": "pooling"}  # no sampler
TINY_FFN = {"intermediate_size": 64}
NONE = Layer(kind="none")


def eager(batch=None):
    return msgspec.structs.replace(batch or run(), compiled=False, cudagraph_mode="NONE")


def peak(llm=None, batch=None, layout=ONE):
    """Return the activation peak of a forward pass that is not compiled."""
    return memory_of_gpu(placed(llm or model(), eager(batch), layout, gpu())).activation_peak


def non_torch(llm=None, batch=None, layout=ONE, device=None):
    return memory_of_gpu(placed(llm or model(), batch or run(), layout, device or gpu())).non_torch


# --- sizes as text


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (0, "0.00 GiB"),
        (96 * MIB, "96 MiB"),
        (-96 * MIB, "-96 MiB"),
        (1, "0 MiB"),
        (102 * MIB, "102 MiB"),
        (103 * MIB, "0.10 GiB"),
        (int(14.96 * GIB), "14.96 GiB"),
        (-2 * GIB, "-2.00 GiB"),
    ],
)
def test_sizes_are_in_gib_and_small_sizes_in_mib(size, words):
    assert gib(size) == words


# --- vLLM's own defaults (engine/arg_utils.py:get_batch_defaults)


@pytest.mark.parametrize(
    ("name", "total", "batch"),
    [
        ("NVIDIA B200", 160 * GIB, (16384, 1024)),
        ("NVIDIA H200", 160 * GIB - 1, (8192, 1024)),
        ("NVIDIA H100 80GB HBM3", 70 * GIB, (8192, 1024)),
        ("NVIDIA A100-SXM4-80GB", 80 * GIB, (2048, 256)),
        ("NVIDIA L40S", 70 * GIB - 1, (2048, 256)),
        ("NVIDIA L4", 22 * GIB, (2048, 256)),
    ],
)
def test_the_default_batch_depends_on_the_gpus_memory_and_is_smaller_on_an_a100(name, total, batch):
    assert default_batch(gpu(name=name, total=total)) == batch
    assert default_batch(gpu(name=name, total=total), world_size=8) == batch


def test_on_the_cpu_the_default_batch_grows_with_the_ranks():
    assert default_batch(None) == (2048, 128)
    assert default_batch(None, world_size=4) == (8192, 512)


# --- the peak of activations


def test_the_peak_of_a_dense_layer_is_its_residual_stream_and_its_feed_forward():
    # input, residual and output have three rows. Gate, up and product have 14,336 / 4,096 = 3.5 rows each
    assert peak() == 3 * ROW + 3 * 3.5 * ROW
    assert peak(model(**POOLING)) == peak()


def test_the_peak_doubles_in_float32():
    assert peak(batch=run(dtype="float32")) == 2 * peak()
    assert peak(model(dtype="float32"), run(dtype="float16")) == peak()


def test_queries_keys_and_values_are_the_peak_if_they_are_wider():
    # 32 heads and twice 8 KV heads of 128 are 6,144 numbers: one and a half rows
    assert peak(model(**TINY_FFN, **POOLING)) == 3 * ROW + 1.5 * ROW


def test_a_rank_has_its_shard_of_split_tensors_and_the_complete_residual_stream():
    assert peak(model(**POOLING), layout=Layout(tensor=4)) == 3 * ROW + 3 * 3.5 * ROW // 4
    assert peak(model(**TINY_FFN, **POOLING), layout=Layout(tensor=4)) == 3 * ROW + 1.5 * ROW // 4


def test_a_dense_feed_forward_counts_only_if_a_layer_has_one():
    sparse = model(layers=(MOE,) * 4, experts=EXPERTS, **POOLING)
    assert peak(sparse) == 3 * ROW + 1.5 * ROW
    assert peak(msgspec.structs.replace(sparse, layers=(FULL, MOE))) == 3 * ROW + 3 * 3.5 * ROW


def test_a_shared_expert_counts_as_a_feed_forward():
    shared = msgspec.structs.replace(EXPERTS, shared_intermediate_size=8192)
    sparse = model(layers=(MOE,), experts=shared, **POOLING)
    assert peak(sparse) == 3 * ROW + 3 * 2 * ROW
    assert peak(sparse, layout=Layout(tensor=2)) == 3 * ROW + 3 * ROW


def test_mxfp4_experts_hold_every_chosen_experts_gate_and_up_twice():
    experts = Experts(count=32, per_token=4, intermediate_size=2048)
    sparse = model(layers=(MOE,), experts=experts, quantization=quantized("mxfp4"), **POOLING)
    # four experts, each with 4 * 2,048 (two rows) and two times its input and output (two rows)
    assert peak(sparse) == 3 * ROW + 4 * (2 + 2) * ROW
    assert peak(msgspec.structs.replace(sparse, quantization=quantized("gpt_oss_mxfp4"))) == peak(sparse)
    assert peak(sparse, layout=Layout(tensor=4)) == 3 * ROW + 4 * (0.5 + 2) * ROW
    assert peak(sparse, layout=Layout(tensor=4, expert_parallel=True)) == 3 * ROW + 4 * (2 + 2) * ROW
    # two replicas: each rank receives both batches, and its experts run on both
    assert peak(sparse, layout=Layout(tensor=2, data=2)) == 3 * ROW + 2 * ROW + 2 * 4 * (0.5 + 2) * ROW


def test_shared_experts_receive_the_batch_of_every_replica():
    """device_communicators/all2all.py:AgRsAll2AllManager.dispatch gathers the hidden states of all replicas."""
    sparse = model(layers=(MOE,), experts=EXPERTS, **POOLING)
    assert peak(sparse, layout=Layout(tensor=2)) == 3 * ROW + 1.5 * ROW // 2
    for spread in (False, True):
        assert peak(sparse, layout=Layout(data=8, expert_parallel=spread)) == 3 * ROW + 8 * ROW
    assert peak(layout=Layout(data=8)) == peak()  # dense replicas exchange nothing


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (12, 0)])
def test_mxfp4_experts_share_a_workspace_if_marlin_runs_them(capability):
    """experts/marlin_moe.py:workspace_shapes: two times the larger of input and output, like Triton's."""
    experts = Experts(count=32, per_token=4, intermediate_size=2048)
    sparse = model(layers=(MOE,), experts=experts, quantization=quantized("mxfp4"), **POOLING)
    result = memory_of_gpu(placed(sparse, eager(), ONE, gpu(capability=capability)))
    assert result.activation_peak == 3 * ROW + 1.5 * ROW
    assert result.non_torch == memory.RUNTIME + 4 * (1 + 1) * ROW


LATENT_MODEL = model(layers=(LATENT,), mla=DEEPSEEK, heads=128, head_dim=192, kv_heads=128, **TINY_FFN, **POOLING)


def test_latent_attention_has_a_workspace_for_expanded_keys_and_values():
    """mla_attention.py:determine_chunked_prefill_workspace_size: eight of the longest requests, at most 64k tokens."""
    expanded = 128 * (128 + 128) * 2  # bytes of a token: for each head, keys without RoPE and values
    few = run(max_num_batched_tokens=64, max_num_seqs=8)
    # Also input, residual, queries, the latent before and after its norm, and the attention's output.
    around = 64 * (2 * 4096 + 128 * (128 + 64) + (512 + 64) + 512 + 128 * 128) * 2
    for length, workspace_tokens in [(2048, 16_384), (8192, 65_536), (100_000, 65_536)]:
        batch = msgspec.structs.replace(few, max_model_len=length)
        assert peak(LATENT_MODEL, batch) == around + workspace_tokens * expanded
    short = run(max_num_batched_tokens=64, max_num_seqs=256, max_model_len=128)
    assert peak(LATENT_MODEL, short) == around + 4 * 256 * 16 * expanded  # four blocks of 16 for each request
    quarter = 64 * (2 * 4096 + 32 * (128 + 64) + (512 + 64) + 512 + 32 * 128) * 2
    assert peak(LATENT_MODEL, short, Layout(tensor=4)) == quarter + 4 * 256 * 16 * expanded // 4


def test_normalised_queries_and_keys_are_alive_together_with_their_inputs():
    """models/qwen3_moe.py:Qwen3MoeAttention.forward: input and residual, Q, K and V, normed Q and K, the output."""
    wide = {"heads": 128, "head_dim": 128, "kv_heads": 8, **TINY_FFN, **POOLING}
    queries, keys = 4 * ROW, ROW // 4
    assert peak(model(**wide)) == 3 * ROW + queries + 2 * keys
    assert peak(model(**wide, qk_norm=True)) == 2 * ROW + 3 * queries + 3 * keys
    halved = peak(model(**wide, qk_norm=True), layout=Layout(tensor=2))
    assert halved == 2 * ROW + 3 * (queries + keys) // 2


def test_the_sampler_can_be_the_peak():
    # Two rows of hidden states (the batch's and those of the last tokens), the logits, and 16 MiB.
    wide = model(**TINY_FFN, vocab_size=1_280_000)
    logits = 1024 * 1_280_000 * 2
    states = ROW + 1024 * 4096 * 2
    assert peak(wide) == states + logits + 16 * MIB
    assert peak(msgspec.structs.replace(wide, task="pooling")) == 4.5 * ROW


def test_logits_have_the_padded_vocabulary_and_at_most_one_row_for_each_token():
    odd = model(**TINY_FFN, vocab_size=1_280_001)
    assert peak(odd) - peak(msgspec.structs.replace(odd, vocab_size=1_280_000)) == 1024 * 64 * 2
    few = run(max_num_batched_tokens=512)
    assert peak(odd, few) == 2 * 512 * 4096 * 2 + 512 * 1_280_064 * 2 + 16 * MIB


def test_logits_are_gathered_from_all_ranks():
    wide = model(**TINY_FFN, vocab_size=1_280_000)
    logits = 1024 * 1_280_000 * 2
    # the rank's shard, the shards of all ranks, and a copy in the vocabulary's order
    assert peak(wide, layout=Layout(tensor=4)) == ROW + 8 * MIB + logits // 4 + 2 * logits + 16 * MIB


@pytest.mark.parametrize("model_type", sorted(activations.SOFT_CAPPED))
def test_soft_capped_logits_are_copied_unless_they_are_gathered(model_type):
    wide = model(**TINY_FFN, vocab_size=1_280_000, model_type=model_type)
    plain = msgspec.structs.replace(wide, model_type="llama")
    assert peak(wide) - peak(plain) == 1024 * 1_280_000 * 2
    assert peak(wide, layout=Layout(tensor=2)) == peak(plain, layout=Layout(tensor=2))


def test_only_the_last_stage_samples():
    # All layers have small weights. The first stage has 40 GiB more, so memory_of_gpu returns the first stage.
    heavy = tuple(tensor(f"model.layers.0.mlp.down_proj.{n}.weight", 4096, 14336) for n in range(400))
    wide = model(**TINY_FFN, vocab_size=1_280_000, tensors=heavy)
    assert peak(wide, layout=Layout(pipeline=2)) == 4.5 * ROW
    assert peak(wide) > 10 * ROW


def test_a_compiled_stage_copies_its_input():
    """H100, PP=2, 2026-11-26: 0.906 GiB on the second GPU. 13.5 rows without the copy would be 0.844 GiB."""
    for batch, more in ((run(), ROW), (eager(), 0)):
        _, last = memory.memory_by_rank(placed(model(**POOLING), batch, Layout(pipeline=2), gpu()))
        assert last.activation_peak == peak(model(**POOLING)) + more


# --- memory that stays allocated besides weights

SAMPLER = 1024 * (4 * 128_256 + 2 * 4 * 4008 + 17_400)  # a count and two bits a token, and 17.4 KB, for each request


def test_the_samplers_state_grows_with_requests_and_the_vocabulary():
    assert non_torch() == memory.RUNTIME + SAMPLER
    assert non_torch(batch=run(max_num_seqs=1)) == memory.RUNTIME + SAMPLER // 1024
    # bits are in words of 32: one more token is one more word for each of the two bits
    assert non_torch(model(vocab_size=128_257)) - non_torch() == 1024 * (4 + 2 * 4)


def test_pooling_models_have_no_sampler_state():
    assert non_torch(model(**POOLING)) == memory.RUNTIME


def test_experts_share_a_workspace_for_every_chosen_expert():
    """fused_moe/experts/triton_moe.py:workspace_shapes: two times the larger of input and output."""
    narrow = model(layers=(MOE,), experts=Experts(count=64, per_token=8, intermediate_size=1024), **POOLING)
    wide = msgspec.structs.replace(narrow, experts=Experts(count=8, per_token=2, intermediate_size=8192))
    middle = msgspec.structs.replace(narrow, experts=Experts(count=8, per_token=2, intermediate_size=3072))
    assert non_torch(narrow) == memory.RUNTIME + 8 * (1 + 1) * ROW
    assert non_torch(wide) == memory.RUNTIME + 2 * (2 + 4) * ROW
    assert non_torch(middle) == memory.RUNTIME + 2 * (1 + 1.5) * ROW
    shards, whole_experts = Layout(tensor=4), Layout(tensor=4, expert_parallel=True)
    base = non_torch(model(**POOLING), layout=shards)
    assert non_torch(wide, layout=shards) == base + 2 * (1 + 1) * ROW
    assert non_torch(wide, layout=whole_experts) == base + 2 * (2 + 4) * ROW


def test_the_experts_workspace_holds_the_batches_of_all_replicas():
    """modular_kernel.py:_allocate_buffers gets the gathered tokens."""
    wide = model(layers=(MOE,), experts=Experts(count=8, per_token=2, intermediate_size=8192), **POOLING)
    base = memory.RUNTIME + memory.COLLECTIVES
    assert non_torch(wide, layout=Layout(data=4)) == base + 4 * 2 * (1 + 1) * ROW
    assert non_torch(wide, layout=Layout(data=4, expert_parallel=True)) == base + 4 * 2 * (2 + 4) * ROW
    mxfp4 = msgspec.structs.replace(wide, quantization=quantized("mxfp4"))
    assert non_torch(mxfp4, layout=Layout(data=4)) == base + 4 * 2 * 0.5 * ROW


def test_the_workspace_of_mxfp4_experts_has_only_their_width():
    experts = Experts(count=32, per_token=4, intermediate_size=2048)
    sparse = model(layers=(MOE,), experts=experts, quantization=quantized("mxfp4"), **POOLING)
    assert non_torch(sparse) == memory.RUNTIME + 4 * 0.5 * ROW


TURING = gpu(capability=(7, 5))


def test_tensor_parallel_ranks_and_replicas_that_share_experts_use_collectives():
    assert non_torch(layout=Layout(tensor=2), device=TURING) == memory.RUNTIME + SAMPLER + memory.COLLECTIVES
    assert non_torch(layout=Layout(data=2), device=TURING) == non_torch(device=TURING)
    sparse = model(layers=(MOE,), experts=EXPERTS)
    alone, shared = non_torch(sparse, device=TURING), non_torch(sparse, layout=Layout(data=2), device=TURING)
    assert shared - alone == memory.COLLECTIVES + 8 * (1 + 1) * ROW  # and a workspace for one more batch


@pytest.mark.parametrize(
    ("capability", "tensor_parallel", "mib"),
    [
        # four messages for each rank. The message of a batch has 64 MiB
        ((9, 0), 2, 4 * 2 * 64),
        ((9, 0), 4, 4 * 4 * 2),
        ((9, 0), 8, 4 * 8 * 0.5),
        ((10, 0), 2, 4 * 2 * 64),
        ((10, 0), 4, 4 * 4 * 32),
        ((10, 0), 8, 4 * 8 * 1),
        ((9, 0), 16, 0),
        ((8, 0), 2, 0),
        ((12, 0), 2, 0),
    ],
)
def test_the_fused_all_reduce_has_a_workspace_on_gpus_that_flashinfer_supports(capability, tensor_parallel, mib):
    """compilation/passes/fusion/allreduce_rms_fusion.py:FI_ALLREDUCE_FUSION_MAX_SIZE_MB."""
    layout, device = Layout(tensor=tensor_parallel), gpu(capability=capability)
    assert non_torch(layout=layout, device=device) - non_torch(layout=layout, device=TURING) == mib * MIB
    without = run(fuse_allreduce_rms=False)
    assert non_torch(batch=without, layout=layout, device=device) == non_torch(layout=layout, device=TURING)


def test_a_small_batch_needs_a_small_all_reduce_workspace():
    small = run(max_num_batched_tokens=1024)  # a message of 8 MiB
    two = Layout(tensor=2)
    assert non_torch(batch=small, layout=two) - non_torch(batch=small, layout=two, device=TURING) == 8 * 8 * MIB


def test_a_later_stage_receives_hidden_states_and_residual():
    assert non_torch(model(**POOLING), eager(), Layout(pipeline=2)) == memory.RUNTIME + 2 * ROW
    assert non_torch(layout=Layout(pipeline=2)) == memory.RUNTIME + SAMPLER + 2 * ROW


def test_the_first_stage_receives_nothing_and_samples_nothing():
    heavy = tuple(tensor(f"model.layers.0.mlp.down_proj.{n}.weight", 4096, 14336) for n in range(40))
    assert non_torch(model(tensors=heavy), layout=Layout(pipeline=2)) == memory.RUNTIME


def test_memory_of_gpu_returns_the_stage_with_the_least_memory_left():
    middle = tuple(tensor(f"model.layers.1.mlp.down_proj.{n}.weight", 4096, 14336) for n in range(40))
    result = memory_of_gpu(placed(model(layers=3, tensors=middle, **POOLING), run(), Layout(pipeline=3), gpu()))
    assert result.weights > 40 * 112 * MIB
    assert result.non_torch == memory.RUNTIME + 2 * ROW


# --- before vLLM measures memory, and after


@pytest.mark.parametrize(
    ("capability", "base"),
    [
        ((7, 5), memory.CONTEXT_SMALL),
        ((8, 0), memory.CONTEXT_A100),
        ((8, 6), memory.CONTEXT_SMALL),
        ((8, 9), memory.CONTEXT_SMALL),
        ((9, 0), memory.CONTEXT_HOPPER),
        ((10, 0), memory.CONTEXT_HOPPER),
        ((12, 0), memory.CONTEXT_SMALL),
    ],
)
def test_a_cuda_context_depends_on_the_gpu_and_nccl_adds_to_it(capability, base):
    device = gpu(capability=capability)
    assert memory_of_gpu(placed(model(), run(), ONE, device)).context == base
    assert memory_of_gpu(placed(model(), run(), Layout(data=2), device)).context == base
    assert memory_of_gpu(placed(model(), run(), Layout(pipeline=2), device)).context == base
    assert memory_of_gpu(placed(model(), run(), Layout(tensor=2), device)).context == base + memory.NCCL_CONTEXT
    sparse = model(layers=(MOE,), experts=EXPERTS)
    assert memory_of_gpu(placed(sparse, run(), ONE, device)).context == base
    assert memory_of_gpu(placed(sparse, run(), Layout(data=2), device)).context == base + memory.NCCL_CONTEXT


def safety(llm=None, batch=None, layout=ONE, device=AMPERE):
    """Return the safety margin without CUDA graphs and with expandable segments."""
    batch = msgspec.structs.replace(eager(batch), expandable_segments=True)
    return memory_of_gpu(placed(llm or model(), batch, layout, device)).safety


def test_serving_needs_logit_copies_block_tables_and_fragments():
    copies = margin.SAMPLER_COPIES * 4 * 1024 * 128_256
    tables = 2 * 4 * 1024 * 512  # two rows of int32, 8,192 / 16 blocks long
    assert safety() == copies + tables + FRAGMENTS
    assert safety(model(**POOLING)) == tables + FRAGMENTS
    assert safety(batch=run(max_model_len=8193)) - safety() == 2 * 4 * 1024
    assert safety(layout=Layout(tensor=2)) == safety()


def test_every_group_of_layers_has_its_own_block_tables():
    """v1/worker/gpu/block_table.py:BlockTables, with rows as kv_cache_interface.py:max_num_blocks_per_req says."""
    table = 2 * 4 * 1024 * 512
    sampler = safety(model(layers=4)) - table
    assert safety(model(layers=(SLIDING,) * 5 + (FULL,))) == sampler + 6 * table
    assert safety(model(layers=(FULL,) * 4), run(block_size=64)) == sampler + table // 4
    # a state of 1 MiB makes blocks of 256 tokens: one group of attention and three of states
    assert safety(model(layers=(STATE, STATE, STATE, FULL))) == sampler + 4 * table // 16
    assert safety(model(layers=(NONE,))) == sampler


def test_logit_copies_are_limited_by_the_tokens_of_a_batch():
    assert safety(batch=run(max_num_batched_tokens=512)) == safety() - margin.SAMPLER_COPIES * 4 * 512 * 128_256
    assert safety(model(vocab_size=128_257)) - safety() == margin.SAMPLER_COPIES * 4 * 1024 * 64


def test_pipeline_stages_open_channels_that_the_profile_does_not_count():
    assert safety(layout=Layout(pipeline=2)) == safety() + margin.PIPELINE_CHANNELS


def test_flashinfer_has_a_workspace_if_it_runs_attention():
    """v1/attention/backends/flashinfer.py:_get_workspace_buffer and _get_trtllm_workspace_buffer."""
    fp8 = run(kv_cache_dtype="fp8")
    ada, blackwell, geforce = (gpu(capability=capability) for capability in [(8, 9), (10, 3), (12, 0)])
    for batch in (run(), fp8):
        assert safety(batch=batch, device=blackwell) == safety() + 394 * MIB
    for device in (ada, geforce):
        assert safety(device=device) == safety()
        assert safety(batch=fp8, device=device) == safety() + 8192 * 32 * 128 * 16
        assert safety(batch=fp8, layout=Layout(tensor=2), device=device) == safety() + 394 * MIB  # at least
    latent = model(layers=(LATENT,), mla=DEEPSEEK)
    assert safety(latent, batch=fp8, device=ada) == safety(latent, device=ada)


# --- attention while vLLM serves. The profile does not run it


@pytest.mark.parametrize(
    ("tiles", "blocks", "splits"),
    [
        (8, 64, 15),  # 120 of 132 multiprocessors. The best number, 33, fills all of them twice
        (8, 32, 14),  # 112 multiprocessors. The best number, 16, fills 128
        (16, 64, 8),
        (16, 32, 7),
        (4, 64, 29),
        (1, 64, 55),  # the context has 64 tiles of keys: 85 % of 64
        (8, 5, 5),
        (8, 4, 1),  # too short to split
        (104, 64, 5),  # 1 to 4 splits waste a fifth, 5 splits waste 8 of 528
    ],
)
def test_a_context_is_split_until_the_gpu_is_nearly_fully_used(tiles, blocks, splits):
    """Compare with hopper/heuristics.h:num_splits_heuristic, computed by hand for 132 multiprocessors."""
    assert activations._split_count(tiles, blocks) == splits


def test_on_hopper_a_batch_of_short_prompts_with_a_long_context_must_fit():
    # The feed-forward layer has a quarter of its usual size, and the sampler is negligible. Attention has 15 splits of
    # 8,192 tokens and 32 heads of 128 in float32, each with its sum. Input, residual, Q and output have one row each, K
    # and V together half a row. The profile already counts three rows and 3 * 0.875 rows.
    small = model(vocab_size=64, intermediate_size=3584)
    splits = 15 * 8192 * 32 * (128 + 1) * 4
    other_tensors = 4.5 * ROW - (3 + 3 * 0.875) * ROW
    tables = 2 * 4 * 1024 * 512
    assert safety(small, device=gpu()) == splits + other_tensors + tables + FRAGMENTS
    assert safety(small, device=gpu(capability=(12, 0))) == safety(small)
    latent = model(vocab_size=64, layers=(LATENT,), mla=DEEPSEEK)
    assert safety(latent, device=gpu()) == safety(latent)


def test_few_requests_or_a_short_context_split_less():
    small = model(vocab_size=64, intermediate_size=3584)
    # 64 requests of up to 32 tokens are 2,048 tokens in 15 splits. Of up to 64 tokens they are 4,096 tokens in 8 splits.
    # The maximum is 8,192 tokens in 7 splits, when the longest request has 7 tiles: two times 56 tiles fill 85 % of
    # 132 multiprocessors, and seven times 56 tiles fill nearly all.
    fewer = run(max_num_seqs=64)
    tables = 2 * 4 * (1024 - 64) * 512
    assert (
        safety(small, device=gpu()) - safety(small, fewer, device=gpu())
        == (15 - 7) * 8192 * 32 * (128 + 1) * 4 + tables
    )
    assert safety(small, run(max_model_len=512), device=gpu()) < safety(small, fewer, device=gpu())


def test_the_sampler_counts_if_it_needs_more_than_attention():
    assert safety(device=gpu()) == safety()


# --- the first start, without a compiled model in the cache


def first_start(llm=None, batch=None, layout=ONE):
    return memory.memory_by_rank(placed(llm or model(), batch or run(), layout, gpu()))


def test_kernels_are_timed_on_a_copy_of_the_embedding_table():
    table = 128_256 * 4096 * 2
    (compiled,) = first_start()
    assert compiled.activation_peak == table + 2 * ROW - activations.ALLOCATED_AFTER_TIMING
    (small,) = first_start(batch=run(max_num_batched_tokens=2048, max_num_seqs=256))
    assert small.activation_peak == table + ROW // 2 - activations.ALLOCATED_AFTER_TIMING
    (wide,) = first_start(batch=run(max_num_batched_tokens=16384))
    assert wide.activation_peak == peak(batch=run(max_num_batched_tokens=16384))  # which is larger


def test_no_kernels_are_timed_with_shards_eager_mode_external_embeddings_or_on_later_stages():
    batch = run(max_num_batched_tokens=2048, max_num_seqs=256)
    for llm, batch_run, layout in (
        (model(), batch, Layout(tensor=2)),
        (model(), eager(batch), ONE),
        (model(media=IMAGES), batch, ONE),
    ):
        (result,) = first_start(llm, batch_run, layout)
        assert result.activation_peak == peak(llm, batch_run, layout)
    first, last = first_start(batch=batch, layout=Layout(pipeline=2))
    assert first.activation_peak > last.activation_peak == peak(batch=batch) + ROW // 4
    (text,) = first_start(model(media=IMAGES), msgspec.structs.replace(batch, language_model_only=True))
    assert text.activation_peak == first_start(batch=batch)[0].activation_peak


def test_the_experts_workspace_is_allocated_after_the_timing_peak():
    sparse = model(layers=(MOE,), experts=EXPERTS)
    batch = run(max_num_batched_tokens=512, max_num_seqs=64)
    workspace = non_torch(sparse, batch) - non_torch(batch=batch)
    assert first_start(batch=batch)[0].activation_peak - first_start(sparse, batch)[0].activation_peak == workspace


# --- memory that is left

PARTS = Memory(weights=10 * GIB, activation_peak=GIB, cuda_graphs=GIB, non_torch=GIB, context=GIB, safety=2 * GIB)


def test_vllm_rounds_what_it_requests_up():
    assert requested_bytes(gpu(total=100 * GIB), 0.5) == 50 * GIB
    assert requested_bytes(gpu(total=1001), 0.5) == 501


def test_the_kv_cache_gets_the_memory_that_weights_peak_graphs_and_non_torch_leave():
    assert kv_bytes(PARTS, run(), gpu(total=100 * GIB), 0.5) == 37 * GIB
    assert kv_bytes(PARTS, run(), gpu(total=20 * GIB), 0.5) == -3 * GIB


def test_the_safe_utilisation_leaves_the_context_and_the_safety_margin_free():
    # 100 GiB minus one and two
    assert safe_utilization(PARTS, run(), gpu(total=100 * GIB, free=100 * GIB)) == 0.97
    assert safe_utilization(PARTS, run(), gpu(total=100 * GIB, free=50 * GIB)) == 0.47  # other processes use the GPU


def test_a_utilisation_is_rounded_down_to_four_decimals():
    assert safe_utilization(PARTS, run(), gpu(total=90 * GIB, free=33 * GIB)) == 0.3333


def test_the_safe_utilisation_is_at_most_the_maximum():
    spare = msgspec.structs.replace(PARTS, context=0, safety=0)
    assert safe_utilization(spare, run(), gpu(total=100 * GIB, free=100 * GIB)) == memory.MAX_UTILIZATION


def test_the_safe_utilisation_of_a_full_gpu_is_negative():
    assert safe_utilization(PARTS, run(), gpu(total=100 * GIB, free=2 * GIB)) < 0


SIZES = st.integers(GIB, 200 * GIB)


@given(total=SIZES, free=SIZES, used_bytes=st.integers(0, 100 * GIB))
def test_the_safe_utilisation_fits_and_never_falls_with_more_free_memory(total, free, used_bytes):
    assume(used_bytes <= free <= total)
    device = gpu(total=total, free=free)
    utilization = safe_utilization(PARTS, run(), device)
    spare = free - PARTS.context - PARTS.safety
    if utilization >= 0:
        assert requested_bytes(device, utilization) <= spare + 1  # a byte of rounding
    if utilization < memory.MAX_UTILIZATION:
        assert requested_bytes(device, utilization + 0.0001) >= spare
    assert safe_utilization(PARTS, run(), gpu(total=total, free=free - used_bytes)) <= utilization


@given(
    total=st.integers(10 * GIB, 200 * GIB),
    more=st.integers(0, 100 * GIB),
    utilization=st.floats(0.01, 1, exclude_min=True),
)
def test_a_larger_gpu_never_leaves_less_for_the_kv_cache(total, more, utilization):
    assert kv_bytes(PARTS, run(), gpu(total=total + more), utilization) >= kv_bytes(
        PARTS, run(), gpu(total=total), utilization
    )


@given(
    tokens=st.integers(1, 32_768),
    seqs=st.integers(1, 2048),
    length=st.integers(1, 200_000),
    tensor_parallel=st.sampled_from([1, 2, 4, 8]),
    pipeline=st.integers(1, 4),
    moe=st.booleans(),
)
def test_a_larger_batch_never_needs_less_memory(*, tokens, seqs, length, tensor_parallel, pipeline, moe):
    llm = model(layers=(MOE,) * 8, experts=EXPERTS) if moe else model(layers=8)
    layout = Layout(tensor=tensor_parallel, pipeline=pipeline)

    def sizes_of_batch(**changes):
        """Return the batch sizes with graphs, and for each rank: graphs, the first start's profile, all memory if eager."""
        batch = run(**{"max_num_batched_tokens": tokens, "max_num_seqs": seqs, "max_model_len": length, **changes})
        compiled, plain = (
            memory.memory_by_rank(placed(llm, batch_run, layout, gpu())) for batch_run in (batch, eager(batch))
        )
        profile = [rank.activation_peak + rank.non_torch for rank in compiled]
        total = [rank.activation_peak + rank.non_torch + rank.safety for rank in plain]
        return set(capture_sizes(batch, gpu().generation)), [rank.cuda_graphs for rank in compiled], [*profile, *total]

    sizes, graphs, base = sizes_of_batch()
    for changes in ({"max_num_batched_tokens": 2 * tokens}, {"max_num_seqs": 2 * seqs}, {"max_model_len": 2 * length}):
        more_sizes, more_graphs, more = sizes_of_batch(**changes)
        assert all(larger >= smaller for larger, smaller in zip(more, base, strict=True))
        if sizes <= more_sizes:  # vLLM captures the size of a full batch. A larger batch may not have this size
            assert all(larger >= smaller for larger, smaller in zip(more_graphs, graphs, strict=True))


# --- the CPU engine


def test_a_cpu_worker_needs_its_weights_its_peak_and_the_program():
    # without tensors there is only RoPE's table: 8,192 positions of 128 two-byte numbers
    small = model(layers=2)
    assert cpu_memory(placed(small, run(), ONE)) == 2 * MIB + peak(small) + 1536 * MIB
    with_tensor = model(layers=2, tensors=(tensor("model.layers.0.mlp.down_proj.weight", 4096, 4096),))
    assert cpu_memory(placed(with_tensor, run(), ONE)) - cpu_memory(placed(small, run(), ONE)) == 32 * MIB
    assert cpu_memory(placed(with_tensor, run(), ONE)) - cpu_memory(
        placed(with_tensor, run(), Layout(tensor=2))
    ) == 16 * MIB + peak(small) - peak(small, layout=Layout(tensor=2))


def test_on_the_cpu_the_heaviest_stage_counts_and_includes_sampling():
    with_tensor = model(
        layers=2, tensors=(tensor("model.layers.0.mlp.down_proj.weight", 4096, 4096),), vocab_size=1_280_000
    )
    assert cpu_memory(placed(with_tensor, run(), Layout(pipeline=2))) == 34 * MIB + peak(with_tensor) + 1536 * MIB


ODD = Experts(count=64, per_token=8, intermediate_size=1027, shared_intermediate_size=14_335)


@pytest.mark.parametrize(
    "llm",
    [
        model(intermediate_size=14_335, **POOLING),
        model(intermediate_size=1, **POOLING),
        model(vocab_size=1_280_001),
        model(layers=(MOE,), experts=ODD, **POOLING),
        model(layers=(MOE,), experts=ODD, quantization=quantized("mxfp4"), **POOLING),
        model(layers=(LATENT,), mla=DEEPSEEK, heads=127, **POOLING),
    ],
)
def test_memory_is_in_integer_bytes(llm):
    result = memory_of_gpu(placed(llm, run(max_num_batched_tokens=8191), Layout(tensor=7), gpu()))
    assert [type(value) for value in msgspec.structs.astuple(result)] == [int] * 7
    assert math.isfinite(safe_utilization(result, run(), gpu()))
