"""Compares the workspace of sparse attention with the bytes that vLLM's own classes ask for. No GPU is needed."""

# ruff: noqa: TID251 - the engine is what these tests compare with

import math
import warnings
from types import SimpleNamespace

import msgspec
import pytest
import torch
from builders import DEEPSEEK, gpu, model, placed, run

from vllm_launch.model.model import Layer
from vllm_launch.sizing import sparse
from vllm_launch.sizing.parallel import Layout
from vllm_launch.units import MIB

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch deprecates what its own import uses
    from vllm import envs
    from vllm.model_executor.layers import sparse_attn_indexer
    from vllm.models.deepseek_v4.nvidia import flashmla
    from vllm.v1.attention.backends.mla import flashmla_sparse, indexer

INDEXED = Layer(kind="mla", kv_heads=1, head_dim=576, index_bytes=132)
COMPRESSED = Layer(kind="compressed", kv_heads=1, head_dim=512, window=128, compression=4, index_bytes=132)
V32 = model(layers=(INDEXED,), mla=DEEPSEEK, heads=128, index_topk=2048)
LENGTHS = [8192, 163_840, 262_144, 262_145, 1_048_576]


class Recorder:
    """Adds up what vLLM asks its workspace manager for, in bytes."""

    def __init__(self):
        self.bytes = 0

    def get_simultaneous(self, *specs):
        self.bytes = sum(math.prod(shape) * dtype.itemsize for shape, dtype in specs)


def vllm_config(length, batch=8192):
    factor = 5 if length <= 256 * 1024 else 2  # config/vllm.py:VllmConfig.__post_init__
    return SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=length),
        attention_config=SimpleNamespace(sparse_mla_prefill_workspace_factor=factor),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=batch),
        parallel_config=SimpleNamespace(
            prefill_context_parallel_size=1, decode_context_parallel_size=1, tensor_parallel_size=1
        ),
    )


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("ratio", [0, 4])
def test_the_indexer_gathers_as_much_as_in_vllm(length, ratio):
    rows = indexer.get_max_prefill_buffer_size(vllm_config(length)) // max(1, ratio)
    specs = sparse_attn_indexer._gather_workspace_shapes(rows, 128, torch.float8_e4m3fn, use_fp4_cache=False)
    expected = sum(math.prod(shape) * dtype.itemsize for shape, dtype in specs)
    layer = msgspec.structs.replace(INDEXED, compression=ratio)
    small_batch = placed(model(layers=(layer,)), run(max_model_len=length, max_num_batched_tokens=1), on=gpu())
    assert sparse.sparse_workspace(small_batch) == expected + sparse_attn_indexer.RADIX_TOPK_WORKSPACE_SIZE


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("tensor", [1, 2, 8])
@pytest.mark.parametrize("dtype", ["auto", "fp8"])
def test_flashmla_reserves_as_much_as_in_vllm(monkeypatch, length, tensor, dtype):
    recorder = Recorder()
    monkeypatch.setattr(flashmla_sparse, "current_workspace_manager", lambda: recorder)
    monkeypatch.setattr(flashmla_sparse, "get_current_vllm_config", lambda: vllm_config(length))
    monkeypatch.setattr(flashmla_sparse.SparseMLACommonImpl, "__init__", lambda self, *_, **__: _fill(self))
    flashmla_sparse.FlashMLASparseImpl(
        128 // tensor, 576, 1.0, 1, None, None, "fp8_ds_mla" if dtype == "fp8" else "bfloat16", None, "decoder", None
    )
    batch = run(max_model_len=length, kv_cache_dtype=dtype)
    workspace = sparse.sparse_workspace(placed(V32, batch, Layout(tensor=tensor), gpu()))
    gathered = length * 8 * (5 if length <= 256 * 1024 else 2) * 132 + MIB
    assert workspace == max(recorder.bytes, gathered)


def _fill(implementation):
    implementation.kv_lora_rank, implementation.qk_rope_head_dim = 512, 64
    implementation.dcp_world_size = implementation.pcp_world_size = 1
    implementation.need_to_return_lse_for_decode = False


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("ratio", [0, 4, 128])
@pytest.mark.parametrize("topk", [512, 2048])
def test_deepseek_v4_reserves_as_much_as_in_vllm(monkeypatch, length, ratio, topk):
    recorder = Recorder()
    monkeypatch.setattr(flashmla, "current_workspace_manager", lambda: recorder)
    monkeypatch.setattr(flashmla, "get_forward_context", lambda: SimpleNamespace(attn_metadata=None))
    attention = flashmla.DeepseekV4FlashMLAAttention
    layer = SimpleNamespace(
        compress_ratio=ratio, max_model_len=length, window_size=128, max_num_batched_tokens=8192, max_image_tokens=0,
        topk_indices_buffer=torch.empty(8192, topk, dtype=torch.int32, device="meta"),
        PREFILL_CHUNK_SIZE=attention.PREFILL_CHUNK_SIZE,
    )  # fmt: skip
    queries = torch.empty(8192, 64, 512, dtype=torch.bfloat16, device="meta")
    attention.forward_mqa(layer, queries, queries, queries, queries)
    compressed = msgspec.structs.replace(COMPRESSED, compression=ratio, index_bytes=0)
    llm = model(layers=(compressed,), index_topk=topk)
    ours = sparse._compressed_workspace(placed(llm, run(max_model_len=length), on=gpu()))
    # A layer without compression chooses nothing, so it needs fewer indices. Counting them costs at most 64 MiB.
    assert recorder.bytes <= ours <= recorder.bytes + (4 * 8192 * topk if ratio == 0 else 0)


def test_the_indexers_logits_have_vllms_limit():
    assert envs.VLLM_SPARSE_INDEXER_MAX_LOGITS_MB * MIB == sparse.INDEXER_LOGITS
