"""Tests of layers that only models with code in their repository have. tests/data/model_facts.jsonl has whole models."""

from __future__ import annotations

from typing import Any

from vllm_launch.model.build import build
from vllm_launch.model.checkpoint import Checkpoint
from vllm_launch.model.model import Model

SIZES = {
    "dtype": "bfloat16", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 5, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 1000, "max_position_embeddings": 4096,
}  # fmt: skip


def read(architecture: str, model_type: str, **values: Any) -> Model:
    config = SIZES | {"architectures": [architecture], "model_type": model_type} | values
    return build("m", Checkpoint(None, {"config.json": config}, None, ()), {}, pessimistic=False)


def test_a_searched_layer_can_lack_attention_or_its_feed_forward() -> None:
    full = {"attention": {"n_heads_in_group": 2, "no_op": False}, "ffn": {"ffn_mult": 3.0, "no_op": False}}
    bare = {"attention": {"n_heads_in_group": None, "no_op": True}, "ffn": {"ffn_mult": None, "no_op": True}}
    model = read("DeciLMForCausalLM", "nemotron-nas", num_key_value_heads=None, block_configs=[full, bare] * 2 + [full])
    assert [layer.kind for layer in model.layers] == ["full", "none", "full", "none", "full"]
    assert (model.kv_heads, model.layers[0].kv_heads) == (2, 2)
    assert not [tensor.name for tensor in model.tensors if ".layers.1." in tensor.name]
    assert {tensor.shape for tensor in model.tensors if "gate_proj" in tensor.name} == {(512, 256)}


def test_each_further_pass_through_a_looped_layer_has_a_window() -> None:
    model = read("IQuestLoopCoderForCausalLM", "iquestloopcoder", loop_num=3, loop_window_size=32)
    assert {layer.loop_windows for layer in model.layers} == {(32, 32)}


def test_a_convolution_decides_what_ling_does_after_the_last_whole_group() -> None:
    latent = {"kv_lora_rank": 64, "layer_group_size": 2}
    older = read("BailingMoeV2_5ForCausalLM", "bailing_hybrid", **latent)
    newer = read("BailingMoeV3ForCausalLM", "bailing_hybrid", short_conv_kernel_size=4, **latent)
    assert [layer.kind for layer in older.layers] == ["mamba", "mla", "mamba", "mla", "mamba"]
    assert [layer.kind for layer in newer.layers] == ["mamba", "mla", "mamba", "mla", "mla"]
    assert (len(older.layers[0].state_shapes), len(newer.layers[0].state_shapes)) == (1, 2)


def test_a_layer_of_longcat_has_two_attention_blocks() -> None:
    model = read("LongcatFlashForCausalLM", "longcat_flash", kv_lora_rank=64, n_routed_experts=2, moe_topk=1)
    assert {layer.attentions for layer in model.layers} == {2}
    assert sum(".o_proj." in tensor.name for tensor in model.tensors) == 2 * 5


def test_a_list_of_widths_of_experts_counts_as_its_largest() -> None:
    model = read(
        "HunYuanMoEV1ForCausalLM", "hunyuan_v1_moe", num_experts=2, moe_topk=[1] * 5,
        moe_intermediate_size=[64, 128, 64, 64, 64], num_shared_expert=[1] * 5,
    )  # fmt: skip
    assert model.experts is not None
    assert (model.experts.intermediate_size, model.experts.per_token) == (128, 1)
