"""Makes a config.json for each architecture of the pinned vLLM: ``configurations()``.

The values are the defaults of the architecture's config class in transformers or vLLM, in the form in which
save_pretrained writes them. Such a config is about the first released model of its family.
"""

# ruff: noqa: PLC0415, TID251 - vLLM may only be imported after pretend_h200

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

MODEL_TYPES = {
    "AquilaModel": "llama",
    "LLaMAForCausalLM": "llama",
    "LlamaBidirectionalModel": "llama",
    "LlamaBidirectionalForSequenceClassification": "llama",
    "TeleChat3ForCausalLM": "llama",
    "InternLM3ForCausalLM": "llama",
    "IQuestCoderForCausalLM": "llama",
    "ChatGLMModel": "chatglm",
    "ChatGLMForConditionalGeneration": "chatglm",
    "PhiMoEForCausalLM": "phimoe",
    "ExaoneMoEForCausalLM": "exaone_moe",
    "MuseGlimmerForCausalLM": "muse_glimmer",
    "MiniMaxM3SparseForCausalLM": "minimax_m3_vl",
    "Step3TextForCausalLM": "step3_text",
    "Step3VLForConditionalGeneration": "step3_vl",
    "Step3p5ForCausalLM": "step3p5",
    "BertSpladeSparseEmbeddingModel": "bert",
    "BgeM3EmbeddingModel": "xlm-roberta",
    "VoyageQwen3BidirectionalEmbedModel": "qwen3",
    "Qwen2ForRewardModel": "qwen2",
    "Qwen2ForProcessRewardModel": "qwen2",
    "HF_ColBERT": "bert",
    "ColBERTModernBertModel": "modernbert",
    "ColBERTLfm2Model": "lfm2",
    "JinaForRanking": "qwen3",
    "JinaVLForRanking": "qwen2_vl",
    "ColQwen3": "colqwen3",
    "OpsColQwen3Model": "ops_colqwen3",
    "ColQwen3_5": "qwen3_5",
    "Qwen3VLNemotronEmbedModel": "qwen3_vl_nemotron_embed",
    "Qwen3ASRForcedAlignerForTokenClassification": "qwen3_asr",
    "Qwen3ASRRealtimeGeneration": "qwen3_asr",
    "BagelForConditionalGeneration": "bagel",
    "BailingMoeV3VLForConditionalGeneration": "bailing_moe_v3_vl",
    "Cosmos3ForConditionalGeneration": "cosmos3_edge",
    "DeepseekVLV2ForCausalLM": "deepseek_vl_v2",
    "DeepseekOCRForCausalLM": "deepseek_vl_v2",
    "DeepseekOCR2ForCausalLM": "deepseek_vl_v2",
    "DeepseekV4ForConditionalGeneration": "deepseek_v4",
    "DeepseekV41ForCausalLM": "deepseek_v41",
    "DeepseekV3BidirectionalModel": "deepseek_v3",
    "Dots3NoteForCausalLM": "dots3_note",
    "UnlimitedOCRForCausalLM": "unlimited_ocr",
    "FunAudioChatForConditionalGeneration": "funaudiochat",
    "InternS1ForConditionalGeneration": "interns1",
    "IsaacForConditionalGeneration": "isaac",
    "KimiVLForConditionalGeneration": "kimi_vl",
    "KimiK25ForConditionalGeneration": "kimi_k25",
    "KimiK3ForConditionalGeneration": "kimi_k3",
    "MossTranscribeDiarizeForConditionalGeneration": "moss_transcribe_diarize",
    "LightOnOCRForConditionalGeneration": "lightonocr",
    "MiDashengLMModel": "midashenglm",
    "Moondream3ForCausalLM": "moondream3",
    "HfMoondream": "moondream3",
    "NemotronHPuzzleForCausalLM": "nemotron_h",
    "OpenVLAForActionPrediction": "openvla",
    "Ovis": "ovis",
    "PixtralForConditionalGeneration": "pixtral",
    "Qwen2_5OmniModel": "qwen2_5_omni",
    "UltravoxModel": "ultravox",
    "VoxtralRealtimeGeneration": "voxtral_realtime",
    "SarvamMLAForCausalLM": "deepseek_v3",
    "MistralLarge3ForCausalLM": "deepseek_v3",
    "HCXVisionV2ForCausalLM": "hyperclovax",
    "DeepseekForCausalLM": "deepseek",
}
"""Model type of the config class of architectures whose name is not that of a class in transformers."""

