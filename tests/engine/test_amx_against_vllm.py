"""Compares with vLLM when its CPU attention uses AMX instructions, and which quantisations only support bfloat16."""

# ruff: noqa: TID251 - the engine is what these tests compare with

import warnings

import pytest

from vllm_launch.machine.cpu import Cpu
from vllm_launch.model.dtypes import ONLY_BFLOAT16
from vllm_launch.model.model import Layer, Model
from vllm_launch.plan.request import amx_attention

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch deprecates what its own import uses
    import torch
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, _get_attn_isa

BLOCK = 128
"""vLLM's default block size on the CPU, tokens (platforms/cpu.py:check_and_update_config)."""


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("head_dim", CPUAttentionBackend.get_supported_head_sizes())
def test_amx_is_predicted_where_vllm_uses_it(monkeypatch, amx, head_dim):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    cpu = Cpu(cores=2, memory_total=1, memory_limit=None, memory_available=1, amx=amx)
    layer = Layer(kind="full", kv_heads=2, head_dim=head_dim, head_dim_v=head_dim)
    model = Model(
        name="m", path=None, architecture="LlamaForCausalLM", model_type="llama", task="generate", dtype="bfloat16",
        hidden_size=256, intermediate_size=512, vocab_size=1024, heads=4, head_dim=head_dim, kv_heads=2,
        max_model_len=1024, tie_word_embeddings=False, tensors=(), tensors_from="safetensors", layers=(layer,),
    )  # fmt: skip
    assert amx_attention(model, cpu) == (_get_attn_isa(torch.bfloat16, BLOCK, head_dim) == "amx")
    for dtype in (torch.float16, torch.float32):
        assert _get_attn_isa(dtype, BLOCK, head_dim) != "amx"


def test_these_quantisations_only_support_bfloat16():
    only_bfloat16 = set()
    for method in QUANTIZATION_METHODS:
        config = get_quantization_config(method)
        if torch.float16 not in config.__new__(config).get_supported_act_dtypes():
            only_bfloat16.add(method)
    assert only_bfloat16 == ONLY_BFLOAT16
