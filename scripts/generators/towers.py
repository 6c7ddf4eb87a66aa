"""Generate towers.json: the parameters of vision and audio towers as formulas of config.json's keys.

``generators/towers.py [OUT [ARCHITECTURE...]]``. A model's tower is what it has besides its language model. vLLM's own
classes are built on the meta device (paper_gpu.py): once for the defaults of the config class, and once for each key
with another value. tower_samples.json has values for configurations that the defaults do not describe.
"""

# ruff: noqa: PLC0415, TID251 - vLLM may only be imported after pretend_h200

from __future__ import annotations

import copy
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from encoder_memory import bytes_per_token, replace_kernels
from paper_gpu import on_meta, pretend_h200, replace_tokenizer
from tower_formulas import Change, Formulas

OUT = Path(__file__).parents[1] / "vllm_launch/engine/towers.json"
SAMPLES = Path(__file__).with_name("tower_samples.json")
PORT = 29578

LANGUAGE_MODEL = re.compile(r"^(?:language_model|llm|lm_head|model\.(?:language_model|layers|norm|embed_tokens))\.")
TEXT_CONFIGS = {"text_config", "llm_config", "language_config"}
NOT_SIZES = re.compile(
    r"token|_ids?$|_idx$|dropout|range|eps$|theta|std$|version|seed|vocab|talker|token2wav|layer_type"
)
"""Keys that decide no shape in a tower, or that no other value may replace."""

HEADS = re.compile(r"(?:^|_)(?:heads|key_value_heads)$")
"""Keys of numbers of heads. Some classes refuse a larger hidden size without more heads."""

MODALITIES = ("image", "video", "audio")


class Row(NamedTuple):
    """Parameters of one shape, whose names differ only in the numbers of layers."""

    count: int
    shape: tuple[int, ...]
    split: bool  # over the ranks of tensor parallelism


def main(out: Path, only: set[str]) -> None:
    """Write the formulas of all architectures, or of ``only``, to ``out``. Print the architectures left out."""
    if importlib.util.find_spec("torchvision") is None:
        sys.exit("towers.py: most models cannot be built without torchvision: install it, of the version for torch")
    pretend_h200()
    replace_tokenizer()
    replace_kernels()
    from vllm import __version__
    from vllm.config.model import ModelConfig
    from vllm.distributed import init_distributed_environment

    ModelConfig._supports_multimodal_inputs = lambda _: True  # noqa: SLF001 - some processors need a tokenizer to answer
    init_distributed_environment(1, 0, f"tcp://127.0.0.1:{PORT}", 0, "gloo")
    towers, refused = {}, without_torchvision()
    for name, config in configurations():
        if only and name not in only:
            continue
        try:
            towers[name] = describe(config) | {"needs_torchvision": name.partition("|")[0] in refused}
        except Exception as error:  # noqa: BLE001 - whatever a model's code raises, the architecture is left out
            print(f"{name}: cannot be built: {type(error).__name__}: {str(error)[:150]!r}", file=sys.stderr)
    rows = ",\n".join(f"{json.dumps(name)}: {json.dumps(tower)}" for name, tower in sorted(towers.items()))
    head = json.dumps({"vllm": __version__.partition("+")[0], "made_by": "make towers"})[:-1]
    out.write_text(f'{head}, "towers": {{\n{rows}\n}}}}\n')


