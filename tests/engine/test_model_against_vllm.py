"""Compares what we and the pinned vLLM read from config.json, for the model families in use."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_launch.model.quantization import MIN_CAPABILITY
from vllm_launch.model.read import read_model

pytestmark = pytest.mark.filterwarnings("default")  # torch, transformers and vLLM give warnings about their own code

BASE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
}
MAMBA2 = {
    "mamba_d_conv": 4,
    "mamba_d_head": 32,
    "mamba_d_state": 16,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_n_heads": 16,
}
DELTA = {
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 32,
    "linear_num_key_heads": 4, "linear_num_value_heads": 8,
}  # fmt: skip
MLA = {"kv_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32, "q_lora_rank": None}


def family(architecture: str, model_type: str, without: str = "", **more: Any) -> Any:
    config = {"architectures": [architecture], "model_type": model_type, **BASE, **more}
    for key in without.split():
        config.pop(key)
    return pytest.param(config, id=f"{model_type}-{len(more)}")


def nested(architecture: str, model_type: str, text_type: str, without: str = "", **more: Any) -> Any:
    text = {"model_type": text_type, **BASE, **more}
    for key in without.split():
        text.pop(key)
    config = {"architectures": [architecture], "model_type": model_type, "text_config": text, "vision_config": {}}
    return pytest.param(config, id=model_type)


FAMILIES = [
    family("LlamaForCausalLM", "llama"),
    family("LlamaForCausalLM", "llama", without="num_key_value_heads"),
    family("LlamaForCausalLM", "llama", head_dim=64, tie_word_embeddings=True),
    family("LlamaForCausalLM", "llama", rope_scaling={"type": "linear", "factor": 4.0}),
    family("LlamaForCausalLM", "llama", rope_scaling={"rope_type": "dynamic", "factor": 2.0}, use_cache=True, pad_token_id=0),
    family(
        "LlamaForCausalLM",
        "llama",
        rope_scaling={
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
        },
        use_cache=True, pad_token_id=0, bos_token_id=1,
    ),
    family("Qwen2ForCausalLM", "qwen2", use_sliding_window=False, sliding_window=1024, max_window_layers=2),
    family("Qwen2ForCausalLM", "qwen2", rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}),
    family("Qwen3ForCausalLM", "qwen3", head_dim=64),
    family("Qwen3MoeForCausalLM", "qwen3_moe", head_dim=64, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64),
    family("MistralForCausalLM", "mistral", sliding_window=1024),
    family("MistralForCausalLM", "mistral", sliding_window=None, head_dim=32),
    family("MixtralForCausalLM", "mixtral", num_local_experts=4, num_experts_per_tok=2),
    family("Gemma2ForCausalLM", "gemma2", head_dim=64, sliding_window=1024),
    family("Gemma3ForCausalLM", "gemma3_text", head_dim=64, sliding_window=512),
    family("Gemma3ForCausalLM", "gemma3_text", rope_scaling={"rope_type": "linear", "factor": 8.0}, head_dim=64, sliding_window=512),
    family("Cohere2ForCausalLM", "cohere2", sliding_window=1024),
    family("CohereForCausalLM", "cohere", model_max_length=8192),
    family(
        "Phi3ForCausalLM", "phi3", original_max_position_embeddings=1024, pad_token_id=0,
        rope_scaling={"type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16},
    ),
    family("GptOssForCausalLM", "gpt_oss", head_dim=64, sliding_window=128, num_local_experts=4, num_experts_per_tok=2),
    family("DeepseekV2ForCausalLM", "deepseek_v2", **MLA, n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=64),
    family(
        "DeepseekV3ForCausalLM", "deepseek_v3", **MLA, n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=64,
        rope_scaling={"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1},
    ),
    family("FalconForCausalLM", "falcon", without="num_key_value_heads", multi_query=True, new_decoder_architecture=False),
    family("FalconForCausalLM", "falcon", num_kv_heads=4, multi_query=True, new_decoder_architecture=True),
    family("GPTBigCodeForCausalLM", "gpt_bigcode", without="num_key_value_heads", multi_query=True),
    family("OPTForCausalLM", "opt", without="num_key_value_heads", ffn_dim=512),
    family("BloomForCausalLM", "bloom", without="num_key_value_heads max_position_embeddings"),
    family("BertModel", "bert", without="num_key_value_heads rope_theta"),
    family("JambaForCausalLM", "jamba", attn_layer_period=2, attn_layer_offset=1, num_experts=4, num_experts_per_tok=2, mamba_d_conv=4, mamba_d_state=16, mamba_expand=2),
    family("GraniteMoeHybridForCausalLM", "granitemoehybrid", **MAMBA2, num_local_experts=4, num_experts_per_tok=2, layer_types=["mamba", "mamba", "attention", "mamba"]),
    family("FalconH1ForCausalLM", "falcon_h1", **MAMBA2, mamba_d_ssm=512, head_dim=32),
    family(
        "NemotronHForCausalLM", "nemotron_h", hybrid_override_pattern="M-*M", mamba_num_heads=16, mamba_head_dim=32,
        ssm_state_size=16, n_groups=2, conv_kernel=4, head_dim=32, n_routed_experts=0,
    ),
    family("Qwen3NextForCausalLM", "qwen3_next", **DELTA, head_dim=64, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64),
    family("MambaForCausalLM", "mamba", without="num_attention_heads num_key_value_heads", state_size=16, conv_kernel=4, expand=2),
    family("Mamba2ForCausalLM", "mamba2", without="num_attention_heads num_key_value_heads intermediate_size", state_size=16,
           conv_kernel=4, expand=2, n_groups=1, num_heads=16, head_dim=32),
    family("Lfm2ForCausalLM", "lfm2", layer_types=["conv", "conv", "full_attention", "conv"], conv_L_cache=3, conv_dim=256),
    nested("Gemma3ForConditionalGeneration", "gemma3", "gemma3_text", sliding_window=512, head_dim=64),
    nested("Mistral3ForConditionalGeneration", "mistral3", "mistral", head_dim=32),
    nested("Qwen2VLForConditionalGeneration", "qwen2_vl", "qwen2_vl_text",
           rope_scaling={"type": "mrope", "mrope_section": [4, 6, 6]}),
    nested("Llama4ForConditionalGeneration", "llama4", "llama4_text", head_dim=32, attention_chunk_size=1024, num_local_experts=4,
           intermediate_size_mlp=512, no_rope_layers=[1, 1, 1, 0]),
]  # fmt: skip


def read_with_vllm(folder: Path) -> tuple[Any, Any, Any, int]:
    """Return vLLM's (hf_config, hf_text_config, architecture facts, max_model_len) for a model's folder."""
    from vllm.config.model import _get_and_verify_max_len  # noqa: PLC0415, TID251 - the reference
    from vllm.transformers_utils.config import get_config, get_hf_text_config  # noqa: PLC0415, TID251
    from vllm.transformers_utils.model_arch_config_convertor import (  # noqa: PLC0415, TID251
        MODEL_ARCH_CONFIG_CONVERTORS,
        ModelArchConfigConvertorBase,
    )

    config = get_config(str(folder), trust_remote_code=False)
    text = get_hf_text_config(config)
    convertor = MODEL_ARCH_CONFIG_CONVERTORS.get(config.model_type, ModelArchConfigConvertorBase)
    facts = convertor(config, text).convert()
    length = _get_and_verify_max_len(
        hf_config=text,
        model_arch_config=facts,
        tokenizer_config=None,
        max_model_len=None,
        disable_sliding_window=False,
        sliding_window=None,
    )
    return config, text, facts, length


@pytest.fixture
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(request.param))
    return tmp_path


@pytest.mark.parametrize("folder", FAMILIES, indirect=True)
def test_sizes_equal_those_that_vllm_derives(folder: Path) -> None:
    _, text, facts, length = read_with_vllm(folder)
    ours = read_model(str(folder))
    assert ours.max_model_len == length
    assert len(ours.layers) == facts.total_num_hidden_layers
    assert ours.hidden_size == facts.hidden_size
    assert ours.vocab_size == facts.vocab_size
    assert ours.heads == facts.total_num_attention_heads
    assert (ours.mla is not None) == facts.is_deepseek_mla
    attention = [layer for layer in ours.layers if layer.kind not in {"mamba", "none"}]
    if ours.task == "generate" and facts.total_num_attention_heads:
        assert {layer.head_dim for layer in attention} == {facts.head_size}
    if not facts.is_deepseek_mla:
        assert ours.kv_heads == facts.total_num_kv_heads
    assert (ours.experts.count if ours.experts else 0) == facts.num_experts
    types = getattr(text, "layer_types", None)
    window = getattr(text, "sliding_window", None)
    if types and not {"mamba", "conv", "linear_attention"} & set(types):
        sliding = [kind == "sliding_attention" and window is not None for kind in types]
        assert [layer.kind == "sliding" for layer in ours.layers] == sliding
        own = {window + 1} if ours.model_type == "cohere2" else {window}  # commandr.py: the token itself is one more
        assert {layer.window for layer in ours.layers if layer.kind == "sliding"} <= own
        assert [layer.kind == "chunked" for layer in ours.layers] == [kind == "chunked_attention" for kind in types]


STATEFUL = [param for param in FAMILIES if param.values[0]["model_type"] in {  # type: ignore[index,call-overload]
    "jamba", "granitemoehybrid", "falcon_h1", "nemotron_h", "qwen3_next", "mamba", "mamba2", "lfm2"}]  # fmt: skip


@pytest.mark.parametrize("folder", STATEFUL, indirect=True)
def test_shapes_and_dtypes_of_recurrent_states_equal_vllms(folder: Path) -> None:
    import torch  # noqa: PLC0415, TID251 - vLLM's dtypes are those of torch
    from vllm.model_executor.models.registry import ModelRegistry  # noqa: PLC0415, TID251

    config, text, _, _ = read_with_vllm(folder)
    ours = read_model(str(folder))
    cls: Any = ModelRegistry.models[ours.architecture].load_model_cls()  # type: ignore[attr-defined] - the entry is lazy
    vllm_config = SimpleNamespace(
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
        model_config=SimpleNamespace(hf_config=config, hf_text_config=text, dtype=torch.bfloat16),
        cache_config=SimpleNamespace(
            mamba_cache_dtype="auto",
            mamba_ssm_cache_dtype=getattr(config, "mamba_ssm_cache_dtype", "float32")
            if config.model_type == "nemotron_h"
            else "auto",
            use_replayssm=False,
        ),
        speculative_config=None,
        num_speculative_tokens=0,
    )
    shapes = cls.get_mamba_state_shape_from_config(vllm_config)
    dtypes = cls.get_mamba_state_dtype_from_config(vllm_config)
    stateful = [layer for layer in ours.layers if layer.state_shapes]
    assert stateful
    size = {"BF16": 2, "bfloat16": 2, "F32": 4, "float32": 4}
    for layer in stateful:
        assert layer.state_shapes == tuple(tuple(shape) for shape in shapes)
        assert [size[dtype] for dtype in layer.state_dtypes] == [dtype.itemsize for dtype in dtypes]
    assert sum(math.prod(shape) for shape in stateful[0].state_shapes) > 0


def test_the_minimum_capability_of_every_quantisation_method_equals_vllms() -> None:
    from vllm.model_executor.layers.quantization import (  # noqa: PLC0415, TID251
        QUANTIZATION_METHODS,
        get_quantization_config,
    )

    assert set(MIN_CAPABILITY) == set(QUANTIZATION_METHODS)
    for method in QUANTIZATION_METHODS:
        minimum = get_quantization_config(method).get_min_capability()
        assert MIN_CAPABILITY[method] == divmod(minimum, 10), method
