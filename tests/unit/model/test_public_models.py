"""Compares public models' plans with vLLM's own values. Each value is what vLLM 0.32.0 gave for the same config.json.

``scripts/generators/model_facts.py`` asks vLLM. The sizes are those of the models' config.json files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_launch.machine.gpus import Gpu
from vllm_launch.model.model import Model
from vllm_launch.model.read import read_model
from vllm_launch.sizing.kv import kv_cache
from vllm_launch.sizing.parallel import Layout
from vllm_launch.sizing.placement import Placement
from vllm_launch.sizing.run_config import RunConfig

GIB = 1 << 30
H200 = Gpu(
    index=0, uuid="GPU-0", name="NVIDIA H200", memory_total=140 * GIB, memory_free=139 * GIB, compute_capability=(9, 0)
)
DENSE = {"tie_word_embeddings": False, "torch_dtype": "bfloat16"}


def read(folder: Path, **config: Any) -> Model:
    (folder / "config.json").write_text(json.dumps(config))
    return read_model(str(folder))


def tokens(model: Model, batch: int, kv_bytes: int = 40 * GIB) -> int:
    """Return the tokens in a KV cache of ``kv_bytes`` for requests of the model's own length."""
    run = RunConfig(
        max_model_len=model.max_model_len, max_num_seqs=256, max_num_batched_tokens=batch, dtype=model.dtype
    )
    return kv_cache(Placement(model, run, Layout(), H200), kv_bytes).tokens


def test_a_window_of_null_is_no_window(tmp_path: Path) -> None:
    """Mistral 7B v0.3 states null. The class's own default is 4,096, for uploads that omit the key."""
    mistral = {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 4096, "vocab_size": 32768,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 32768, **DENSE,
    }  # fmt: skip
    assert {layer.kind for layer in read(tmp_path, **mistral, sliding_window=None).layers} == {"full"}
    assert {layer.window for layer in read(tmp_path, **mistral).layers} == {4096}


def test_gemma_4_has_larger_and_fewer_heads_in_full_layers(tmp_path: Path) -> None:
    kinds = (["sliding_attention"] * 5 + ["full_attention"]) * 5
    text = {
        "model_type": "gemma4_text", "attention_k_eq_v": True, "enable_moe_block": True, "global_head_dim": 512,
        "head_dim": 256, "hidden_size": 2816, "hidden_size_per_layer_input": 0, "intermediate_size": 2112,
        "layer_types": kinds, "max_position_embeddings": 262144, "moe_intermediate_size": 704, "num_attention_heads": 16,
        "num_experts": 128, "num_global_key_value_heads": 2, "num_hidden_layers": 30, "num_key_value_heads": 8,
        "num_kv_shared_layers": 0, "sliding_window": 1024, "tie_word_embeddings": True, "top_k_experts": 8,
        "vocab_size": 262144, "dtype": "bfloat16",
    }  # fmt: skip
    model = read(tmp_path, architectures=["Gemma4ForConditionalGeneration"], model_type="gemma4", text_config=text)
    heads = {(layer.kind, layer.kv_heads, layer.head_dim) for layer in model.layers}
    assert heads == {("sliding", 8, 256), ("full", 2, 512)}
    assert tokens(model, batch=2496) == 1_704_859


def test_mimo_v2_has_other_heads_in_sliding_layers(tmp_path: Path) -> None:
    slides = [0, 1, 1, 1, 1, 0, *([1] * 5 + [0]) * 7]
    model = read(
        tmp_path, architectures=["MiMoV2FlashForCausalLM"], model_type="mimo_v2_flash", num_hidden_layers=48,
        hidden_size=4096, num_attention_heads=64, num_key_value_heads=4, head_dim=192, v_head_dim=128,
        intermediate_size=16384, vocab_size=152576, max_position_embeddings=262144, sliding_window=128,
        attention_chunk_size=128, swa_num_attention_heads=64, swa_num_key_value_heads=8, swa_head_dim=192,
        swa_v_head_dim=128, hybrid_layer_pattern=slides, moe_layer_freq=[0] + [1] * 47, moe_intermediate_size=2048,
        n_routed_experts=256, num_experts_per_tok=8, **DENSE,
    )  # fmt: skip
    sizes = [(layer.kv_heads, layer.head_dim, layer.head_dim_v) for layer in model.layers if layer.kind == "full"]
    assert sizes == [(4, 192, 128)] * 9
    assert {(layer.kv_heads, layer.window) for layer in model.layers if layer.kind == "sliding"} == {(8, 128)}
    assert tokens(model, batch=2048) == 1_604_595