def configurations() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each architecture with a config.json: a sample, or else the defaults of its config class.

    "architecture|type" is an architecture with a tower of another model type.
    """
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from vllm.model_executor.models import registry

    samples: dict[str, dict[str, Any]] = json.loads(SAMPLES.read_text())
    types: defaultdict[str, list[str]] = defaultdict(list)
    for mapping in (value for key, value in vars(modeling_auto).items() if key.endswith("_MAPPING_NAMES")):
        for model_type, names in mapping.items():
            for name in names if isinstance(names, tuple) else (names,):
                types[name].append(model_type)
    for name in dict.fromkeys([*samples, *(name for name in registry._MULTIMODAL_MODELS if name in types)]):  # noqa: SLF001
        architecture, sample = name.partition("|")[0], samples.get(name, {})
        model_type = sample.get("model_type") or types[architecture][0]
        values: dict[str, Any] = {"model_type": model_type}
        if model_type in CONFIG_MAPPING:
            values = json.loads(json.dumps(CONFIG_MAPPING[model_type]().to_dict(), default=str))
        yield name, merged(values, sample) | {"architectures": [architecture]}


IMPORTS = """
import importlib, sys
from vllm.model_executor.models import registry
for name, (module, _) in registry._MULTIMODAL_MODELS.items():
    try:
        importlib.import_module(module if "." in module else f"vllm.model_executor.models.{module}")
    except Exception as error:
        text = "".join(str(part) for part in (error, error.__cause__, error.__context__))
        print(f"REFUSED {name}" if "torchvision" in text or "Could not import module" in text else "")
"""


def without_torchvision() -> set[str]:
    """Return the architectures whose modules cannot be imported without torchvision."""
    paths = [
        path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if not Path(path, "torchvision").is_dir()
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    lines = subprocess.run(
        [sys.executable, "-c", IMPORTS], env=environment, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return {line.removeprefix("REFUSED ") for line in lines if line.startswith("REFUSED ")}


def merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``values`` with ``changes``. A nested object with a model type of its own replaces the whole object."""
    result = dict(values)
    for key, value in changes.items():
        inner = result.get(key)
        merges = isinstance(inner, dict) and isinstance(value, dict) and "model_type" not in value
        result[key] = merged(inner, value) if merges else value
    return result


def describe(config: dict[str, Any]) -> dict[str, Any]:
    """Return the formulas of an architecture's tower, and the values of the keys that they contain."""
    model, vllm_config = build(config)
    base = tower(model)
    if vllm_config.model_config.is_encoder_decoder or not base:
        raise ValueError("it has no tower beside a language model")
    changes = [change for path in sizes(config) if (change := changed(config, path, base))]
    formulas = Formulas(changes)
    missing = {modality: set(base) - set(tower(build(config, [modality])[0])) for modality in MODALITIES}
    missing["all"] = set(base) - set(tower(build(config, MODALITIES)[0]))
    rows = []
    for name, row in base.items():
        count = formulas.of(row.count, lambda rows, name=name: rows[name].count)
        shape = [
            formulas.of(size, lambda rows, name=name, axis=axis: rows[name].shape[axis])
            for axis, size in enumerate(row.shape)
        ]
        alone = [modality for modality in MODALITIES if name in missing[modality]]
        dropped = alone[:1] or (["image", "video"] if name in missing["all"] else [])
        rows.append([name, count, shape, "split" if row.split else "whole", dropped])
    return {
        "encoder_tp_data": bool(vllm_config.model_config._model_info.supports_multimodal_encoder_tp_data),  # noqa: SLF001
        "bytes_per_token": bytes_per_token(model, config),
        "keys": formulas.defaults,
        "tensors": rows,
    }


def changed(config: dict[str, Any], path: str, base: Mapping[str, Row]) -> Change | None:
    """Return what another value of the key ``path`` changes in the tower, or None if nothing or if vLLM refuses it."""
    value = at(config, path)
    for factor, with_heads in ((2, False), (2, True), (3, True)):
        other = copy.deepcopy(config)
        new = value[:-1] if isinstance(value, list) else value * factor
        put(other, path, new)
        if with_heads:
            holder = path.rpartition(".")[0]
            for key in [key for key in sizes(config) if key.rpartition(".")[0] == holder and HEADS.search(key)]:
                put(other, key, at(config, key) * factor)
        try:
            rows = tower(build(other)[0])
        except Exception:  # noqa: BLE001, S112 - vLLM refuses this value
            continue
        if rows.keys() != base.keys() or any(len(rows[name].shape) != len(base[name].shape) for name in base):
            continue
        if rows == base:
            return None
        old_size, new_size = (len(item) if isinstance(item, list) else item for item in (value, new))
        return Change(path, old_size, new_size, base, rows)
    return None


