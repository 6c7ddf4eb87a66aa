"""The methods of speculative decoding: which of them need GPU memory beside the model's. Pure.

Source: vllm/config/speculative.py (SpeculativeMethod, __post_init__) and engine/arg_utils.py:create_speculative_config.
"""

from __future__ import annotations

from collections.abc import Mapping

WITHOUT_DRAFT = frozenset({"ngram", "ngram_gpu", "suffix"})
"""Methods that guess tokens from the request's own text or from earlier answers."""

CHECKPOINT_LAYERS = frozenset(
    {"bailing_hybrid_mtp", "bailing_hybrid_v3_mtp", "deepseek_mtp", "dots3_note_mtp", "ernie_mtp", "exaone4_5_mtp",
     "exaone_moe_mtp", "gemma4_mtp", "glm4_moe_lite_mtp", "glm4_moe_mtp", "glm5_next_mtp", "glm_ocr_mtp", "hy_v3_mtp",
     "hy_v4_mtp", "inkling_mtp", "kimi_k3_mtp", "longcat_flash_mtp", "mimo_mtp", "mimo_v2_mtp", "minimax_m3_mtp", "mtp",
     "nemotron_h_mtp", "pangu_ultra_moe_mtp", "qwen3_5_mtp", "qwen3_next_mtp", "qwen4_exp_mtp", "step3p5_mtp"}
)  # fmt: skip
"""Methods that run extra layers of the model's own checkpoint (multi-token prediction)."""

DRAFT_MODEL = frozenset({"draft_model", "eagle", "eagle3", "medusa", "mlp_speculator", "dflash", "dspark"})
"""Methods that load the weights of a draft model or of a draft head."""

NEED_MODEL = (DRAFT_MODEL | {"custom_class"}) - {"dspark"}
"""Methods that need "model" in speculative_config. The weights of dspark can be in the checkpoint itself."""

HIDDEN_STATES = frozenset({"extract_hidden_states"})
"""Methods that keep hidden states of the model in the KV cache, without a draft."""

CUSTOM = frozenset({"custom_class"})
"""Methods whose code the user supplies."""

RUNNER_V1 = frozenset({"suffix", "medusa", "mlp_speculator", "custom_class"})
"""Methods for which vLLM uses model runner V1 (config/vllm.py:_get_v2_model_runner_unsupported_features)."""

_EXTRA = {
    CHECKPOINT_LAYERS: "the weights and the KV cache of the checkpoint's extra layers (multi-token prediction)",
    DRAFT_MODEL: "the weights and the KV cache of the draft model",
    HIDDEN_STATES: "the hidden states in the KV cache",
    CUSTOM: "the memory of your own class",
}

FLAGS = {"spec_method": "method", "spec_model": "model", "spec_tokens": "num_speculative_tokens"}
"""Options that set one key of speculative_config."""

SUFFIX_TOKENS = 24
"""Draft tokens of the method "suffix" if the user sets none: the default of suffix_decoding_max_tree_depth."""


def speculative_config(engine: Mapping[str, object]) -> dict[str, object]:
    """Return the user's speculative_config with the keys that other options set. Empty: no speculative decoding."""
    config = engine.get("speculative_config")
    keys = {str(key).replace("-", "_"): value for key, value in config.items()} if isinstance(config, dict) else {}
    return keys | {key: engine[dest] for dest, key in FLAGS.items() if engine.get(dest) is not None}


def method_of(config: Mapping[str, object]) -> str:
    """Return the method. Without one, vLLM takes it from the model's name, or else uses a draft model."""
    method = config.get("method")
    if isinstance(method, str) and method:
        return "ngram" if method == "[ngram]" else method
    model = str(config.get("model") or "")
    return "ngram" if model in {"ngram", "[ngram]"} else "draft_model"


def uncounted_memory(engine: Mapping[str, object]) -> str | None:
    """Return what the plan does not count for speculative decoding, or None if it needs no such memory."""
    config = speculative_config(engine)
    if not config:
        return None
    method = method_of(config)
    return next((what for methods, what in _EXTRA.items() if method in methods), None)


def needs_runner_v1(engine: Mapping[str, object]) -> bool:
    """Whether vLLM runs the user's method with model runner V1."""
    config = speculative_config(engine)
    return bool(config) and method_of(config) in RUNNER_V1


def draft_tokens(engine: Mapping[str, object]) -> int:
    """Return the number of draft tokens in each step of a request, or 0 without speculative decoding."""
    config = speculative_config(engine)
    tokens = config.get("num_speculative_tokens")
    if isinstance(tokens, int):
        return max(0, tokens)
    if config and method_of(config) == "suffix":
        depth = config.get("suffix_decoding_max_tree_depth", SUFFIX_TOKENS)
        return depth if isinstance(depth, int) else SUFFIX_TOKENS
    return 0
