"""Tests of which modules of a checkpoint are quantised, and how."""

from __future__ import annotations

import pytest

from vllm_launch.model.model import Quantization
from vllm_launch.model.schemes import Schemes

FP8 = Quantization(method="modelopt", bits=8)
NVFP4 = Quantization(method="modelopt_fp4", bits=4, group_size=16)


def test_without_quantization_no_module_has_a_scheme() -> None:
    assert Schemes(None).of("model.layers.0.mlp.up_proj") is None


@pytest.mark.parametrize(
    "pattern", ["model.language_model.layers.0.self_attn*", "language_model.model.layers.0.self_attn"]
)
@pytest.mark.parametrize("outer", ["model.", "language_model.model.", "model.language_model."])
def test_outer_modules_can_be_nested_in_any_order(pattern: str, outer: str) -> None:
    schemes = Schemes(Quantization(method="modelopt_fp4", bits=4, ignored=(pattern,)))
    assert schemes.of(f"{outer}layers.0.self_attn.q_proj") is None
    assert schemes.of(f"{outer}layers.1.self_attn.q_proj") is not None
    assert schemes.of(f"{outer}layers.0.mlp.up_proj") is not None


def test_modules_with_a_scheme_of_their_own() -> None:
    own = ((("model.layers.0.mlp.up_proj", "lm_head"), NVFP4), (("model.layers.0.self_attn",), FP8))
    schemes = Schemes(Quantization(method="modelopt_mixed", bits=4, own_schemes=own, all_linear=False))
    assert schemes.of("model.layers.0.mlp.up_proj") is NVFP4
    assert schemes.of("model.layers.0.self_attn.q_proj") is FP8
    assert schemes.of("model.layers.1.mlp.up_proj") is None
    assert schemes.own("lm_head") is NVFP4


def test_a_group_for_named_modules_comes_before_the_group_of_all_linear_layers() -> None:
    quantization = Quantization(method="compressed-tensors", bits=4, own_schemes=((("re:.*self_attn.*",), FP8),))
    schemes = Schemes(quantization)
    assert schemes.of("model.layers.0.self_attn.q_proj") is FP8
    assert schemes.of("model.layers.0.mlp.up_proj") is quantization
    assert schemes.own("model.layers.0.mlp.up_proj") is None