def sizes(config: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the paths of integers and of lists of integers outside the language model, and of its hidden size."""
    for key, value in config.items():
        path = f"{prefix}{key}"
        if key in TEXT_CONFIGS and isinstance(value, Mapping):
            if "hidden_size" in value:
                yield f"{path}.hidden_size"
        elif NOT_SIZES.search(key):
            continue
        elif isinstance(value, Mapping):
            yield from sizes(value, f"{path}.")
        elif (isinstance(value, int) and not isinstance(value, bool) and value > 0) or (
            isinstance(value, list) and len(value) > 1 and all(isinstance(item, int) for item in value)
        ):
            yield path


def at(config: Mapping[str, Any], path: str) -> Any:
    """Return the value at a path of keys with dots."""
    value: Any = config
    for key in path.split("."):
        value = value[key]
    return value


def put(config: dict[str, Any], path: str, value: object) -> None:
    """Set the value at a path of keys with dots."""
    holder, _, key = path.rpartition(".")
    (at(config, holder) if holder else config)[key] = value


def build(config: Mapping[str, Any], without: tuple[str, ...] | list[str] = ()) -> tuple[Any, Any]:
    """Return vLLM's model for ``config`` on the meta device, and its VllmConfig.

    ``without``: the modalities whose --limit-mm-per-prompt is 0.
    """
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import destroy_model_parallel, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    register_type(config)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        vllm_config = EngineArgs(
            model=folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=256,
            max_num_batched_tokens=65536,
            limit_mm_per_prompt=dict.fromkeys(without, 0),
        ).create_engine_config()
        with set_current_vllm_config(vllm_config):
            destroy_model_parallel()
            initialize_model_parallel()
            with on_meta(), set_default_torch_dtype(torch.bfloat16):
                model = initialize_model(vllm_config)
    return model, vllm_config


def register_type(config: Mapping[str, Any]) -> None:
    """Let a model type whose config class is only on the hub have a class that holds what config.json says."""
    from transformers import AutoConfig, PreTrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    class HubConfig(PreTrainedConfig):  # type: ignore[misc]
        model_type = config["model_type"]

        def __init__(self, **values: Any) -> None:
            for key, value in values.items():
                if isinstance(value, dict) and "model_type" in value:
                    known = value["model_type"] in CONFIG_MAPPING
                    values[key] = CONFIG_MAPPING[value["model_type"]](**value) if known else PreTrainedConfig(**value)
            super().__init__(**values)

    if HubConfig.model_type not in CONFIG_MAPPING and HubConfig.model_type not in _CONFIG_REGISTRY:
        AutoConfig.register(HubConfig.model_type, HubConfig)


def tower(model: Any) -> dict[str, Row]:
    """Return the parameters besides the language model's, with ``*`` for the numbers of layers in their names."""
    from vllm.model_executor.layers.linear import LinearBase, ReplicatedLinear

    language_model = model.get_language_model()
    language = set() if language_model is model else {id(parameter) for parameter in language_model.parameters()}
    if len(language) == len(list(model.parameters())) and hasattr(model, "get_mm_mapping"):
        # The tower is a part of the language model, as in GLM-4V.
        towers = tuple(name.rpartition(".")[0] + "." for name in model.get_mm_mapping().tower_model if "." in name)
        language -= {id(parameter) for name, parameter in model.named_parameters() if name.startswith(towers)}
    modules = dict(model.named_modules())
    counts: defaultdict[tuple[str, tuple[int, ...], bool], int] = defaultdict(int)
    for name, parameter in model.named_parameters():
        if id(parameter) in language or LANGUAGE_MODEL.search(name):
            continue
        module = modules[name.rpartition(".")[0]]
        split = isinstance(module, LinearBase) and not isinstance(module, ReplicatedLinear)
        split = split and not getattr(module, "disable_tp", False)
        counts[re.sub(r"\.\d+(?=\.)", ".*", name), tuple(parameter.shape), split] += 1
    rows: dict[str, Row] = {}
    for (name, shape, split), count in counts.items():
        number = sum(other.partition(" ")[0] == name for other in rows)
        rows[f"{name} {number}" if number else name] = Row(count, shape, split)
    return rows


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else OUT, set(sys.argv[2:]))
