"""The cache of each layer, for each format in which a config states it."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_launch.engine.architectures import config_defaults
from vllm_launch.errors import UsageError
from vllm_launch.model.config import Config
from vllm_launch.model.layers import kv_heads, layer_count, read_layers
from vllm_launch.model.model import Layer
from vllm_launch.model.tensors_moe import is_moe

BASE: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4}
STATE = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 2, "mamba_d_conv": 4}


def layers(model_type: str, **changes: Any) -> tuple[Layer, ...]:
    config = Config({**BASE, "model_type": model_type, **changes}, "config.json", config_defaults(model_type))
    return read_layers(config, "BF16", is_moe(config, layer_count(config)))


def kinds(model_type: str, **changes: Any) -> str:
    letters = {"full": "F", "sliding": "S", "chunked": "C", "mamba": "M", "mla": "L", "none": "-"}
    return "".join(letters[layer.kind] for layer in layers(model_type, **changes))


@pytest.mark.parametrize(
    ("model_type", "changes", "expected"),
    [
        ("llama", {}, "FFFF"),
        ("mistral", {"sliding_window": 128}, "SSSS"),
        ("mistral", {"sliding_window": 0}, "FFFF"),
        ("gemma2", {"sliding_window": 128}, "SFSF"),
        ("gemma3_text", {"sliding_window": 128, "sliding_window_pattern": 2}, "SFSF"),
        ("exaone4", {"sliding_window": 128, "sliding_window_pattern": "LLLG"}, "SSSF"),
        ("llama4_text", {"attention_chunk_size": 64, "no_rope_layers": [1, 0, 1, 1]}, "CFCC"),
        ("llama4_text", {}, "CCCF"),
        ("qwen2", {"sliding_window": 128, "use_sliding_window": True, "max_window_layers": 3}, "FFFS"),
        ("qwen2", {"sliding_window": 128, "use_sliding_window": False}, "FFFF"),
        ("llama", {"sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"] * 2}, "SFSF"),
        ("llama", {"sliding_window": 128, "full_attention_layers": [0]}, "FSSS"),
        ("gemma3n_text", {"sliding_window": 128, "num_kv_shared_layers": 2, "sliding_window_pattern": 2}, "SF--"),
        ("granitemoehybrid", {**STATE, "layer_types": ["mamba", "attention", "mamba", "mamba"]}, "MFMM"),
        ("zamba2", {**STATE, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]}, "MFMF"),
        ("nemotron_h", {**STATE, "hybrid_override_pattern": "M-*E"}, "M-F-"),
        ("nemotron_h", {**STATE, "num_hidden_layers": None, "layers_block_type": ["mamba", "mlp", "attention"]}, "M-F"),
        ("lfm2", {"full_attn_idxs": [1, 3], "conv_L_cache": 3}, "MFMF"),
        ("jamba", {"attn_layer_period": 2, "attn_layer_offset": 1}, "MFMF"),
        ("kimi_linear", {"linear_attn_config": {"num_heads": 4, "head_dim": 16, "kda_layers": [1, 2, 3]},
                         "kv_lora_rank": 32, "qk_rope_head_dim": 16}, "MMML"),
        ("mamba", {"num_attention_heads": None, "num_key_value_heads": None}, "MMMM"),
        ("bert", {}, "----"),
        ("modernbert", {"sliding_window": 128}, "----"),
        ("llama", {"is_causal": False}, "----"),
        ("llama", {"is_causal": True}, "FFFF"),
        ("llama", {"architectures": ["LlamaBidirectionalModel"]}, "----"),
        ("gemma3_text", {"sliding_window": 128, "use_bidirectional_attention": True}, "----"),
    ],
)  # fmt: skip
def test_the_kind_of_each_layer(model_type: str, changes: dict[str, Any], expected: str) -> None:
    assert kinds(model_type, **changes) == expected


@pytest.mark.parametrize(
    ("model_type", "changes", "shapes", "dtypes"),
    [
        ("granitemoehybrid", {**STATE, "layer_types": ["mamba"] * 4}, ((3, 192), (8, 16, 16)), ("BF16", "BF16")),
        ("granitemoehybrid", {**STATE, "mamba_d_head": "auto", "layer_types": ["mamba"] * 4}, ((3, 192), (8, 16, 16)),
         ("BF16", "BF16")),
        ("nemotron_h", {"mamba_num_heads": 8, "mamba_head_dim": 32, "ssm_state_size": 16, "n_groups": 1, "conv_kernel": 4,
                        "hybrid_override_pattern": "MMMM"}, ((3, 288), (8, 32, 16)), ("BF16", "F32")),
        ("kimi_linear", {"linear_attn_config": {"num_heads": 4, "head_dim": 16, "kda_layers": [1]}},
         ((3, 192), (4, 16, 16)), ("BF16", "F32")),
        ("lfm2", {"full_attn_idxs": [], "conv_L_cache": 3}, ((2, 64),), ("BF16",)),
        ("mamba", {"intermediate_size": 128, "state_size": 16}, ((3, 128), (128, 16)), ("BF16", "BF16")),
        ("qwen3_next", {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
                        "linear_value_head_dim": 16}, ((3, 96), (4, 16, 8)), ("BF16", "BF16")),
        ("qwen3_5_text", {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
                          "linear_value_head_dim": 16, "mamba_ssm_dtype": "float32"}, ((3, 96), (4, 16, 8)), ("BF16", "F32")),
    ],
)  # fmt: skip
def test_the_state_of_a_recurrent_layer(
    model_type: str, changes: dict[str, Any], shapes: tuple[tuple[int, ...], ...], dtypes: tuple[str, ...]
) -> None:
    layer = layers(model_type, **changes)[0]
    assert (layer.state_shapes, layer.state_dtypes) == (shapes, dtypes)


@pytest.mark.parametrize(
    ("model_type", "changes", "heads"),
    [
        ("llama", {}, 2),
        ("llama", {"num_key_value_heads": None}, 4),
        ("falcon", {}, 1),
        ("falcon", {"multi_query": False}, 4),
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, 2),
        ("gpt_bigcode", {}, 1),
        ("chatglm", {"multi_query_attention": True, "multi_query_group_num": 1, "num_key_value_heads": None}, 1),
        ("chatglm", {"multi_query_group_num": 1, "num_key_value_heads": None}, 4),
    ],
)
def test_key_value_heads(model_type: str, changes: dict[str, Any], heads: int) -> None:
    assert kv_heads(Config({**BASE, "model_type": model_type, **changes}, "config.json")) == heads


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [False] * 4),
        ({"num_experts": 0}, [False] * 4),
        ({"num_experts": 8}, [True] * 4),
        ({"num_experts": [8, 8]}, [True] * 4),
        ({"num_experts": 8, "decoder_sparse_step": 2}, [False, True, False, True]),
        ({"num_experts": 8, "mlp_only_layers": [0, 1]}, [False, False, True, True]),
        ({"n_routed_experts": 8, "first_k_dense_replace": 3}, [False, False, False, True]),
        ({"n_routed_experts": 8, "moe_layer_freq": [0, 1, 1]}, [False, True, True, True]),
        ({"n_routed_experts": 8, "mlp_layer_types": ["dense", "sparse"]}, [False, True, True, True]),
        ({"n_routed_experts": 8, "hybrid_override_pattern": "M-E*"}, [False, False, True, False]),
    ],
)
def test_which_layers_have_experts(changes: dict[str, Any], expected: list[bool]) -> None:
    assert is_moe(Config({**BASE, "model_type": "x", **changes}, "config.json"), 4) == expected


def test_a_layer_list_that_is_too_short_is_refused() -> None:
    with pytest.raises(UsageError, match=r"layer_types'?: has 1 entries for 4 layers"):
        layers("llama", layer_types=["full_attention"])


LATENT = {"kv_lora_rank": 32, "qk_rope_head_dim": 16, "index_topk": 64, "index_head_dim": 128}


@pytest.mark.parametrize(
    ("changes", "has_index"),
    [
        ({}, "1111"),
        ({"index_topk": None}, "0000"),
        ({"index_topk_freq": 2}, "1101"),  # every other layer, from the second on
        ({"index_topk_freq": 3, "index_skip_topk_offset": 0}, "0010"),
        ({"index_topk_pattern": "FSSF"}, "1001"),
        ({"index_topk_pattern": "FS"}, "1011"),
    ],
)
def test_sparse_attention_layers_with_an_indexer_have_an_index_cache(changes: dict[str, Any], has_index: str) -> None:
    """Source of the rule: deepseek_v2.py:DeepseekV2MLAAttention, ``_skip_topk``."""
    model_layers = layers("deepseek_v32", **{**LATENT, **changes})
    assert [layer.index_bytes for layer in model_layers] == [132 * int(digit) for digit in has_index]
