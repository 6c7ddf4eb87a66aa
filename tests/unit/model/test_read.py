"""Reads models from their config.json."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vllm_launch.engine import architectures
from vllm_launch.errors import UsageError
from vllm_launch.model.build import QUERY_NORMS, build
from vllm_launch.model.checkpoint import Checkpoint
from vllm_launch.model.dtypes import STORED_BITS
from vllm_launch.model.model import Model, Tensor
from vllm_launch.model.read import read_model
from vllm_launch.model.tensors import FAMILIES

PUBLIC = Path(__file__).parents[2] / "data" / "models"
TABLE = Path(architectures.__file__).with_name("architectures.json")
LLAMA: dict[str, Any] = json.loads((PUBLIC / "meta-llama--Meta-Llama-3-8B" / "config.json").read_text())


def read_published(name: str) -> Model:
    return read_model(str(PUBLIC / name))


def build_model(config: Any = None, /, files: dict[str, Any] | None = None, **changes: Any) -> Model:
    raw = {**(LLAMA if config is None else config), **changes}
    return build("m", Checkpoint(None, {"config.json": raw, **(files or {})}, None, ()), {})


def parameters(model: Model) -> int:
    return sum(math.prod(tensor.shape) for tensor in model.tensors)


def gib(model: Model) -> float:
    return sum(math.prod(tensor.shape) * STORED_BITS[tensor.dtype] // 8 for tensor in model.tensors) / 2**30


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("meta-llama--Meta-Llama-3-8B", 8_030_261_248),
        ("Qwen--Qwen2.5-7B-Instruct", 7_615_616_512),
        ("Qwen--Qwen3-30B-A3B", 30_532_122_624),
        ("mistralai--Mixtral-8x7B-v0.1", 46_702_792_704),
        ("mistralai--Mistral-7B-v0.1", 7_241_732_096),
        ("deepseek-ai--DeepSeek-V2-Lite", 15_706_484_224),
        ("google--gemma-2-9b", 9_241_705_984),
        ("ai21labs--Jamba-v0.1", 51_570_323_328),
    ],
)
def test_parameters_from_config_are_those_that_the_hub_publishes(name: str, count: int) -> None:
    assert parameters(read_published(name)) == count


@pytest.mark.parametrize(
    ("name", "length"),
    [
        ("meta-llama--Llama-3.1-8B-Instruct", 131072),  # llama3 RoPE is already scaled
        ("deepseek-ai--DeepSeek-V3", 163840),  # yarn is already scaled too
        ("google--gemma-3-27b-it", 131072),  # default of its text config, without the linear factor
        ("Qwen--Qwen3-30B-A3B", 40960),
    ],
)
def test_max_model_len_is_as_vllm_derives_it(name: str, length: int) -> None:
    assert read_published(name).max_model_len == length


def test_linear_rope_scaling_multiplies_the_length() -> None:
    assert build_model(rope_scaling={"type": "linear", "factor": 4.0}).max_model_len == 32768


def test_the_tokenizers_limit_counts_only_for_pooling_with_absolute_positions() -> None:
    files = {"tokenizer_config.json": {"model_max_length": 512}}
    assert build_model(files=files).max_model_len == 8192
    assert build_model(files=files, position_embedding_type="absolute").max_model_len == 8192  # a generation model
    assert build_model(files=files, architectures=["LlamaModel"]).max_model_len == 8192
    bert = json.loads((PUBLIC / "BAAI--bge-large-en-v1.5" / "config.json").read_text())
    absolute = {**bert, "max_position_embeddings": 1024, "position_embedding_type": "absolute"}
    assert build_model(absolute, files=files).max_model_len == 512
    assert build_model(absolute, files={"tokenizer_config.json": {"model_max_length": int(1e30)}}).max_model_len == 1024


def test_longrope_starts_at_its_original_length() -> None:
    scaling = {"type": "longrope", "short_factor": [1], "long_factor": [2]}
    length = build_model(
        rope_scaling=scaling, original_max_position_embeddings=4096, max_position_embeddings=131072
    ).max_model_len
    assert length == 4096


def test_sentence_bert_config_sets_the_length() -> None:
    assert build_model(files={"sentence_bert_config.json": {"max_seq_length": 256}}).max_model_len == 256


def test_without_any_length_key_vllm_assumes_2048() -> None:
    assert (
        build_model({key: value for key, value in LLAMA.items() if key != "max_position_embeddings"}).max_model_len
        == 2048
    )


def test_gpt_oss_alternates_windows_and_keeps_mxfp4_experts() -> None:
    model = read_published("openai--gpt-oss-20b")
    assert [layer.kind for layer in model.layers[:2]] == ["sliding", "full"]
    assert model.layers[0].window == 128
    assert model.quantization is not None
    assert model.quantization.method == "mxfp4"
    assert 12.7 < gib(model) < 12.9


def test_all_layers_of_mistral_v01_and_none_of_qwen25_have_a_sliding_window() -> None:
    assert {(layer.kind, layer.window) for layer in read_published("mistralai--Mistral-7B-v0.1").layers} == {
        ("sliding", 4096)
    }
    assert {layer.kind for layer in read_published("Qwen--Qwen2.5-7B-Instruct").layers} == {"full"}


def test_gemma3_has_one_full_layer_in_six_and_the_defaults_of_its_text_config() -> None:
    model = read_published("google--gemma-3-27b-it")
    assert Counter(layer.kind for layer in model.layers) == {"sliding": 52, "full": 10}
    assert (model.vocab_size, model.tie_word_embeddings, model.multimodal) == (262208, True, True)
    assert not any("encoder" in warning for warning in model.warnings)


def test_models_with_norms_of_queries_and_keys_are_recognised() -> None:
    with_norms = {path.name for path in PUBLIC.iterdir() if path.is_dir() and read_published(path.name).qk_norm}
    qwens = {"Qwen--Qwen3-30B-A3B", "Qwen--Qwen3-Next-80B-A3B-Instruct"}
    assert with_norms == {*qwens, "google--gemma-3-27b-it"}
    norm_names = {f".{family.qk_names[0]}.weight" for family in FAMILIES.values() if family.qk_norm}
    assert norm_names <= {*QUERY_NORMS}


def test_mla_keeps_one_latent_head() -> None:
    model = read_published("deepseek-ai--DeepSeek-V3")
    assert {(layer.kind, layer.kv_heads, layer.head_dim) for layer in model.layers} == {("mla", 1, 576)}
    assert [layer.moe for layer in model.layers[:4]] == [False, False, False, True]
    assert model.experts is not None
    assert (model.experts.count, model.experts.per_token, model.experts.shared_intermediate_size) == (256, 8, 2048)
    assert model.quantization is not None
    assert model.quantization.block_shape == (128, 128)
    names = {tensor.name: tensor for tensor in model.tensors}
    scale = names["model.layers.0.mlp.gate_proj.weight_scale_inv"]
    assert (scale.dtype, scale.shape) == ("F32", (144, 56))


def test_gated_delta_net_keeps_a_convolution_and_a_matrix_for_each_head() -> None:
    layer = read_published("Qwen--Qwen3-Next-80B-A3B-Instruct").layers[0]
    assert (layer.kind, layer.state_shapes) == ("mamba", ((3, 8192), (32, 128, 128)))
    kinds = Counter(layer.kind for layer in read_published("Qwen--Qwen3-Next-80B-A3B-Instruct").layers)
    assert kinds == {"mamba": 36, "full": 12}


def test_jamba_has_one_attention_layer_in_eight_and_experts_in_every_other() -> None:
    model = read_published("ai21labs--Jamba-v0.1")
    assert [n for n, layer in enumerate(model.layers) if layer.kind == "full"] == [4, 12, 20, 28]
    assert [n for n, layer in enumerate(model.layers[:4]) if layer.moe] == [1, 3]
    assert model.layers[0].state_shapes == ((3, 8192), (8192, 16))


def test_falcon_h1_has_attention_and_state_in_every_layer() -> None:
    state = {"mamba_d_ssm": 3072, "mamba_d_state": 256, "mamba_n_groups": 1, "mamba_n_heads": 48, "mamba_d_head": 64}
    model = build_model(architectures=["FalconH1ForCausalLM"], model_type="falcon_h1", mamba_d_conv=4, **state)
    assert {(layer.kind, layer.state_shapes) for layer in model.layers} == {("full", ((3, 3584), (48, 64, 256)))}


def test_awq_is_packed_eight_to_an_integer() -> None:
    model = read_published("casperhansen--llama-3-70b-instruct-awq")
    names = {tensor.name: (tensor.dtype, tensor.shape) for tensor in model.tensors}
    assert names["model.layers.0.mlp.down_proj.qweight"] == ("I32", (28672, 1024))
    assert names["model.layers.0.mlp.down_proj.scales"] == ("F16", (224, 8192))
    assert names["lm_head.weight"] == ("F16", (128256, 8192))
    assert 37 < gib(model) < 38


def test_compressed_fp8_halves_the_linear_layers() -> None:
    model = read_published("RedHatAI--Meta-Llama-3.1-8B-Instruct-FP8")
    names = {tensor.name: tensor.dtype for tensor in model.tensors}
    assert names["model.layers.0.self_attn.q_proj.weight"] == "F8_E4M3"
    assert names["lm_head.weight"] == "BF16"


def test_an_embedding_model_is_for_pooling_in_float16() -> None:
    model = read_published("BAAI--bge-large-en-v1.5")
    assert (model.task, model.dtype, model.max_model_len) == ("pooling", "float16", 512)
    assert {layer.kind for layer in model.layers} == {"none"}


@pytest.mark.parametrize(
    ("config_dtype", "dtype"),
    [("float32", "bfloat16"), ("float16", "float16"), ("torch.bfloat16", "bfloat16"), (None, "bfloat16")],
)
def test_dtype_is_what_auto_gives(config_dtype: str | None, dtype: str) -> None:
    assert build_model(torch_dtype=config_dtype).dtype == dtype


def test_gemma2_never_runs_in_float16() -> None:
    assert read_published("google--gemma-2-9b").dtype == "bfloat16"


def test_the_kv_cache_dtype_of_the_checkpoint_is_read() -> None:
    scheme = {"quant_method": "compressed-tensors", "format": "float-quantized", "kv_cache_scheme": {"num_bits": 8, "type": "float"},
              "config_groups": {"group_0": {"weights": {"num_bits": 8}}}}  # fmt: skip
    model = build_model(quantization_config=scheme)
    assert model.quantization is not None
    assert model.quantization.kv_cache_dtype == "fp8"
    model = build_model(files={"hf_quant_config.json": {"producer": {"name": "modelopt"}, "quantization": {
        "quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}}})  # fmt: skip
    assert model.quantization is not None
    assert (model.quantization.method, model.quantization.kv_cache_dtype) == ("modelopt_fp4", "fp8")


@pytest.mark.parametrize(
    "method", ["squeezellm", "aqlm", "deepspeedfp", "gptq_marlin_24", "bitsandbytes", "gguf", "tpu_int8"]
)
def test_a_removed_quantization_method_names_its_replacement(method: str) -> None:
    with pytest.raises(UsageError, match=r"no longer supports it; use"):
        build_model(quantization_config={"quant_method": method})


@pytest.mark.parametrize(
    ("architecture", "text"),
    [
        ("LlamaForCasualLM", "nearest known: LlamaForCausalLM"),
        ("BambaForCausalLM", "was the last release"),
        ("BartForConditionalGeneration", "bart-plugin"),
        ("Zzz", "does not know it"),
    ],
)
def test_an_architecture_that_vllm_does_not_run_is_refused(architecture: str, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        build_model(architectures=[architecture])


def test_an_unknown_architecture_with_custom_code_gives_only_a_warning() -> None:
    model = build_model(architectures=["OwnForCausalLM"], auto_map={"AutoModelForCausalLM": "own.OwnForCausalLM"})
    assert any("--trust-remote-code" in warning for warning in model.warnings)


REMOVED = json.loads(TABLE.read_bytes())["removed"]
BACKEND = json.loads(TABLE.read_bytes())["transformers_backend"]


@pytest.mark.parametrize("name", sorted({*REMOVED} - {*BACKEND}))
def test_a_dropped_architecture_is_told_although_its_repository_has_code_and_its_sizes_are_missing(name: str) -> None:
    raw = {"architectures": [name], "auto_map": {"AutoModelForCausalLM": "own.Own"}, "model_type": "own"}
    with pytest.raises(UsageError, match=f"{REMOVED[name]} was the last release that did"):
        build("m", Checkpoint(None, {"config.json": raw}, None, ()), {})


def test_a_dropped_architecture_is_told_wherever_it_is_in_the_list() -> None:
    with pytest.raises(UsageError, match=r"architecture Phi3SmallForCausalLM: .* 0\.9\.2 was the last"):
        build_model(architectures=["OwnForCausalLM", "Phi3SmallForCausalLM"], auto_map={"AutoModel": "own.Own"})


@pytest.mark.parametrize("name", sorted({*REMOVED} & {*BACKEND}))
def test_a_dropped_architecture_that_the_transformers_backend_runs_is_planned(name: str) -> None:
    assert any("Transformers backend" in warning for warning in build_model(architectures=[name]).warnings)


def test_a_classifier_with_a_known_decoder_is_for_pooling() -> None:
    assert build_model(architectures=["LlamaForSequenceClassification"]).task == "pooling"


def test_an_unknown_model_type_gives_a_warning() -> None:
    model = build_model(model_type="something_new")
    assert any("the same tensors as in a Llama model" in warning for warning in model.warnings)


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("no hidden size", {"hidden_size": None}, "hidden_size"),
    ("a string", {"hidden_size": "4096"}, "hidden_size"),
    ("zero", {"num_hidden_layers": 0}, "num_hidden_layers"),
    ("negative", {"vocab_size": -1}, "vocab_size"),
    ("too large", {"hidden_size": 10**30}, "hidden_size"),
    ("a million layers", {"num_hidden_layers": 10**6}, "num_hidden_layers"),
    ("half a head", {"num_attention_heads": 32.5}, "num_attention_heads"),
    ("a boolean", {"num_attention_heads": True}, "num_attention_heads"),
    ("heads that do not divide", {"num_attention_heads": 30, "num_key_value_heads": 30}, "num_attention_heads"),
    ("kv heads that do not divide", {"num_key_value_heads": 7}, "num_key_value_heads"),
    ("no architectures", {"architectures": None}, "architectures"),
    ("architectures of numbers", {"architectures": [1]}, "architectures"),
    ("too few layer types", {"layer_types": ["full_attention"]}, "layer_types"),
    ("layer types of numbers", {"layer_types": [1, 2]}, "layer_types"),
    ("a nested list", {"text_config": [1]}, "text_config"),
    ("a length that is text", {"max_position_embeddings": "long"}, "max_position_embeddings"),
    ("a negative factor", {"rope_scaling": {"type": "linear", "factor": -1}}, "factor"),
    ("a RoPE that is text", {"rope_scaling": "yes"}, "rope_scaling"),
    ("a quantization that is text", {"quantization_config": "awq"}, "quantization_config"),
    ("an unknown quantization method", {"quantization_config": {"quant_method": "magic"}}, "quant_method"),
    ("five bits", {"quantization_config": {"quant_method": "gptq", "bits": 5}}, "bits"),
    (
        "a block of one size",
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128]}},
        "weight_block_size",
    ),
    ("a group size that is text", {"quantization_config": {"quant_method": "awq", "group_size": "x"}}, "group_size"),
    ("tied embeddings that are text", {"tie_word_embeddings": "no"}, "tie_word_embeddings"),
    ("a dtype that is a number", {"torch_dtype": 16}, "torch_dtype"),
]


@pytest.mark.parametrize(("changes", "key"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_a_bad_config_gives_one_line_that_names_the_key(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(UsageError) as raised:
        build_model(**changes)
    assert key in str(raised.value)
    assert "\n" not in str(raised.value)


def test_overrides_replace_values_of_the_config() -> None:
    model = build("m", Checkpoint(None, {"config.json": LLAMA}, None, ()), {"max_position_embeddings": 4096})
    assert model.max_model_len == 4096


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(0, 64) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
KEYS = [*LLAMA, "text_config", "layer_types", "sliding_window", "quantization_config", "num_local_experts", "rope_scaling",
        "rope_parameters", "vision_config", "kv_lora_rank", "head_dim", "auto_map", "moe_layer_freq", "num_experts_per_tok",
        "hybrid_override_pattern", "linear_num_value_heads", "num_kv_shared_layers", "layers_block_type", "dtype"]  # fmt: skip
TYPES = [
    "llama",
    "deepseek_v3",
    "jamba",
    "gpt_oss",
    "falcon",
    "qwen3_next",
    "nemotron_h",
    "granitemoehybrid",
    "mamba2",
    "zzz",
]


@given(changes=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4), model_type=st.sampled_from(TYPES))
@example(changes={"hybrid_override_pattern": []}, model_type="nemotron_h")
@settings(max_examples=300, deadline=None)
def test_any_config_gives_a_model_or_a_usage_error(changes: dict[str, Any], model_type: str) -> None:
    small = {**LLAMA, "num_hidden_layers": 2, "vocab_size": 64, "model_type": model_type}
    try:
        model = build_model(small, **changes)
    except UsageError as error:
        text = str(error)
    else:
        assert model.max_model_len >= 1
        return
    assert "\n" not in text


@pytest.mark.parametrize(
    ("scheme", "cache"),
    [
        ({"type": "float", "num_bits": 8, "dynamic": False}, "fp8"),
        ({"type": "float", "num_bits": 8, "dynamic": True}, None),
        ({"type": "float", "num_bits": 4}, "nvfp4"),
        ({"type": "int", "num_bits": 8}, None),
    ],
)
def test_the_cache_scheme_of_model_optimizer_is_read_as_vllm_does(scheme: dict[str, Any], cache: str | None) -> None:
    model = build_model(
        quantization_config={"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_scheme": scheme}
    )
    assert model.quantization is not None
    assert model.quantization.kv_cache_dtype == cache


def test_a_deprecated_method_gives_a_warning_with_vllms_flag() -> None:
    assert any(
        "--allow-deprecated" in text
        for text in build_model(quantization_config={"quant_method": "fbgemm_fp8"}).warnings
    )


def test_more_experts_than_the_limit_are_refused() -> None:
    with pytest.raises(UsageError, match="num_experts"):
        build_model(num_experts=10**6, num_experts_per_tok=1)


@pytest.mark.parametrize(
    ("stored_dtypes", "dtype"), [(("F16", "I32"), "float16"), (("BF16", "F16"), "bfloat16"), (("U8",), "bfloat16")]
)
def test_without_a_dtype_in_the_config_the_weights_decide(stored_dtypes: tuple[str, ...], dtype: str) -> None:
    raw = {key: value for key, value in LLAMA.items() if key != "torch_dtype"}
    tensors = tuple(Tensor(stored_dtype, stored_dtype, (1,)) for stored_dtype in stored_dtypes)
    assert build("m", Checkpoint(None, {"config.json": raw}, tensors, ()), {}).dtype == dtype


def test_a_rope_type_that_is_no_string_is_refused() -> None:
    with pytest.raises(UsageError, match="rope_scaling"):
        build_model(rope_scaling={"type": 3, "factor": 2.0})


def test_linear_scaling_lengthens_the_rope_table() -> None:
    gemma = build_model(
        model_type="gemma3_text", architectures=["Gemma3ForCausalLM"], rope_local_base_freq=10000,
        rope_scaling={"rope_type": "linear", "factor": 8.0}, max_position_embeddings=4096,
    )  # fmt: skip
    assert (gemma.max_model_len, gemma.rope_positions) == (4096, 9 * 4096)
    assert build_model().rope_positions is None