STATED: dict[str, dict[str, Any]] = {
    "afmoe": {"score_func": "sigmoid", "route_norm": True, "route_scale": 1.0, "n_group": 1, "topk_group": 1},
    "chatglm": {"original_rope": True},
    "lfm2": {"block_dim": 2560, "block_norm_eps": 1e-05, "conv_dim": 2560, "conv_dim_out": 2560},
    "deepseek_v2": {"n_group": 1, "topk_group": 1},
    "dbrx": {"attn_config": {"rope_theta": 500000, "kv_n_heads": 8, "clip_qkv": 8}},
    "glm4_moe": {"head_dim": 128},
    "glm4_moe_lite": {"first_k_dense_replace": 1},
    "glm4v_moe": {"text_config": {"head_dim": 128}},
    "gte": {"position_embedding_type": "rope"},
    "hunyuan_v1_dense": {"rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0}},
    "hunyuan_v1_moe": {"rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0}},
    "hy_v3": {"first_k_dense_replace": 1},
    "kimi_vl": {"text_config": {"n_group": 1, "topk_group": 1}},
    "lfm2_vl": {"text_config": {"block_dim": 2560, "block_norm_eps": 1e-05, "conv_dim": 2560, "conv_dim_out": 2560}},
    "longcat_flash": {"mla_scale_q_lora": True, "mla_scale_kv_lora": True},
    "nemotron": {"num_key_value_heads": 8},
    "nomic_bert": {"activation_function": "swiglu", "position_embedding_type": "rope"},
    "qwen3_omni_moe": {"thinker_config": {"vision_config": {"image_size": 768}}},
    "qwen3_vl_moe": {"text_config": {"norm_topk_prob": True}},
    "voxtral": {"audio_config": {"downsample_factor": 4}},
    "voxtral_realtime": {"audio_config": {"downsample_factor": 4}},
    "xlm-roberta": {"position_embedding_type": "absolute"},
    "qwen4_exp": {"output_gate_type": "swish"},
}
"""Values by model type that vLLM requires and the config class does not have. They are those of a released model, as
far as we know."""

BIDIRECTIONAL = {"pooling": "avg"}
"""A value of models whose architecture has "Bidirectional" in its name."""

DRAFTS = ("MTP", "Eagle", "EAGLE", "DFlash", "DSpark", "Medusa", "LiLiCorr", "ExtractHiddenStates")
"""Parts of the names of draft models. vLLM runs them beside the model that they draft for."""

UNUSED = {
    "transformers_version",
    "_name_or_path",
    "use_cache",
    "id2label",
    "label2id",
    "initializer_range",
    "initializer_factor",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "attention_dropout",
    "hidden_dropout",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "classifier_dropout",
    "dropout",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
    "router_aux_loss_coef",
    "output_router_logits",
    "return_dict",
    "chunk_size_feed_forward",
    "output_hidden_states",
    "output_attentions",
    "problem_type",
    "begin_suppress_tokens",
    "suppress_tokens",
    "router_jitter_noise",
    "activation_dropout",
    "layerdrop",
    "encoder_layerdrop",
    "decoder_layerdrop",
}
"""Keys that change neither sizes nor kinds of layers."""


def configurations() -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Yield each architecture of vLLM's registry with its config.json, or with the reason why it has none."""
    from vllm.model_executor.models.registry import ModelRegistry

    for architecture, _entry in sorted(ModelRegistry.models.items()):
        if any(part in architecture for part in DRAFTS):
            yield architecture, "it is a draft model, which vLLM runs beside the model that it drafts for"
        elif architecture.startswith("Transformers"):
            yield architecture, "it runs transformers' code for any architecture"
        elif (cls := config_class(architecture)) is None:
            yield architecture, "its config class is only in the model's repository"
        else:
            try:
                yield architecture, default_config(architecture, cls)
            except Exception as error:  # noqa: BLE001 - whatever a config class raises without arguments
                yield architecture, f"its config class has no defaults: {type(error).__name__}: {error}"[:200]


def config_class(architecture: str) -> type | None:
    """Return the config class of an architecture, or None if neither transformers nor vLLM has one."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    model_type = MODEL_TYPES.get(architecture)
    cls: type | None = getattr(getattr(transformers, architecture, None), "config_class", None)
    model_type = model_type or getattr(cls, "model_type", None)
    for registry in (_CONFIG_REGISTRY, CONFIG_MAPPING):  # neither has a working get()
        if model_type in registry:
            return registry[model_type]
    return cls


def default_config(architecture: str, cls: Any) -> dict[str, Any]:
    """Return the config.json of a model with the defaults of its config class, in bfloat16."""
    try:
        instance = cls()
    except Exception:  # noqa: BLE001 - some composite classes need their parts
        instance = cls(**_parts(cls))
    config = {"architectures": [architecture], "model_type": cls.model_type, "dtype": "bfloat16"}
    stated = _merged(_without_unused(instance.to_diff_dict()), STATED.get(cls.model_type, {}))
    stated |= BIDIRECTIONAL if architecture.startswith("LlamaBidirectional") else {}
    return config | {key: value for key, value in stated.items() if key not in config}


def _merged(values: dict[str, Any], added: dict[str, Any]) -> dict[str, Any]:
    for key, value in added.items():
        inner = values.get(key)
        values[key] = _merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return values


def _parts(cls: Any) -> dict[str, Any]:
    """Return the configs of a composite class's parts, each with the defaults of its class."""
    names = inspect.signature(cls.__init__).parameters
    parts = {name: part for name, part in (getattr(cls, "sub_configs", None) or {}).items() if name in names}
    return {name: part() for name, part in parts.items() if not part.__name__.startswith("Auto")}


def _without_unused(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_unused(inner) for key, inner in value.items() if key not in UNUSED}
    return value
