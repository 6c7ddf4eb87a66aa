"""Quantisation: methods, replacements of removed methods, and the tensors of one linear layer."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_launch.engine.removed import REMOVED_METHODS
from vllm_launch.errors import UsageError
from vllm_launch.model.dtypes import STORED_BITS
from vllm_launch.model.model import Quantization
from vllm_launch.model.quantization import (
    DEPRECATED,
    MIN_CAPABILITY,
    quantized_tensors,
    read_quantization,
)
from vllm_launch.model.schemes import Schemes


def read(hf_quant: Any = None, **section: Any) -> Quantization:
    quantization = read_quantization({"quantization_config": section} if section else {}, hf_quant, "config.json")
    assert quantization is not None
    return quantization


def shapes(quantization: Quantization, rows: int = 256, columns: int = 512) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {
        tensor.name: (tensor.dtype, tensor.shape)
        for tensor in quantized_tensors("w", rows, columns, "BF16", quantization)
    }


def test_a_plain_checkpoint_has_no_quantization() -> None:
    assert read_quantization({}, None, "config.json") is None
    assert read_quantization({"quantization_config": {}}, None, "config.json") is None


@pytest.mark.parametrize(
    ("section", "method", "bits", "group"),
    [
        ({"quant_method": "awq", "bits": 4, "group_size": 64}, "awq", 4, 64),
        ({"quant_method": "AWQ", "w_bit": 4, "q_group_size": 128}, "awq", 4, 128),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, "gptq", 8, None),
        ({"quant_method": "auto-round", "bits": 4}, "inc", 4, 128),
        ({"quant_method": "mxfp4"}, "mxfp4", 4, 32),
        ({"quant_method": "fp8"}, "fp8", 8, None),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt_fp4", 4, 16),
        ({"quantization": {"quant_algo": "FP8"}, "producer": {"name": "modelopt"}}, "modelopt", 8, None),
        ({"quant_method": "compressed_tensors", "format": "x"}, "compressed-tensors", 8, None),
    ],
)
def test_method_bits_and_group_are_read(section: dict[str, Any], method: str, bits: int, group: int | None) -> None:
    quantization = read(**section)
    assert (quantization.method, quantization.bits, quantization.group_size) == (method, bits, group)


def test_a_group_for_a_module_without_outer_modules_is_not_that_of_all_linear_layers() -> None:
    groups = {"group_0": {"targets": ["lm_head"], "weights": {"num_bits": 8}}}
    quantization = read(quant_method="compressed-tensors", config_groups=groups)
    assert not quantization.all_linear
    assert [targets for targets, _ in quantization.own_schemes] == [("lm_head",)]


def test_compressed_tensors_reads_its_first_group() -> None:
    weights = {"num_bits": 4, "group_size": 64}
    quantization = read(
        quant_method="compressed-tensors",
        config_groups={"group_0": {"weights": weights, "format": "pack-quantized"}},
        ignore=["lm_head", "re:.*router"],
        kv_cache_scheme={"num_bits": 8, "type": "float"},
    )
    assert (quantization.bits, quantization.group_size, quantization.format, quantization.kv_cache_dtype) == (
        4,
        64,
        "pack-quantized",
        "fp8",
    )
    assert quantization.ignored == ("lm_head", "re:.*router")


def test_the_section_is_read_from_a_nested_text_config() -> None:
    raw = {"text_config": {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 64]}}}
    quantization = read_quantization(raw, None, "config.json")
    assert quantization is not None
    assert quantization.block_shape == (128, 64)


@pytest.mark.parametrize(
    ("cache_settings", "dtype"),
    [
        ({"kv_cache_quant_algo": "FP8"}, "fp8"),
        ({"kv_cache_quant_algo": "NVFP4"}, "nvfp4"),
        ({"kv_cache_quant_algo": "INT3"}, None),
        ({"kv_cache_scheme": {"type": "float", "num_bits": 8, "dynamic": False}}, "fp8"),
        ({"kv_cache_scheme": {"type": "float", "num_bits": 8, "dynamic": True}}, None),
        ({"kv_cache_scheme": {"type": "float", "num_bits": 4}}, "nvfp4"),
        ({"kv_cache_scheme": {"type": "int", "num_bits": 8, "dynamic": False}}, None),
        ({}, None),
    ],
)
def test_model_optimizer_checkpoints_set_the_cache_dtype(cache_settings: dict[str, Any], dtype: str | None) -> None:
    quantization = {"quant_algo": "FP8", **cache_settings}
    assert read(hf_quant={"producer": {"name": "modelopt"}, "quantization": quantization}).kv_cache_dtype == dtype


@pytest.mark.parametrize("section", [{"quant_algo": "FP8"}, {"quantization": {"quant_algo": "FP8"}}])
def test_a_section_without_a_method_is_not_quantized_as_in_vllm(section: dict[str, Any]) -> None:
    assert read_quantization({"quantization_config": section}, None, "config.json") is None


def test_only_model_optimizer_checkpoints_set_the_cache_dtype() -> None:
    assert read(quant_method="fp8", kv_cache_quant_algo="FP8").kv_cache_dtype is None


@pytest.mark.parametrize("method", sorted(REMOVED_METHODS))
def test_a_removed_method_names_its_replacement(method: str) -> None:
    with pytest.raises(UsageError) as error:
        read(quant_method=method.upper())
    assert method in str(error.value)
    assert error.value.remedy.startswith("use ")


@pytest.mark.parametrize(
    ("section", "feature"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True}, "desc_act"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": False}, "sym"),
        ({"quant_method": "gptq", "bits": 3}, "3 bits"),
        ({"quant_method": "auto_gptq", "bits": 2}, "2 bits"),
        ({"quant_method": "awq", "bits": 8}, "8 bits"),
    ],
)
def test_awq_and_gptq_features_without_a_kernel_are_refused(section: dict[str, Any], feature: str) -> None:
    """Without this check, vLLM's auto_gptq.py and auto_awq.py raise a ValueError during the engine's start."""
    with pytest.raises(UsageError) as error:
        read(**section)
    assert feature in error.value.problem
    assert error.value.remedy.startswith("use ")


def test_desc_act_is_ignored_with_one_group_for_all_inputs() -> None:
    assert read(quant_method="gptq", bits=8, group_size=-1, desc_act=True, sym=True).group_size is None
    assert read(quant_method="auto-round", bits=2, sym=False, desc_act=True).bits == 2


def test_no_method_is_both_removed_and_known() -> None:
    assert not REMOVED_METHODS.keys() & MIN_CAPABILITY.keys()
    assert MIN_CAPABILITY.keys() >= DEPRECATED


def test_known_methods_have_vllms_capability_and_unknown_ones_none() -> None:
    assert MIN_CAPABILITY["awq"] == (7, 5)
    assert MIN_CAPABILITY["mxfp4"] == (8, 0)
    assert "magic" not in MIN_CAPABILITY


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ({"quant_method": 7}, "quant_method"),
        ({"quant_method": "magic"}, "magic"),
        ({"quant_method": "gptq", "bits": 5}, "bits"),
        ({"quant_method": "gptq", "bits": "4"}, "bits"),
        ({"quant_method": "awq", "group_size": 0}, "group_size"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size"),
        ({"quant_method": "fp8", "weight_block_size": [128, 0]}, "weight_block_size"),
        ({"quant_method": "fp8", "ignored_layers": "lm_head"}, "ignored_layers"),
        ({"quant_method": "modelopt", "quant_algo": "FP3"}, "FP3"),
        ({"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "MIXED_PRECISION"}}, "MIXED_PRECISION"),
        ({"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"group_size": []}}}}, "group_size"),
    ],
)
def test_a_wrong_value_gives_one_line_that_names_its_key(section: dict[str, Any], key: str) -> None:
    with pytest.raises(UsageError) as error:
        read(**section)
    assert key in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("section", [3, "awq", ["awq"]])
def test_a_section_that_is_no_object_is_an_error(section: object) -> None:
    with pytest.raises(UsageError, match="quantization_config"):
        read_quantization({"quantization_config": section}, None, "config.json")


@pytest.mark.parametrize(
    ("pattern", "name", "ignored"),
    [
        ("lm_head", "lm_head", True),
        ("lm_head", "model.lm_head2", False),
        ("model.layers.0", "model.layers.0.mlp.up_proj", True),
        ("model.layers.1", "model.layers.10.mlp.up_proj", False),
        ("router", "model.layers.3.mlp.router", True),
        ("model.layers.*.self_attn", "model.layers.7.self_attn.q_proj", True),
        ("model.layers.*.self_attn", "model.layers.7.mlp.up_proj", False),
        ("re:.*gate$", "model.layers.0.mlp.gate", True),
        ("re:.*gate$", "model.layers.0.mlp.gate_proj", False),
        ("re:(", "model", False),
    ],
)
def test_modules_that_match_a_pattern_are_not_quantized(pattern: str, name: str, ignored: object) -> None:
    assert (Schemes(Quantization(method="fp8", bits=8, ignored=(pattern,))).of(name) is None) is ignored


def test_awq_packs_outputs_and_gptq_inputs() -> None:
    awq = shapes(Quantization(method="awq", bits=4, group_size=128))
    assert awq == {
        "w.qweight": ("I32", (512, 32)),
        "w.qzeros": ("I32", (4, 32)),
        "w.scales": ("F16", (4, 256)),
    }
    gptq = shapes(Quantization(method="gptq", bits=4, group_size=128))
    assert gptq == {
        "w.qweight": ("I32", (64, 256)),
        "w.qzeros": ("I32", (4, 32)),
        "w.scales": ("F16", (4, 256)),
        "w.g_idx": ("I32", (512,)),
    }


def test_block_fp8_rounds_blocks_up() -> None:
    tensors = shapes(Quantization(method="fp8", bits=8, block_shape=(128, 128)), rows=130, columns=260)
    assert tensors == {"w.weight": ("F8_E4M3", (130, 260)), "w.weight_scale_inv": ("F32", (2, 3))}


def test_packed_compressed_tensors_keep_a_scale_for_each_group() -> None:
    tensors = shapes(Quantization(method="compressed-tensors", bits=4, group_size=128, format="pack-quantized"))
    assert tensors == {
        "w.weight_packed": ("I32", (256, 64)),
        "w.weight_scale": ("BF16", (256, 4)),
        "w.weight_shape": ("I64", (2,)),
    }


def test_nvfp4_keeps_a_scale_byte_for_sixteen_values() -> None:
    tensors = shapes(Quantization(method="modelopt_fp4", bits=4, group_size=16))
    assert tensors["w.weight"] == ("U8", (256, 256))
    assert tensors["w.weight_scale"] == ("F8_E4M3", (256, 32))


def test_int8_is_stored_as_int8() -> None:
    assert shapes(Quantization(method="compressed-tensors", bits=8, format="int-quantized"))["w.weight"][0] == "I8"


@pytest.mark.parametrize("method", sorted(MIN_CAPABILITY))
def test_every_method_stores_at_least_its_bits_and_at_most_the_unquantized_size(method: str) -> None:
    bits = read(quant_method=method).bits if method != "compressed-tensors" else 8
    quantization = read(quant_method=method)
    size = sum(math.prod(shape) * STORED_BITS[dtype] for dtype, shape in shapes(quantization).values())
    assert bits * 256 * 512 <= size <= 16 * 256 * 512 * 1.01


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
KEYS = [
    "quant_method", "bits", "group_size", "weight_block_size", "ignore", "config_groups", "kv_cache_scheme", "format",
    "quant_algo", "quantization", "kv_cache_quant_algo", "modules_to_not_convert", "producer",
]  # fmt: skip
GROUPS = st.fixed_dictionaries({"g": st.fixed_dictionaries({"weights": st.dictionaries(
    st.sampled_from(["num_bits", "group_size", "block_structure", "strategy"]), VALUES)})})  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(sorted(MIN_CAPABILITY)),
    st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=5),
    st.none() | GROUPS,
    VALUES,
)
def test_any_section_gives_a_quantization_or_one_line(method: str, section: Any, groups: Any, hf_quant: Any) -> None:
    section = {"quant_method": method, **section, **({"config_groups": groups} if groups else {})}
    try:
        read_quantization({"quantization_config": section}, hf_quant, "config.json")
    except UsageError as error:
        text = str(error)
    else:
        return
    assert "\n" not in text
