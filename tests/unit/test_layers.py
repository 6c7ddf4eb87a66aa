"""What a layer keeps: heads, windows and recurrent states, from config.json's many ways to say it."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_launch.config import Config
from vllm_launch.errors import UsageError
from vllm_launch.layers import attention_heads, head_dim, kv_heads, read_layers, read_mla, sliding_window
from vllm_launch.model import Layer

BASE: dict[str, Any] = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2}


def config(model_type: str = "llama", **keys: Any) -> Config:
    return Config({"model_type": model_type, **BASE, **keys}, "config.json")


def layers(count: int, model_type: str = "llama", **keys: Any) -> tuple[Layer, ...]:
    return read_layers(config(model_type, **keys), "BF16", [False] * count)


def kinds(count: int, model_type: str = "llama", **keys: Any) -> str:
    """One letter a layer: Full, Sliding, Chunked, Mamba, mLa, None."""
    letters = {"full": "F", "sliding": "S", "chunked": "C", "mamba": "M", "mla": "L", "none": "N"}
    return "".join(letters[layer.kind] for layer in layers(count, model_type, **keys))


def test_a_plain_layer_keeps_keys_and_values_of_its_groups() -> None:
    assert layers(1) == (Layer(kind="full", kv_heads=2, head_dim=64, head_dim_v=64),)


@pytest.mark.parametrize(
    ("model_type", "keys", "heads"),
    [
        ("llama", {"num_key_value_heads": None}, 8),
        ("falcon", {"multi_query": True}, 1),
        ("falcon", {"multi_query": False}, 8),
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 4}, 4),
        ("gpt_bigcode", {"multi_query": True}, 1),
        ("chatglm", {"multi_query_group_num": 4, "num_key_value_heads": None}, 4),
    ],
)
def test_kv_heads_under_each_familys_name(model_type: str, keys: dict[str, Any], heads: int) -> None:
    assert kv_heads(config(model_type, **keys)) == heads


def test_head_dim_is_stated_or_follows_and_must_divide() -> None:
    assert head_dim(config()) == 64
    assert head_dim(config(head_dim=128)) == 128
    with pytest.raises(UsageError, match="does not divide"):
        head_dim(config(hidden_size=500, num_attention_heads=7))


def test_mamba_2_has_no_attention_heads_though_it_names_heads() -> None:
    assert attention_heads(config("mamba2", num_attention_heads=None, num_heads=16)) == 0


@pytest.mark.parametrize(
    ("pattern", "count", "model_type", "keys"),
    [
        ("SSSS", 4, "mistral", {"sliding_window": 64}),
        ("FFFF", 4, "mistral", {"sliding_window": None}),
        ("FFFF", 4, "qwen2", {"sliding_window": 64, "use_sliding_window": False, "max_window_layers": 2}),
        ("FFSS", 4, "qwen2", {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 2}),
        ("SFSF", 4, "gemma2", {"sliding_window": 64}),
        ("SSSSSFSS", 8, "gemma3_text", {"sliding_window": 64}),
        ("SSFSSF", 6, "gemma3_text", {"sliding_window": 64, "sliding_window_pattern": 3}),
        ("SSSF", 4, "cohere2", {"sliding_window": 64}),
        ("SFSF", 4, "gpt_oss", {"sliding_window": 64}),
        ("CCCF", 4, "llama4_text", {"attention_chunk_size": 64}),
        ("CFCF", 4, "llama4_text", {"attention_chunk_size": 64, "no_rope_layers": [1, 0, 1, 0]}),
        ("FS", 2, "llama", {"sliding_window": 64, "layer_types": ["full_attention", "sliding_attention"]}),
        ("FF", 2, "llama", {"layer_types": ["full_attention", "sliding_attention"]}),  # no window to slide in
        ("LL", 2, "deepseek_v2", {"kv_lora_rank": 32, "qk_rope_head_dim": 8}),
        ("FF", 2, "llama", {"kv_lora_rank": 32}),  # vLLM gives latent attention to certain types alone
        ("MNFM", 4, "nemotron_h", {"hybrid_override_pattern": "M-*M", "mamba_num_heads": 4, "mamba_head_dim": 8}),
        ("FMMF", 4, "jamba", {"attn_layer_period": 3, "attn_layer_offset": 0}),
        ("MF", 2, "lfm2", {"full_attn_idxs": [1], "conv_dim": 512}),
    ],
)
def test_each_layer_is_of_its_kind(pattern: str, count: int, model_type: str, keys: dict[str, Any]) -> None:
    assert kinds(count, model_type, **keys) == pattern


def test_a_window_is_in_tokens_and_zero_is_none() -> None:
    assert layers(1, "mistral", sliding_window=64)[0].window == 64
    assert sliding_window(config("mistral", sliding_window=0)) is None


def test_latent_attention_keeps_one_vector_a_token() -> None:
    sizes = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
    layer = layers(1, "deepseek_v3", **sizes)[0]
    assert (layer.kind, layer.kv_heads, layer.head_dim) == ("mla", 1, 576)
    mla = read_mla(config("deepseek_v3", **sizes))
    assert mla is not None
    assert (mla.q_lora_rank, mla.v_head_dim) == (None, 128)


def test_recurrent_states_are_whole_before_tensor_parallelism() -> None:
    delta = {
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 16,
        "linear_conv_kernel_dim": 4, "layer_types": ["linear_attention"],
    }  # fmt: skip
    assert layers(1, "qwen3_next", **delta)[0].state_shapes == ((3, 2 * 8 * 2 + 16 * 4), (4, 16, 8))
    assert layers(1, "jamba", attn_layer_offset=1)[0].state_shapes == ((3, 1024), (1024, 16))
    mamba2 = {"mamba_n_heads": 16, "mamba_d_head": "auto", "mamba_d_state": 32, "mamba_n_groups": 2}
    layer = layers(1, "granitemoehybrid", layer_types=["mamba"], **mamba2)[0]
    assert layer.state_shapes == ((3, 1024 + 2 * 2 * 32), (16, 64, 32))
    assert layers(1, "lfm2", conv_dim=512, conv_L_cache=3, layer_types=["conv"])[0].state_shapes == ((2, 512),)


def test_nemotron_h_keeps_its_state_in_float32() -> None:
    keys = {
        "hybrid_override_pattern": "M",
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "ssm_state_size": 16,
        "n_groups": 2,
    }
    layer = layers(1, "nemotron_h", **keys)[0]
    assert (layer.state_shapes, layer.state_dtypes) == (((3, 32 + 2 * 2 * 16), (4, 8, 16)), ("BF16", "F32"))


def test_a_layer_may_hold_attention_beside_its_state() -> None:
    layer = layers(1, "falcon_h1", mamba_n_heads=16, mamba_d_head=32, mamba_d_ssm=512, mamba_d_state=16)[0]
    assert (layer.kind, layer.kv_heads, layer.state_shapes[1]) == ("full", 2, (16, 32, 16))


def test_layers_that_share_anothers_cache_keep_none() -> None:
    assert kinds(5, "gemma3n_text", sliding_window=64, num_kv_shared_layers=2).endswith("NN")


def test_too_few_layer_types_name_the_key() -> None:
    with pytest.raises(UsageError, match="layer_types"):
        layers(3, layer_types=["full_attention"])
