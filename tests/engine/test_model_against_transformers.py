"""Compares the tensors that we derive from config.json with those that transformers saves: names and shapes, by family.

``python tests/engine/test_model_against_transformers.py`` writes the saved tensors to
tests/data/saved-by-transformers.json. The unit tests read this file, because they run without transformers.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch  # noqa: TID251 - tests of the engine may import it
import transformers

from vllm_launch.model.read import read_model

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 320, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MOE: dict[str, Any] = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
MLA: dict[str, Any] = {
    "kv_lora_rank": 32, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "n_routed_experts": 4, "n_shared_experts": 2, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    "num_key_value_heads": 4, "head_dim": 8,
}  # fmt: skip
MAMBA2: dict[str, Any] = {
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_d_conv": 4, "mamba_expand": 2,
}  # fmt: skip
DELTA: dict[str, Any] = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
}  # fmt: skip

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {"head_dim": 32}),
    "ministral": ("ministral", {"head_dim": 32}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "gemma": ("gemma", {"head_dim": 32}),
    "gemma2": ("gemma2", {"head_dim": 32}),
    "gemma3_text": ("gemma3_text", {"head_dim": 32}),
    "phi": ("phi", {}),
    "phi3": ("phi3", {}),
    "granite": ("granite", {}),
    "olmo": ("olmo", {}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {}),
    "cohere": ("cohere", {}),
    "cohere-qk": ("cohere", {"use_qk_norm": True}),
    "cohere2": ("cohere2", {}),
    "glm": ("glm", {"head_dim": 16}),
    "glm4": ("glm4", {"head_dim": 16}),
    "exaone4": ("exaone4", {}),
    "smollm3": ("smollm3", {}),
    "seed_oss": ("seed_oss", {"head_dim": 16}),
    "starcoder2": ("starcoder2", {}),
    "stablelm": ("stablelm", {}),
    "helium": ("helium", {"head_dim": 16}),
    "arcee": ("arcee", {}),
    "nemotron": ("nemotron", {}),
    "ernie4_5": ("ernie4_5", {"head_dim": 16}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {"head_dim": 16}),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "qwen2_moe": ("qwen2_moe", {**MOE, "num_experts": 4, "shared_expert_intermediate_size": 48}),
    "qwen3_moe": ("qwen3_moe", {**MOE, "num_experts": 4, "head_dim": 16, "mlp_only_layers": [1]}),
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "phimoe": ("phimoe", {"num_local_experts": 4}),
    "gpt_oss": ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}),
    "granitemoe": ("granitemoe", {"num_local_experts": 4}),
    "granitemoeshared": ("granitemoeshared", {"num_local_experts": 4, "shared_intermediate_size": 48}),
    "deepseek_v2": ("deepseek_v2", {**MOE, **MLA}),
    "deepseek_v2-lite": ("deepseek_v2", {**MOE, **MLA, "q_lora_rank": None}),
    "deepseek_v3": ("deepseek_v3", {**MOE, **MLA}),
    "glm4_moe": ("glm4_moe", {**MOE, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "head_dim": 16, "use_qk_norm": True}),
    "ernie4_5_moe": ("ernie4_5_moe", {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_num_shared_experts": 1}),
    "llama4_text": ("llama4_text", {"num_local_experts": 4, "intermediate_size_mlp": 80, "head_dim": 16, "interleave_moe_layer_step": 2}),
    "qwen3_next": ("qwen3_next", {**MOE, **DELTA, "num_experts": 4, "shared_expert_intermediate_size": 48, "head_dim": 16}),
    "granitemoehybrid": ("granitemoehybrid", {**MAMBA2, "num_local_experts": 4, "shared_intermediate_size": 48, "layer_types": ["mamba", "mamba", "attention", "mamba"]}),
    "granitemoehybrid-dense": ("granitemoehybrid", {**MAMBA2, "num_local_experts": 0, "shared_intermediate_size": 48, "layer_types": ["mamba", "mamba", "attention", "mamba"]}),
    "falcon_h1": ("falcon_h1", {**MAMBA2, "mamba_d_ssm": 128}),
    "jamba": ("jamba", {"num_experts": 4, "num_experts_per_tok": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False}),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention", "conv", "full_attention"]}),
    "lfm2_moe": ("lfm2_moe", {**MOE, "num_experts": 4, "num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv", "full_attention"]}),
    "mamba": ("mamba", {}),
    "mamba2": ("mamba2", {"num_heads": 8, "head_dim": 16, "n_groups": 1, "state_size": 16}),
    "nemotron_h": ("nemotron_h", {"hybrid_override_pattern": "M-M*", "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1, "head_dim": 16}),
}  # fmt: skip


RECORD = Path(__file__).parents[1] / "data" / "saved-by-transformers.json"


def save(family: str, folder: Path) -> None:
    model_type, changes = FAMILIES[family]
    config = transformers.AutoConfig.for_model(model_type, **{**SIZES, **changes})
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def recorded(folder: Path) -> dict[str, Any]:
    """Return the config, and name and shape of every tensor, such as "lm_head.weight [320, 64]"."""
    config = json.loads((folder / "config.json").read_text())
    del config["transformers_version"]
    tensors = sorted(f"{tensor.name} {list(tensor.shape)}" for tensor in read_model(str(folder)).tensors)
    return {"config": config, "tensors": tensors}


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_from_config_equal_those_that_transformers_saves(family: str, tmp_path: Path) -> None:
    save(family, tmp_path / "whole")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_bytes((tmp_path / "whole" / "config.json").read_bytes())

    saved = read_model(str(tmp_path / "whole"))
    derived = read_model(str(tmp_path / "bare"))

    assert (saved.tensors_from, derived.tensors_from) == ("safetensors", "config")
    assert not any("the same tensors as in a Llama model" in warning for warning in derived.warnings)
    # Data types are not compared: transformers' saving code and each publisher choose which tensors stay in float32.
    saved_shapes = {tensor.name: tensor.shape for tensor in saved.tensors}
    our_shapes = {tensor.name: tensor.shape for tensor in derived.tensors}
    names = saved_shapes.keys() | our_shapes.keys()
    differing = {name for name in names if saved_shapes.get(name) != our_shapes.get(name)}
    assert {name: (saved_shapes.get(name), our_shapes.get(name)) for name in differing} == {}
    assert json.loads(RECORD.read_text())[family] == recorded(tmp_path / "whole"), "write the record again"


if __name__ == "__main__":
    rows = {}
    for name in FAMILIES:
        with tempfile.TemporaryDirectory() as temporary:
            save(name, Path(temporary))
            rows[name] = recorded(Path(temporary))
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    RECORD.write_text(f"{{\n{lines}\n}}\n")
