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

MOE_LAYERS_OF_STEP3 = ",".join(str(layer) for layer in range(4, 60))

QWEN4_TEXT = {
    "output_gate_type": "silu",
    "rope_parameters": {"partial_rotary_factor": 0.25},
    "indexer_n_heads": 32,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 128,
    "indexer_budget": 2048,
    "indexer_compress_ratio": 16,
}

ABSENT = "(absent)"
"""Stands in STATED for a key that the hub's config.json does not have."""

DEEPSEEK_OCR: dict[str, Any] = {
    "projector_config": {"input_dim": 2048, "n_embed": 1280, "projector_type": "linear"},
    "language_config": {
        "vocab_size": 129280,
        "hidden_size": 1280,
        "intermediate_size": 6848,
        "num_hidden_layers": 12,
        "num_attention_heads": 10,
        "num_key_value_heads": 10,
        "kv_lora_rank": None,
        "qk_nope_head_dim": 0,
        "qk_rope_head_dim": 0,
        "v_head_dim": 0,
        "use_mla": False,
        "moe_intermediate_size": 896,
        "first_k_dense_replace": 1,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "n_group": 1,
        "topk_group": 1,
        "max_position_embeddings": 8192,
        "lm_head": True,
    },
}

STATED: dict[str, dict[str, Any]] = {
    "afmoe": {"score_func": "sigmoid", "route_norm": True, "route_scale": 1.0, "n_group": 1, "topk_group": 1},
    "chatglm": {"original_rope": True},
    "lfm2": {"block_dim": 2560, "block_norm_eps": 1e-05, "conv_dim": 2560, "conv_dim_out": 2560},
    "deepseek_v2": {"n_group": 1, "topk_group": 1},
    "dbrx": {"attn_config": {"rope_theta": 500000, "kv_n_heads": 8, "clip_qkv": 8}},
    "glm4_moe": {"head_dim": 128},
    "glm4_moe_lite": {"first_k_dense_replace": 1},
    "glm4v_moe": {"text_config": {"head_dim": 128, "use_qk_norm": False}},
    "gte": {"position_embedding_type": "rope"},
    "hunyuan_v1_dense": {
        "head_dim": 128,
        "attention_head_dim": 128,
        "use_qk_norm": True,
        "use_cla": False,
        "rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0},
    },
    "hunyuan_v1_moe": {
        "head_dim": 128,
        "attention_head_dim": 128,
        "use_qk_norm": True,
        "use_cla": False,
        "intermediate_size": 3072,
        "num_experts": 64,
        "moe_topk": [8] * 32,
        "moe_intermediate_size": [3072] * 32,
        "num_shared_expert": [1] * 32,
        "use_mixed_mlp_moe": True,
        "rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0},
    },
    "hy_v3": {"first_k_dense_replace": 1, "expert_hidden_dim": 1536, "route_norm": True},
    "kimi_vl": {"text_config": {"n_group": 1, "topk_group": 1}},
    "lfm2_vl": {"text_config": {"block_dim": 2560, "block_norm_eps": 1e-05, "conv_dim": 2560, "conv_dim_out": 2560}},
    "longcat_flash": {"mla_scale_q_lora": True, "mla_scale_kv_lora": True, "zero_expert_type": "identity"},
    "nemotron": {"num_key_value_heads": 8},
    "nomic_bert": {
        "activation_function": "swiglu",
        "position_embedding_type": "rope",
        "mlp_fc1_bias": False,
        "mlp_fc2_bias": False,
        "qkv_proj_bias": False,
        "rotary_emb_base": 1000,
        "rotary_emb_fraction": 1.0,
        "rotary_emb_scale_base": None,
        "rotary_emb_interleaved": False,
        "layer_norm_epsilon": 1e-12,
        "n_inner": 3072,
        "n_embd": 768,
        "n_layer": 12,
        "max_trained_positions": 2048,
    },
    "qwen3_omni_moe": {
        "thinker_config": {
            "vision_config": {"image_size": 768, "apply_vit_abs_pos_embed": True, "out_hidden_size": 2048},
            "audio_config": {"output_dim": 2048},
            "text_config": {
                "vocab_size": 152064,
                "num_hidden_layers": 48,
                "num_attention_heads": 32,
                "head_dim": 128,
                "tie_word_embeddings": False,
            },
        }
    },
    "qwen3_vl_moe": {"text_config": {"norm_topk_prob": True}},
    "voxtral": {
        "audio_config": {
            "downsample_factor": 4,
            "window_size": 400,
            "hop_length": 160,
            "sampling_rate": 16000,
            "chunk_length_s": 30,
            "global_log_mel_max": None,
        }
    },
    "voxtral_realtime": {"audio_config": {"downsample_factor": 4}},
    "bailing_moe_v3_vl": {"text_config": {"no_kda_lora": True}},
    "xlm-roberta": {"position_embedding_type": "absolute"},
    "qwen4_exp_text": QWEN4_TEXT,
    "qwen4_exp": {
        "text_config": QWEN4_TEXT,
        "vision_config": {"deepstack_visual_indexes": []},
    },
    "glm5_next": {
        "text_config": {
            "mhc": True,
            "mla_use_nope": True,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "indexer_rope_interleave": True,
            "index_topk_freq": 1,
            "num_nextn_predict_layers": 0,
        }
    },
    "granite4_vision": {
        "downsample_rate": "4/8",
        "text_config": {
            "model_type": "granite",
            "residual_multiplier": 0.22,
            "embedding_multiplier": 12.0,
            "logits_scaling": 8.0,
            "attention_multiplier": 0.015625,
        },
        "deepstack_layer_map": [[-9, 0], [-6, 4], [-3, 8], [-1, 12]],
        "vision_config": {
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 384,
            "patch_size": 16,
        },
        "qformer_config": {
            "hidden_size": 1152,
            "num_attention_heads": 18,
            "encoder_hidden_size": 1152,
            "intermediate_size": 3072,
        },
    },
    "step3_text": {"moe_layers_enum": MOE_LAYERS_OF_STEP3},
    "step3_vl": {"text_config": {"architectures": ["Step3TextForCausalLM"], "moe_layers_enum": MOE_LAYERS_OF_STEP3}},
    "ultravox": {"vocab_size": 32000, "text_config": {"model_type": "llama"}, "wrapped_model_config": ABSENT},
    "deepseek_vl_v2": {
        "tile_tag": "2D",
        "language_config": {
            "model_type": "deepseek_v2",
            "hidden_size": 2048,
            "intermediate_size": 10944,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 6,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "moe_intermediate_size": 1408,
            "q_lora_rank": None,
            "kv_lora_rank": 512,
            "max_position_embeddings": 4096,
        },
        "text_config": ABSENT,
    },
    "DeepseekOCRForCausalLM": DEEPSEEK_OCR,
    "DeepseekOCR2ForCausalLM": DEEPSEEK_OCR,
    "ChatGLMForConditionalGeneration": {"tie_word_embeddings": False},
    "Qwen3ASRForcedAlignerForTokenClassification": {"thinker_config": {"classify_num": 5000}},
    "gemma4_unified": {"vision_config": {"model_type": "gemma4_unified_vision"}},
}
"""Values by model type or architecture that vLLM requires and the config class does not have.

They are those of a released model, as far as we know.
"""

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
    stated = _without_unused(instance.to_diff_dict())
    for name in (cls.model_type, architecture):
        stated = _merged(stated, STATED.get(name, {}))
    stated |= BIDIRECTIONAL if architecture.startswith("LlamaBidirectional") else {}
    return config | {key: value for key, value in stated.items() if key not in config}


def _merged(values: dict[str, Any], added: dict[str, Any]) -> dict[str, Any]:
    for key, value in added.items():
        if value == ABSENT:
            values.pop(key, None)
            continue
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
