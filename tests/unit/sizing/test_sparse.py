"""Tests of sparse attention's memory. Shapes: DeepSeek-V3.2 (128 heads, 2,048 chosen tokens) and DeepSeek-V4."""

from __future__ import annotations

import msgspec
import pytest
from builders import DEEPSEEK, EXPERTS, FULL, LATENT, MIB, gpu, model, placed, run

from vllm_launch.model.model import Layer
from vllm_launch.sizing.activations import activation_peak, attention_peak, workspace
from vllm_launch.sizing.cuda_graphs import cuda_graphs
from vllm_launch.sizing.memory import memory_of_gpu
from vllm_launch.sizing.parallel import Layout
from vllm_launch.sizing.sparse import chosen_indices, has_dense_attention, sparse_workspace

INDEXED = Layer(kind="mla", kv_heads=1, head_dim=576, index_bytes=132)
COMPRESSED = Layer(kind="compressed", kv_heads=1, head_dim=512, window=128, compression=4, index_bytes=132)
WINDOW = Layer(kind="compressed", kv_heads=1, head_dim=512, window=128)
BLOCKS = Layer(kind="full", kv_heads=8, head_dim=128, head_dim_v=128, index_bytes=256)
V32 = model(layers=(INDEXED, LATENT), mla=DEEPSEEK, heads=128, index_topk=2048)
V4 = model(layers=(WINDOW, COMPRESSED), heads=64, head_dim=512, kv_heads=1, index_topk=512, model_type="deepseek_v4")
LONG = run(max_model_len=163_840)


def test_models_without_an_indexer_have_no_workspace():
    for llm in (model(), model(layers=(LATENT,), mla=DEEPSEEK)):
        assert sparse_workspace(placed(llm, LONG, on=gpu())) == 0
        assert workspace(placed(llm, LONG, on=gpu())) == 0


def test_the_indexer_gathers_forty_contexts_or_sixteen_of_long_models():
    small = {"max_num_batched_tokens": 1}
    at_limit = placed(model(layers=(BLOCKS,)), run(max_model_len=262_144, **small), on=gpu())
    beyond = placed(model(layers=(BLOCKS,)), run(max_model_len=262_145, **small), on=gpu())
    assert sparse_workspace(at_limit) == 40 * 262_144 * 256 + MIB
    assert sparse_workspace(beyond) == 16 * 262_145 * 256 + MIB


def test_flashmla_reserves_contexts_only_for_packed_vectors():
    queries = 2 * 8192 * 128 * 576
    contexts = 2 * 5 * 163_840 * 576
    copies = 2 * 8192 * 128 * (576 + 512 + 512)
    assert sparse_workspace(placed(V32, LONG, on=gpu())) == queries
    packed = run(max_model_len=163_840, kv_cache_dtype="fp8")
    assert sparse_workspace(placed(V32, packed, on=gpu())) == queries + contexts + copies


def test_flashmla_pads_the_query_heads_of_a_small_shard():
    shard = Layout(tensor=8)  # 16 heads, padded to 64
    long_batch = run(max_model_len=4096, max_num_batched_tokens=8192)
    assert sparse_workspace(placed(V32, long_batch, shard, gpu())) == 2 * 8192 * 64 * 576


def test_the_cpu_engine_has_only_the_indexers_workspace():
    assert sparse_workspace(placed(V32, LONG)) == 40 * 163_840 * 132 + MIB


def test_deepseek_v4_gathers_four_requests():
    placement = placed(V4, run(max_model_len=1_048_576), on=gpu())
    vectors = 4 * (1_048_576 // 4 + 128 + 8192) * 512 * 2
    assert sparse_workspace(placement) == vectors + 4 * 8192 * (640 + 1)
    assert chosen_indices(placement) == 4 * 8192 * 512


def test_moe_layers_and_sparse_attention_share_the_larger_workspace():
    experts = workspace(placed(model(experts=EXPERTS), LONG, on=gpu()))
    attention = sparse_workspace(placed(V32, LONG, on=gpu()))
    both = model(layers=(INDEXED,), mla=DEEPSEEK, heads=128, index_topk=2048, experts=EXPERTS)
    assert workspace(placed(both, LONG, on=gpu())) == max(experts, attention)


@pytest.mark.parametrize(
    ("llm", "dense"),
    [
        (model(), True),
        (V32, False),
        (V4, False),
        (model(layers=(BLOCKS,)), False),
        (model(layers=(BLOCKS, FULL)), True),
    ],
)
def test_only_dense_attention_splits_contexts(llm, dense):
    placement = placed(llm, run(), on=gpu())
    assert has_dense_attention(llm) == dense
    if not llm.mla:
        assert bool(attention_peak(placement)) == dense


def test_sparse_attention_has_no_splits_in_cuda_graphs():
    dense = model(layers=(FULL, FULL), heads=64, head_dim=512, kv_heads=1)
    batch = run(estimate_cudagraphs=False)
    splits = 32 * 512 * 64 * 513 * 4  # splits, requests, heads, values with their sum, bytes
    difference = cuda_graphs(placed(dense, batch, on=gpu()), 2) - cuda_graphs(placed(V4, batch, on=gpu()), 2)
    assert difference == pytest.approx(splits, rel=1e-6)


def test_the_profile_allocates_the_indexers_logits():
    def peak(llm):
        return activation_peak(placed(llm, run(), on=gpu()), first=True, last=False)

    dense, indexed = (model(layers=(layer,), intermediate_size=64) for layer in (FULL, BLOCKS))
    assert peak(indexed) - peak(dense) == 512 * MIB


def test_hyper_connections_multiply_the_residual():
    def peak(copies, *, first):
        return activation_peak(placed(model(residual_copies=copies), run(), on=gpu()), first=first, last=False)

    row = 8192 * 4096 * 2
    assert peak(4, first=True) - peak(1, first=True) == 6 * row
    assert peak(4, first=False) - peak(1, first=False) == 9 * row


def test_the_indices_and_the_workspace_count_as_buffers():
    indices = 4 * 8192 * 2048
    fewer = msgspec.structs.replace(V32, index_topk=0)
    with_indices, without = (memory_of_gpu(placed(llm, LONG, on=gpu())).non_torch for llm in (V32, fewer))
    assert with_indices - without == indices