def test_minicpm3_pads_keys_and_values_to_the_width_of_a_query(tmp_path: Path) -> None:
    model = read(
        tmp_path, architectures=["MiniCPM3ForCausalLM"], model_type="minicpm3", hidden_size=2560, num_hidden_layers=62,
        intermediate_size=6400, max_position_embeddings=32768, num_attention_heads=40, num_key_value_heads=40,
        qk_nope_head_dim=64, qk_rope_head_dim=32, q_lora_rank=768, kv_lora_rank=256, vocab_size=73448, **DENSE,
    )  # fmt: skip
    assert {(layer.kv_heads, layer.head_dim, layer.head_dim_v) for layer in model.layers} == {(40, 96, 96)}
    assert tokens(model, batch=2048) == 45_088


def test_whisper_stores_the_encoders_states_too(tmp_path: Path) -> None:
    model = read(
        tmp_path, architectures=["WhisperForConditionalGeneration"], model_type="whisper", d_model=1280,
        encoder_layers=32, encoder_attention_heads=20, encoder_ffn_dim=5120, decoder_layers=32,
        decoder_attention_heads=20, decoder_ffn_dim=5120, num_hidden_layers=32, max_source_positions=1500,
        max_target_positions=448, num_mel_bins=128, vocab_size=51866, torch_dtype="float16",
    )  # fmt: skip
    assert (model.max_model_len, model.dtype, len(model.layers), model.kv_heads, model.head_dim) == (
        448, "float16", 32, 20, 64,
    )  # fmt: skip
    assert tokens(model, batch=2048) == 47_051


def test_chatglm_has_other_names_for_its_sizes(tmp_path: Path) -> None:
    model = read(
        tmp_path, architectures=["ChatGLMModel"], model_type="chatglm", hidden_size=4096, ffn_hidden_size=13696,
        multi_query_attention=True, multi_query_group_num=2, num_attention_heads=32, num_layers=28, kv_channels=128,
        padded_vocab_size=65024, seq_length=8192, torch_dtype="float16", tie_word_embeddings=False,
    )  # fmt: skip
    assert (model.task, model.vocab_size, model.kv_heads, len(model.layers)) == ("generate", 65024, 2, 28)
    assert tokens(model, batch=8192) == 1_497_952


def test_sentence_transformers_modules_make_a_pooling_model(tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.Pooling", "path": "1"}]))
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944,
        "max_position_embeddings": 131072, "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
        "vocab_size": 151646, "is_causal": False, "torch_dtype": "float32", "tie_word_embeddings": False,
    }  # fmt: skip
    model = read(tmp_path, **config)
    assert (model.task, model.dtype, {layer.kind for layer in model.layers}) == ("pooling", "float16", {"none"})


@pytest.mark.parametrize("options", [{"runner": "pooling"}, {"convert": "embed"}])
def test_the_users_runner_or_convert_makes_a_pooling_model(tmp_path: Path, options: dict[str, str]) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 320, "max_position_embeddings": 128,
    }  # fmt: skip
    assert read(tmp_path, **config).task == "generate"
    assert read_model(str(tmp_path), **options).task == "pooling"  # type: ignore[arg-type]


def test_quantized_experts_of_llama_4_are_counted_as_quantized(tmp_path: Path) -> None:
    text = {
        "model_type": "llama4_text", "attention_chunk_size": 8192, "head_dim": 128, "hidden_size": 5120,
        "interleave_moe_layer_step": 2, "intermediate_size": 8192, "intermediate_size_mlp": 16384,
        "max_position_embeddings": 1048576, "num_attention_heads": 40, "num_experts_per_tok": 1, "num_hidden_layers": 48,
        "num_key_value_heads": 8, "num_local_experts": 128, "vocab_size": 202048, "torch_dtype": "bfloat16",
    }  # fmt: skip
    weights = {"num_bits": 8, "strategy": "channel", "type": "float", "group_size": None}
    quantization = {
        "quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }  # fmt: skip
    model = read(
        tmp_path, architectures=["Llama4ForConditionalGeneration"], model_type="llama4", text_config=text,
        quantization_config=quantization,
    )  # fmt: skip
    experts = [tensor for tensor in model.tensors if ".experts." in tensor.name and tensor.name.endswith("weight")]
    assert {tensor.dtype for tensor in experts} == {"F8_E4M3"}
    assert len(experts) == 24 * 128 * 3


def test_qwen3_5_has_the_linear_attention_of_its_class(tmp_path: Path) -> None:
    text = {
        "model_type": "qwen3_5_text", "hidden_size": 4608, "intermediate_size": 12288, "num_hidden_layers": 62,
        "num_attention_heads": 24, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 248320,
        "max_position_embeddings": 262144, "dtype": "bfloat16",
    }  # fmt: skip
    model = read(tmp_path, architectures=["Qwen3_5ForConditionalGeneration"], model_type="qwen3_5", text_config=text)
    states = {layer.state_shapes for layer in model.layers if layer.kind == "mamba"}
    assert states == {((3, 8192), (32, 128, 128))}
    assert [layer.kind for layer in model.layers].count("full") == 15
    assert tokens(model, batch=2048) == 693_117
