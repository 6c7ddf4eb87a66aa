"""The tensors derived from config.json, and the tensors of a linear layer in each quantisation."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from vllm_launch.engine.removed import REMOVED_METHODS
from vllm_launch.model.build import build
from vllm_launch.model.checkpoint import Checkpoint
from vllm_launch.model.dtypes import STORED_BITS
from vllm_launch.model.model import Model, Quantization, Tensor
from vllm_launch.model.quantization import MIN_CAPABILITY, quantized_tensors
from vllm_launch.model.schemes import Schemes

SMALL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_size": 256,
    "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 320, "max_position_embeddings": 128, "tie_word_embeddings": False,
}  # fmt: skip
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


def build_model(**changes: Any) -> Model:
    return build("m", Checkpoint(None, {"config.json": {**SMALL, **changes}}, None, ()), {})


def shapes(model: Model) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tensor.shape for tensor in model.tensors}


def linear_layer(method: str, **changes: Any) -> list[Tensor]:
    return list(quantized_tensors("l", 512, 256, "BF16", Quantization(method=method, **{"bits": 8, **changes})))


def test_a_llama_layer_has_seven_matrices_and_two_norms() -> None:
    assert shapes(build_model(num_hidden_layers=1)) == {
        "model.embed_tokens.weight": (320, 256),
        "model.layers.0.input_layernorm.weight": (256,),
        "model.layers.0.post_attention_layernorm.weight": (256,),
        "model.layers.0.self_attn.q_proj.weight": (256, 256),
        "model.layers.0.self_attn.k_proj.weight": (128, 256),
        "model.layers.0.self_attn.v_proj.weight": (128, 256),
        "model.layers.0.self_attn.o_proj.weight": (256, 256),
        "model.layers.0.mlp.gate_proj.weight": (512, 256),
        "model.layers.0.mlp.up_proj.weight": (512, 256),
        "model.layers.0.mlp.down_proj.weight": (256, 512),
        "model.norm.weight": (256,),
        "lm_head.weight": (320, 256),
    }


def test_tied_embeddings_are_stored_once() -> None:
    assert "lm_head.weight" not in shapes(build_model(tie_word_embeddings=True))


def test_dense_layers_of_a_moe_model_have_a_plain_feed_forward() -> None:
    names = shapes(
        build_model(architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", mlp_only_layers=[0], **MOE)
    )
    assert names["model.layers.0.mlp.gate_proj.weight"] == (512, 256)
    assert names["model.layers.1.mlp.experts.3.down_proj.weight"] == (256, 64)
    assert "model.layers.1.mlp.gate_proj.weight" not in names


def test_routers_and_the_head_stay_unquantised() -> None:
    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    model = build_model(
        architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", quantization_config=config, **MOE
    )
    dtypes = {tensor.name: tensor.dtype for tensor in model.tensors}
    assert dtypes["model.layers.0.mlp.gate.weight"] == "BF16"
    assert dtypes["lm_head.weight"] == "BF16"
    assert dtypes["model.layers.0.mlp.experts.0.up_proj.weight"] == "F8_E4M3"


def test_a_vision_tower_has_its_own_tensors() -> None:
    text = {key: SMALL[key] for key in SMALL.keys() - {"architectures", "dtype"}}
    model = build("m", Checkpoint(None, {"config.json": {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "dtype": "bfloat16", "text_config": text,
        "vision_config": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "patch_size": 14},
    }}, None, ()), {})  # fmt: skip
    assert model.multimodal
    assert shapes(model)["vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"] == (128, 64)
    # LLaVA takes the output of the last layer but one, so vLLM builds one layer less (vision_feature_layer -2).
    assert "vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight" not in shapes(model)
    assert shapes(model)["multi_modal_projector.linear_1.weight"] == (256, 64)
    assert shapes(model)["language_model.model.layers.1.mlp.up_proj.weight"] == (512, 256)


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        (linear_layer("awq", bits=4, group_size=128), 256 * 64 * 4 + 2 * 64 * 4 + 2 * 512 * 2),
        (linear_layer("gptq", bits=4, group_size=128), 32 * 512 * 4 + 2 * 64 * 4 + 2 * 512 * 2 + 256 * 4),
        (linear_layer("gptq", bits=8, group_size=None), 64 * 512 * 4 + 128 * 4 + 512 * 2 + 256 * 4),
        (linear_layer("inc", bits=4, group_size=128), 32 * 512 * 4 + 2 * 64 * 4 + 2 * 512 * 2),
        (linear_layer("fp8", block_shape=(128, 128)), 512 * 256 + 4 * 2 * 4),
        (linear_layer("fp8"), 512 * 256 + 4 + 4),
        (linear_layer("modelopt"), 512 * 256 + 4 + 4),
        (linear_layer("modelopt_fp4", bits=4), 512 * 128 + 512 * 16 + 4 + 4),
        (linear_layer("modelopt_mxfp8"), 512 * 256 + 512 * 8),
        (linear_layer("fbgemm_fp8"), 512 * 256 + 512 * 2),
        (linear_layer("experts_int8"), 512 * 256 * 2),
        (linear_layer("compressed-tensors", format="float-quantized"), 512 * 256 + 512 * 2),
        (linear_layer("compressed-tensors", format="int-quantized"), 512 * 256 + 512 * 2),
        (
            linear_layer("compressed-tensors", bits=4, group_size=128, format="pack-quantized"),
            512 * 32 * 4 + 512 * 2 * 2 + 16,
        ),
        (linear_layer("compressed-tensors", bits=4, format="nvfp4-pack-quantized"), 512 * 128 + 512 * 16 + 4 + 4),
    ],
    ids=lambda value: value[0].name + "-" + value[0].dtype if isinstance(value, list) else None,
)
def test_a_linear_layer_has_the_bytes_of_its_quantization(tensors: list[Tensor], expected: int) -> None:
    assert sum(math.prod(tensor.shape) * STORED_BITS[tensor.dtype] // 8 for tensor in tensors) == expected


def test_gpt_oss_in_bfloat16_stacks_its_experts() -> None:
    model = build_model(
        architectures=["GptOssForCausalLM"], model_type="gpt_oss", num_local_experts=4, num_experts_per_tok=2
    )
    assert shapes(model)["model.layers.0.mlp.experts.gate_up_proj"] == (4, 256, 1024)


@pytest.mark.parametrize(
    ("pattern", "name", "ignored"),
    [
        ("lm_head", "lm_head", True),
        ("model.layers.1", "model.layers.1.mlp.up_proj", True),
        ("model.layers.1", "model.layers.10.mlp.up_proj", False),
        ("gate", "model.layers.0.mlp.gate", True),
        ("gate", "model.layers.0.mlp.gate_proj", False),
        ("model.layers.*.self_attn", "model.layers.7.self_attn.q_proj", True),
        ("re:.*self_attn.*", "model.layers.7.self_attn.q_proj", True),
        ("re:(", "anything", False),
    ],
)
def test_ignored_patterns_are_names_parts_globs_or_regexes(pattern: str, name: str, ignored: bool) -> None:  # noqa: FBT001
    assert (Schemes(Quantization(method="fp8", bits=8, ignored=(pattern,))).of(name) is None) is ignored


def test_a_method_has_either_a_compute_capability_or_a_replacement() -> None:
    assert MIN_CAPABILITY["fp8"] == (7, 5)
    assert MIN_CAPABILITY["mxfp4"] == (8, 0)
    assert "squeezellm" not in MIN_CAPABILITY
    assert not MIN_CAPABILITY.keys() & REMOVED_METHODS.keys()


SAVED = json.loads((Path(__file__).parents[2] / "data" / "saved-by-transformers.json").read_text())


@pytest.mark.parametrize("family", SAVED)
def test_tensors_equal_those_that_transformers_saved(family: str) -> None:
    model = build("m", Checkpoint(None, {"config.json": SAVED[family]["config"]}, None, ()), {})
    assert sorted(f"{tensor.name} {list(tensor.shape)}" for tensor in model.tensors) == SAVED[family]["tensors"]


def test_nemotron_h_experts_have_a_latent_projection() -> None:
    model = build_model(
        architectures=["NemotronHForCausalLM"], model_type="nemotron_h", hybrid_override_pattern="ME", n_routed_experts=2,
        num_experts_per_tok=1, moe_intermediate_size=64, moe_shared_expert_intermediate_size=96, moe_latent_size=32,
        mamba_num_heads=8, mamba_head_dim=32, ssm_state_size=16, n_groups=1, conv_kernel=4,
    )  # fmt: skip
    names = shapes(model)
    assert names["backbone.layers.1.mixer.experts.1.up_proj.weight"] == (64, 32)
    assert names["backbone.layers.1.mixer.shared_experts.down_proj.weight"] == (256, 96)
    assert names["backbone.layers.1.mixer.fc1_latent_proj.weight"] == (32, 256)
    assert names["backbone.layers.0.mixer.in_proj.weight"] == (256 + 256 + 32 + 8, 256)


def test_sparse_attention_has_an_indexer() -> None:
    model = build_model(
        architectures=["DeepseekV32ForCausalLM"], model_type="deepseek_v32", kv_lora_rank=64, q_lora_rank=32,
        qk_rope_head_dim=16, qk_nope_head_dim=32, v_head_dim=32, index_n_heads=4, index_head_dim=16,
    )  # fmt: skip
    assert shapes(model)["model.layers.0.self_attn.indexer.wq_b.weight"] == (64, 32)
