"""Ask the pinned vLLM what it makes of models' configurations: ``generators/model_facts.py OUT FOLDER...``.

For each folder with a config.json, one line of JSON: the maximum length, the dtype, the bytes of the parameters, the KV
cache of each layer, and the tokens that vLLM counts in a KV cache of ``KV_BYTES``. vLLM's own classes are built on the
meta device (paper_gpu.py), on one H200 and with vLLM's defaults, so this needs neither weights nor a GPU.
"""

# ruff: noqa: PLC0415, TID251 - vLLM may only be imported after pretend_h200

from __future__ import annotations

import json
import socket
import sys
import traceback
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from paper_gpu import on_meta, pretend_h200, replace_tokenizer

KV_BYTES = 40 << 30
HUB_BASES = {"dots_ocr": "qwen2", "mimo": "qwen2"}
"""Model types whose config class, in the model's repository, is a subclass of that of the other type."""

NESTED = {"text_config", "llm_config", "language_config"}
"""Keys of the language model's config in a composite model's."""

HUB_NAMES = {"new": "NewConfig"}
"""Names of config classes in models' repositories, where vLLM asks for the name (model_executor/models/config.py)."""

_SKIPPED: list[str] = []
"""Model types of the towers that the last model would have with the package timm. vLLM does not require it."""

SPEC_FIELDS = (
    "block_size", "page_size_bytes", "num_kv_heads", "head_size", "head_size_v", "sliding_window",
    "attention_chunk_size", "tokens_per_state", "shapes",
)  # fmt: skip


def facts(folder: Path) -> dict[str, Any]:
    """Return what vLLM derives from the model in ``folder``. Raises what vLLM raises."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import destroy_model_parallel, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.platforms import current_platform
    from vllm.utils.torch_utils import set_default_torch_dtype
    from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts, resolve_kv_cache_layout
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.worker.gpu.attn_utils import get_kv_cache_spec

    _SKIPPED.clear()
    _register_unknown_type(folder)
    config = EngineArgs(model=str(folder), load_format="dummy", skip_tokenizer_init=True).create_engine_config()
    model_config = config.model_config
    row: dict[str, Any] = {
        "architecture": model_config.architectures[0],
        "max_model_len": model_config.max_model_len,
        "dtype": str(model_config.dtype).removeprefix("torch."),
        "quantization": model_config.quantization,
        "runner": model_config.runner_type,
        "chunked_prefill": config.scheduler_config.enable_chunked_prefill,
        "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
    }
    with set_current_vllm_config(config):
        destroy_model_parallel()
        initialize_model_parallel()
        with on_meta(), set_default_torch_dtype(model_config.dtype):
            model = initialize_model(config)
        current_platform.update_block_size_for_backend(config)
        specs = get_kv_cache_spec(config)
        parameters = list(model.parameters())
        row["weights"] = _size(parameters)
        row["tower"] = _size(parameters) - _size(_language_parameters(model))
        if _SKIPPED:  # only the language model can be compared
            row["weights"], row["tower"] = row["weights"] - row["tower"], 0
        row["caches"] = _grouped(specs)
        if specs:
            layers = config.compilation_config.static_forward_context
            layouts = get_supported_kv_cache_layouts({layers[name].get_attn_backend() for name in specs})
            resolve_kv_cache_layout(config, [[layout.name for layout in layouts]], specs.values())
            row["layout"] = config.cache_config.kv_cache_layout
            row["tokens"] = _tokens(kv_cache_utils, config, specs)
    return row


def _skip_timm() -> None:
    """Let models have an empty module instead of a tower of timm, and note its type in ``_SKIPPED``."""
    import torch
    from transformers import AutoModel

    build = AutoModel.from_config

    def from_config(config: Any, **options: Any) -> Any:
        try:
            return build(config, **options)
        except ImportError as error:
            if "timm" not in str(error):
                raise
            _SKIPPED.append(config.model_type)
            return torch.nn.Module()

    AutoModel.from_config = staticmethod(from_config)


def _size(parameters: Iterable[Any]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in parameters)


def _language_parameters(model: Any) -> list[Any]:
    """Return the parameters of the language model without towers. All, if the model has no towers."""
    from vllm.model_executor.models.interfaces import supports_multimodal

    if not supports_multimodal(model):
        return list(model.parameters())
    try:
        language = list(model.get_language_model().parameters())
    except NotImplementedError:
        return list(model.parameters())
    if len(language) == len(list(model.parameters())) and hasattr(model, "get_mm_mapping"):
        # The tower is a part of the language model, as in GLM-4V.
        towers = tuple(name.rpartition(".")[0] + "." for name in model.get_mm_mapping().tower_model if "." in name)
        return [value for name, value in model.named_parameters() if not name.startswith(towers)]
    known = {id(parameter) for parameter in language}
    head = [value for name, value in model.named_parameters() if name.startswith("lm_head") and id(value) not in known]
    return language + head


def _tokens(kv_cache_utils: Any, config: Any, specs: dict[str, Any]) -> int:
    """Return the tokens of a KV cache of KV_BYTES, or 0 if vLLM refuses to start with it."""
    try:
        configs = kv_cache_utils.get_kv_cache_configs(config, [dict(specs)], [KV_BYTES])
    except ValueError as error:
        if "To serve at least one request" in str(error):
            return 0
        raise
    merged = kv_cache_utils.generate_scheduler_kv_cache_config(configs)
    tokens, _ = kv_cache_utils.get_kv_cache_capacity(config, merged)
    return int(tokens)


def _grouped(specs: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the distinct specs, each with the number of its layers."""
    counts: Counter[str] = Counter()
    for spec in specs.values():
        values = {field: getattr(spec, field, None) for field in SPEC_FIELDS}
        stated = {field: value for field, value in values.items() if value is not None}
        counts[json.dumps({"type": type(spec).__name__} | stated, default=str)] += 1
    return [{"layers": count} | json.loads(spec) for spec, count in counts.items()]


