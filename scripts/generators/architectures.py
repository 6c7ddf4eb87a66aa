"""Generate architectures.json from the pinned vLLM's own registry: ``generators/architectures.py [OUT]``.

An installation without vLLM and transformers uses this file to refuse a model that vLLM cannot run, before it downloads
anything. This script loads every model class, which takes some minutes.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

OUT = Path(__file__).parents[1] / "vllm_launch/engine/architectures.json"

KEYS = [
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "tie_word_embeddings",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "sliding_window_pattern",
    "attention_bias",
    "num_local_experts",
    "num_experts",
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "kv_lora_rank",
    "q_lora_rank",
    "qk_rope_head_dim",
    "qk_nope_head_dim",
    "v_head_dim",
    "attention_chunk_size",
    "intermediate_size_mlp",
    "interleave_moe_layer_step",
    "num_kv_shared_layers",
    "mlp_bias",
    "use_qk_norm",
]


def defaults() -> dict[str, dict[str, object]]:
    """Return, by model type, the values that transformers' config classes fill in for keys missing in a config.json."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: PLC0415

    table = {}
    for model_type in sorted(CONFIG_MAPPING.keys()):
        cls = CONFIG_MAPPING[model_type]
        names = {key: (cls.attribute_map or {}).get(key, key) for key in KEYS}
        row: dict[str, object] = {key: getattr(cls, name, None) for key, name in names.items()}
        row = {key: value for key, value in row.items() if isinstance(value, bool | int | float)}
        row |= {f"@{key}": name for key, name in names.items() if name != key}
        if row:
            table[model_type] = row
    return table


def main(out: Path) -> None:
    """Write architectures.json to ``out``: one architecture per line, with the list of its true flags."""
    os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")
    import transformers  # noqa: PLC0415
    from vllm import __version__  # noqa: PLC0415, TID251 - a development script may import vLLM
    from vllm.config.model import iter_architecture_defaults  # noqa: PLC0415, TID251
    from vllm.model_executor.models import registry  # noqa: PLC0415, TID251

    fallback = {
        "generate": set(registry._TEXT_GENERATION_MODELS) | set(registry._MULTIMODAL_MODELS),  # noqa: SLF001
        "pooling": set(registry._EMBEDDING_MODELS),  # noqa: SLF001
        "multimodal": set(registry._MULTIMODAL_MODELS),  # noqa: SLF001
    }
    known: dict[str, list[str]] = {}
    for name, lazy in sorted(registry.ModelRegistry.models.items()):
        try:
            info = registry._ModelInfo.from_model_cls(lazy.load_model_cls())  # noqa: SLF001
        except Exception as error:  # noqa: BLE001 - importing some needs GPU libraries
            print(f"{name}: cannot be loaded here ({error}). Its flags come from vLLM's lists", file=sys.stderr)
            known[name] = [flag for flag, names in fallback.items() if name in names]
            continue
        flags = {
            "generate": info.is_text_generation_model,
            "pooling": info.is_pooling_model,
            "multimodal": info.supports_multimodal,
            "hybrid": info.is_hybrid,
            "attention_free": info.is_attention_free,
            "pipeline": info.supports_pp,
            "transcription_only": info.supports_transcription_only,
            "encoder_only": info.attn_type == "encoder_only",
        }
        known[name] = [flag for flag, true in flags.items() if true]
    backend = []
    for name in sorted(dir(transformers)):
        cls = getattr(transformers, name, None) if name.endswith(("ForCausalLM", "ForConditionalGeneration")) else None
        if (
            name not in known
            and isinstance(cls, type)
            and issubclass(cls, transformers.PreTrainedModel)
            and cls.is_backend_compatible()
        ):
            backend.append(name)
    document = {
        "vllm": __version__.partition("+")[0],
        "transformers": transformers.__version__,
        "made_by": "make generate",
        "suffixes": [[suffix, list(task)] for suffix, task in iter_architecture_defaults()],
        "removed": registry._PREVIOUSLY_SUPPORTED_MODELS,  # noqa: SLF001
        "plugins": registry._OOT_SUPPORTED_MODELS,  # noqa: SLF001
        "transformers_backend": backend,
        "defaults": defaults(),
    }
    head = json.dumps(document)[:-1]
    rows = ",\n".join(f"{json.dumps(name)}: {json.dumps(flags)}" for name, flags in known.items())
    out.write_text(f'{head}, "architectures": {{\n{rows}\n}}}}\n')


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else OUT)
