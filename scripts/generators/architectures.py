"""Generate architectures.json from the pinned vLLM's own registry: ``generators/architectures.py [OUT]``.

An installation without vLLM and transformers uses this file to refuse a model that vLLM cannot run, before it downloads
anything. This script loads every model class, which takes some minutes.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import os
import sys
from pathlib import Path

from paper_gpu import TORCHVISION, StandIns

from vllm_launch.model.config import Config

OUT = Path(__file__).parents[1] / "vllm_launch/engine/architectures.json"

READER = Path(__file__).parents[1] / "vllm_launch/model"
GETTERS = {name for name in vars(Config) if not name.startswith("_")} - {"error"}
"""The methods that read a key."""


def keys() -> list[str]:
    """Return the keys of config.json that the launcher's own model reader reads."""
    found: set[str] = set()
    for path in READER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(func=ast.Attribute(attr=name), args=arguments) if name in GETTERS:
                    read: list[ast.AST] = list(arguments)
                case ast.Assign(targets=[ast.Name(id=name)], value=value) if name.endswith("_KEYS"):
                    read = [value]
                case _:
                    continue
            constants = (inner for argument in read for inner in ast.walk(argument) if isinstance(inner, ast.Constant))
            found |= {constant.value for constant in constants if isinstance(constant.value, str)}
    return sorted(found)


def defaults() -> dict[str, dict[str, object]]:
    """Return, by model type, what config classes fill in for keys that a config.json omits.

    vLLM's own classes go before those of transformers (vllm/transformers_utils/config.py:_CONFIG_REGISTRY). An entry
    ``@key`` is another name under which the class stores the key. ``nested_model_type`` is the model type of
    a nested config that states none. Values that a class computes from other values are not in the table.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: PLC0415
    from vllm.transformers_utils.config import _CONFIG_REGISTRY  # noqa: PLC0415, TID251

    table = {}
    read = keys()
    for model_type in sorted({*CONFIG_MAPPING.keys(), *_CONFIG_REGISTRY.keys()}):
        registry = _CONFIG_REGISTRY if model_type in _CONFIG_REGISTRY else CONFIG_MAPPING
        cls = registry[model_type]
        names = {key: (cls.attribute_map or {}).get(key, key) for key in read}
        stated = {key: default_of(cls, name) for key, name in names.items()}
        row: dict[str, object] = {key: value for key, value in stated.items() if isinstance(value, bool | int | float)}
        row |= {f"@{key}": name for key, name in names.items() if name != key}
        row |= layer_pattern(cls)
        nested = (cls.sub_configs or {}).get("text_config")
        if nested is not None and getattr(nested, "model_type", ""):
            row["nested_model_type"] = nested.model_type
        table[model_type] = row
    return table


def layer_pattern(cls: type) -> dict[str, object]:
    """Return ``layer_types``, one period of what a config class computes, and ``last_layer_type`` if the last differs.

    {} if the class computes none, or if no period fits.
    """
    lengths = (24, 25)
    try:
        short, long = (list(cls(num_hidden_layers=length).layer_types) for length in lengths)
    except Exception:  # noqa: BLE001 - some classes need arguments, and many compute no types
        return {}
    for period in range(1, 13):
        last = short[-1]
        if all(
            types[:-1] == [types[n % period] for n in range(len(types) - 1)] and types[-1] == last
            for types in (short, long)
        ):
            row: dict[str, object] = {"layer_types": short[:period]}
            ends = {short[(length - 1) % period] for length in lengths}
            return row if ends == {last} else row | {"last_layer_type": last}
        if all(types == [types[n % period] for n in range(len(types))] for types in (short, long)):
            return {"layer_types": short[:period]}
    return {}


def default_of(cls: type, name: str) -> object:
    """Return the constant default of a config class for ``name``, or None if it has none or computes it."""
    parameter = inspect.signature(cls.__init__).parameters.get(name)  # type: ignore[misc] - only read
    if parameter is not None and parameter.default is not inspect.Parameter.empty:
        value: object = parameter.default
    else:
        value = inspect.getattr_static(cls, name, None)
    return value


def main(out: Path) -> None:
    """Write architectures.json to ``out``: one architecture per line, with the list of its true flags."""
    os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")
    import transformers  # noqa: PLC0415

    if importlib.util.find_spec("torchvision") is None:  # vLLM's package for the CPU does without it
        sys.meta_path.append(StandIns(TORCHVISION))
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
            "pools_cls": info.default_seq_pooling_type == "CLS",
            "pools_mean": info.default_seq_pooling_type == "MEAN",
            "pools_step": info.default_tok_pooling_type == "STEP",
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