class _Block(dict[str, Any]):
    """A JSON object whose values are attributes too, as in DeciLM's ``block_configs``."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def _register_unknown_type(folder: Path) -> None:
    """Let a model type whose config class is only on the hub have a class that holds what config.json says."""
    from transformers import AutoConfig, PreTrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    def init(self: Any, **values: Any) -> None:
        values = {name: nested(name, value) for name, value in values.items()}
        if not NESTED & values.keys():  # else only the language model's value counts, as in transformers' base class
            values = {"tie_word_embeddings": False} | values
        for name, value in values.items():
            setattr(self, name, value)
        PreTrainedConfig.__init__(self, **values)

    def nested(name: str, value: Any) -> Any:
        if name == "block_configs":
            return json.loads(json.dumps(value), object_hook=_Block)
        if not isinstance(value, dict) or not {"hidden_size", "d_model"} & value.keys():
            return value
        known = value.get("model_type") in CONFIG_MAPPING
        return AutoConfig.for_model(**value) if known else hub_config("")(**value)

    def hub_config(model_type: str) -> Any:
        if base := HUB_BASES.get(model_type):
            return type("HubConfig", (CONFIG_MAPPING[base],), {"model_type": model_type})
        defaults = {"model_type": model_type, "rope_theta": 10000.0}
        names = {"num_hidden_layers": "num_layers"} if model_type == "exaone" else {}
        class_name = HUB_NAMES.get(model_type, "HubConfig")
        return type(class_name, (PreTrainedConfig,), {**defaults, "attribute_map": names, "__init__": init})

    model_type = json.loads((folder / "config.json").read_text()).get("model_type")
    if model_type and model_type not in CONFIG_MAPPING and model_type not in _CONFIG_REGISTRY:
        AutoConfig.register(model_type, hub_config(model_type))


def start() -> None:
    """Prepare this process for ``facts``: vLLM on an H200, in a group of one process."""
    pretend_h200()
    replace_tokenizer()
    _skip_timm()
    from vllm.config.model import ModelConfig
    from vllm.distributed import init_distributed_environment

    # Some processors need a tokenizer to answer.
    ModelConfig._supports_multimodal_inputs = lambda config: config.is_multimodal_model  # noqa: SLF001
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    init_distributed_environment(1, 0, f"tcp://127.0.0.1:{port}", 0, "gloo")


def main(out: Path, folders: list[Path]) -> None:
    """Append one line for each folder to ``out``."""
    start()
    with out.open("a") as file:
        for folder in folders:
            row: dict[str, Any] = {"model": folder.name}
            try:
                row |= facts(folder)
            except Exception as error:  # noqa: BLE001 - whatever a model's code raises is the row
                row |= {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc(limit=-6)}
            file.write(json.dumps(row) + "\n")
            file.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(argument) for argument in sys.argv[2:]])
