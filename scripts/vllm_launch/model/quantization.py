"""Quantisation: vLLM's methods, the GPUs they need, and how each stores a linear layer. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from vllm_launch.engine.options import pinned_vllm
from vllm_launch.engine.removed import FOUR_BITS, REMOVED_METHODS
from vllm_launch.errors import UsageError
from vllm_launch.model.config import Config, short_repr
from vllm_launch.model.model import Quantization, Tensor

MIN_CAPABILITY: dict[str, tuple[int, int]] = {
    "awq": (7, 5), "auto_awq": (7, 5), "awq_marlin": (7, 5),
    "gptq": (6, 0), "auto_gptq": (6, 0), "gptq_marlin": (6, 0), "inc": (6, 0),
    "fp8": (7, 5), "fbgemm_fp8": (8, 0), "fp_quant": (10, 0),
    "modelopt": (8, 0), "modelopt_fp4": (7, 5), "modelopt_mxfp8": (8, 0), "modelopt_mixed": (7, 5), "mxfp8": (8, 0),
    "humming": (7, 5), "compressed-tensors": (7, 0), "experts_int8": (8, 0), "quark": (7, 0), "moe_wna16": (7, 0),
    "torchao": (7, 5), "mxfp4": (8, 0), "gpt_oss_mxfp4": (8, 0), "deepseek_v4_fp8": (7, 5), "online": (7, 5),
    "fp8_per_tensor": (7, 5), "fp8_per_block": (7, 5), "fp8_per_channel": (7, 5),
    "int8_per_channel_weight_only": (7, 5), "nvfp4_per_token": (7, 5),
}  # fmt: skip
"""The lowest compute capability of each method. Source: vllm/model_executor/layers/quantization/*,
``get_min_capability`` of the class that ``get_quantization_config`` returns for the name."""

MARLIN = (
    "use another checkpoint of the model: compressed-tensors, AWQ with 4 bits, or GPTQ with 4 or 8 bits, sym: true and "
    "desc_act: false"
)
"""Remedy for an AWQ or GPTQ checkpoint that vLLM's Marlin kernels do not support."""

SIZES: dict[str, tuple[int, int | None]] = {
    "mxfp4": (4, 32), "gpt_oss_mxfp4": (4, 32), "modelopt_fp4": (4, 16), "fp_quant": (4, 32),
    "nvfp4_per_token": (4, 16), "mxfp8": (8, 32), "modelopt_mxfp8": (8, 32),
}  # fmt: skip
"""(bits per weight, weights per scale) of methods with a fixed format. Other methods have 8 bits and no groups."""

DEPRECATED = {"fbgemm_fp8", "fp_quant"}
"""Methods that need --allow-deprecated-quantization (quantization/__init__.py: DEPRECATED_QUANTIZATION_METHODS)."""

MODELOPT = {
    "FP8": "modelopt", "FP8_PER_CHANNEL_PER_TOKEN": "modelopt", "FP8_PB_WO": "modelopt", "NVFP4": "modelopt_fp4",
    "MXFP8": "modelopt_mxfp8", "MIXED_PRECISION": "modelopt_mixed", "W4A16_NVFP4": "modelopt_fp4",
}  # fmt: skip
"""vLLM's method by Model Optimizer's ``quant_algo`` (model_arch_config_convertor.py:_normalize_quantization_config)."""


NESTED_MODELOPT = {"FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4"}
"""Algorithms that vLLM knows in Model Optimizer's older format, which nests them below "quantization"
(model_arch_config_convertor.py:_normalize_quantization_config)."""


def read_quantization(raw: Mapping[str, Any], hf_quant: Mapping[str, Any] | None, where: str) -> Quantization | None:
    """Return how the checkpoint is quantised, or None if it is not.

    ``raw`` is config.json, ``hf_quant`` is hf_quant_config.json, which counts only if config.json has no section.

    Raises:
        UsageError: the pinned vLLM does not support this method, or a value is wrong.
    """
    configs = [config for config in (raw, raw.get("text_config")) if isinstance(config, Mapping)]
    sections = [config.get(key) for config in configs for key in ("quantization_config", "compression_config")]
    section = next((section for section in (*sections, hf_quant or None) if section is not None), None)
    if section is None:
        return None
    if not isinstance(section, Mapping):
        raise UsageError(f"{where} key 'quantization_config'", f"is {short_repr(section)}, not an object", "correct it")
    config = Config(section, f"{where} quantization_config")
    inner = section.get("quantization") if isinstance(section.get("quantization"), Mapping) else {}
    method = config.text("quant_method").lower().replace("compressed_tensors", "compressed-tensors")
    algorithm = Config({**section, **(inner or {})}, config.where).text("quant_algo").upper()
    producer = section.get("producer")
    legacy = (
        isinstance(producer, Mapping) and producer.get("name") == "modelopt" and bool((inner or {}).get("quant_algo"))
    )
    nested = str((inner or {}).get("quant_algo") or "").upper()
    if (legacy or "modelopt_quant_config" in (inner or {})) and nested and nested not in NESTED_MODELOPT:
        problem = f"has the algorithm {short_repr(nested)} below the key quantization, where vLLM does not know it"
        raise UsageError(f"{where} quantization_config", problem, "use a newer upload of the model")
    if (method == "modelopt" or (method == "" and legacy)) and algorithm:
        method = MODELOPT.get(algorithm, "modelopt_mixed" if "MIXED" in algorithm else f"modelopt {algorithm}")
        config = Config({**section, **(inner or {})}, config.where)
    method = {"auto-round": "inc", "intel/auto-round": "inc"}.get(method, method)
    if method == "" and config.has("bits") and config.has("group_size"):
        problem = "has bits and group_size but no quant_method (an MLX checkpoint?). vLLM would read it as unquantised"
        raise UsageError(f"{where} quantization_config", problem, FOUR_BITS)
    if method == "":
        return None
    if method in REMOVED_METHODS:
        raise UsageError(
            f"{where} quant_method {method!r}", f"vLLM {pinned_vllm()} no longer supports it", REMOVED_METHODS[method]
        )
    if method not in MIN_CAPABILITY:
        raise UsageError(
            f"{where} quant_method {short_repr(method)}", f"vLLM {pinned_vllm()} does not support it", FOUR_BITS
        )
    return _read_method(method, config)


def _read_method(method: str, config: Config) -> Quantization:
    ignored = tuple(
        name
        for key in ("modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules", "exclude")
        for name in (config.strings(key) or [])
    )
    block = config.integers("weight_block_size")
    if block is not None and (len(block) != 2 or not all(block)):  # noqa: PLR2004 - output and input
        raise config.error("weight_block_size", f"is {short_repr(block)}, not two sizes")
    if method in {"awq", "auto_awq", "awq_marlin", "gptq", "auto_gptq", "gptq_marlin", "inc", "moe_wna16"}:
        bits = config.integer("bits", "w_bit", default=4)
        if bits not in {2, 3, 4, 8}:
            raise config.error("bits", f"is {bits}, not 2, 3, 4 or 8")
        whole_column = config.get("group_size", "q_group_size") == -1
        if feature := _unsupported(method, config, bits, whole_column=whole_column):
            problem = f"vLLM {pinned_vllm()} no longer supports {feature}"
            raise UsageError(f"{config.where} of {method}", problem, MARLIN)
        group = None if whole_column else config.integer("group_size", "q_group_size", default=128)
        return Quantization(method=method, bits=bits, group_size=group, ignored=ignored)
    if method == "compressed-tensors":
        return _compressed(config, ignored)
    if method == "modelopt_mixed":
        return _mixed(config, ignored)
    bits, group = SIZES.get(method, (8, None))
    return Quantization(
        method=method,
        bits=bits,
        group_size=group,
        block_shape=(block[0], block[1]) if block else None,
        ignored=ignored,
        kv_cache_dtype=_modelopt_cache(config) if method.startswith("modelopt") else None,
    )


def _mixed(config: Config, ignored: tuple[str, ...]) -> Quantization:
    """Return the quantisation of a Model Optimizer checkpoint whose modules have different algorithms.

    A module that ``quantized_layers`` does not name is not quantised (layers/quantization/modelopt.py:
    ModelOptMixedPrecisionConfig).
    """
    by_algorithm: dict[str, list[str]] = {}
    for module, scheme in (config.table("quantized_layers") or {}).items():
        algorithm = scheme.get("quant_algo") if isinstance(scheme, Mapping) else None
        if not isinstance(algorithm, str):
            raise config.error("quantized_layers", f"has no quant_algo for {short_repr(module)}")
        by_algorithm.setdefault(algorithm.upper(), []).append(module)
    own = []
    for algorithm, modules in by_algorithm.items():
        method = MODELOPT.get(algorithm)
        if method is None or method == "modelopt_mixed":
            raise config.error(
                "quantized_layers", f"has the algorithm {short_repr(algorithm)}, which vLLM does not know"
            )
        bits, group = SIZES.get(method, (8, None))
        own.append((tuple(modules), Quantization(method=method, bits=bits, group_size=group)))
    bits = min((scheme.bits for _, scheme in own), default=8)
    return Quantization(
        method="modelopt_mixed",
        bits=bits,
        ignored=ignored,
        own_schemes=tuple(own),
        all_linear=False,
        kv_cache_dtype=_modelopt_cache(config),
    )


def _unsupported(method: str, config: Config, bits: int, *, whole_column: bool) -> str | None:
    """Return the feature of an AWQ or GPTQ checkpoint that vLLM does not support, or None.

    For both methods vLLM has only Marlin kernels.
    Source: quantization/auto_awq.py, auto_gptq.py (TYPE_MAP), utils/gptq_utils.py:normalize_and_validate_gptq_desc_act.
    """
    if method.startswith(("awq", "auto_awq")):
        return None if bits == 4 else f"{bits} bits"  # noqa: PLR2004 - bits
    if not method.startswith(("gptq", "auto_gptq")):
        return None
    if bits not in {4, 8}:
        return f"{bits} bits"
    if config.flag("desc_act") and not whole_column:
        return "groups in activation order (desc_act: true)"
    return None if config.flag("sym", default=True) else "zero points (sym: false)"


def _modelopt_cache(config: Config) -> str | None:
    """Return the KV cache dtype that a Model Optimizer checkpoint requests, or None.

    Source: vllm/utils/torch_utils.py:get_kv_cache_quant_algo_string.
    """
    scheme = config.get("kv_cache_scheme", "kv_cache_quant_algo")
    if isinstance(scheme, Mapping):
        if scheme.get("type") != "float":
            return None
        if scheme.get("num_bits") == 8 and scheme.get("dynamic") is False:  # noqa: PLR2004 - bits of a byte
            return "fp8"
        return "nvfp4" if scheme.get("num_bits") == 4 else None  # noqa: PLR2004
    return scheme.lower() if isinstance(scheme, str) and scheme.lower() in {"fp8", "nvfp4"} else None


def _compressed(config: Config, ignored: tuple[str, ...]) -> Quantization:
    """Return the quantisation of a compressed-tensors checkpoint.

    A group whose target is a class of layers ("Linear") applies to each module that no other group names
    (layers/quantization/compressed_tensors/utils.py:find_matched_target).
    """
    groups = [
        Config(group if isinstance(group, Mapping) else {}, f"{config.where} config_groups")
        for group in (config.table("config_groups") or {}).values()
    ] or [Config({}, config.where)]
    scheme = config.table("kv_cache_scheme")
    schemes = [(tuple(group.strings("targets") or ("Linear",)), _group(config, group)) for group in groups]
    by_class = [quantization for targets, quantization in schemes if _is_class(targets)]
    first = by_class[0] if by_class else schemes[0][1]
    return msgspec.structs.replace(
        first,
        ignored=ignored,
        own_schemes=tuple(scheme for scheme in schemes if not _is_class(scheme[0])),
        all_linear=bool(by_class),
        kv_cache_dtype="fp8" if scheme and scheme.get("num_bits") == 8 else None,  # noqa: PLR2004
    )


def _is_class(targets: tuple[str, ...]) -> bool:
    """Whether targets name classes of layers, such as "Linear", and not modules."""
    return all(target[:1].isupper() for target in targets)


def _group(config: Config, group: Config) -> Quantization:
    """Return the quantisation of one of ``config_groups``."""
    rule = Config(group.table("weights") or {}, f"{config.where} weights")
    whole_column = rule.get("group_size") in (None, -1, 0)
    block = rule.integers("block_structure") if isinstance(rule.get("block_structure"), list) else None
    return Quantization(
        method="compressed-tensors",
        bits=rule.integer("num_bits", default=8),
        group_size=None if whole_column else rule.integer("group_size"),
        block_shape=(block[0], block[1]) if block and len(block) == 2 and all(block) else None,  # noqa: PLR2004
        format=group.text("format") or config.text("format"),
    )


def _ceil_div(count: int, divisor: int) -> int:
    """Return ``count / divisor``, rounded up."""
    return -(-count // divisor)


def quantized_tensors(  # noqa: C901 - one branch for each format
    name: str, rows: int, columns: int, dtype: str, quantization: Quantization
) -> Iterator[Tensor]:
    """Yield the tensors of a quantised linear layer with ``rows`` outputs and ``columns`` inputs, without its bias."""
    method, bits = quantization.method, quantization.bits
    group = quantization.group_size or columns
    if method in {"awq", "auto_awq", "awq_marlin"}:  # packed along the outputs
        yield Tensor(f"{name}.qweight", "I32", (columns, rows * bits // 32))
        yield Tensor(f"{name}.qzeros", "I32", (_ceil_div(columns, group), rows * bits // 32))
        yield Tensor(f"{name}.scales", "F16", (_ceil_div(columns, group), rows))
    elif method in {"gptq", "auto_gptq", "gptq_marlin", "inc", "moe_wna16"}:  # packed along the inputs
        yield Tensor(f"{name}.qweight", "I32", (columns * bits // 32, rows))
        yield Tensor(f"{name}.qzeros", "I32", (_ceil_div(columns, group), rows * bits // 32))
        yield Tensor(f"{name}.scales", "F16", (_ceil_div(columns, group), rows))
        if method != "inc":
            yield Tensor(f"{name}.g_idx", "I32", (columns,))
    elif "nvfp4" in quantization.format or method == "modelopt_fp4":
        packed = "weight_packed" if quantization.format else "weight"
        yield Tensor(f"{name}.{packed}", "U8", (rows, columns // 2))
        yield Tensor(f"{name}.weight_scale", "F8_E4M3", (rows, _ceil_div(columns, 16)))
        yield Tensor(f"{name}.{'weight_global_scale' if quantization.format else 'weight_scale_2'}", "F32", (1,))
        yield Tensor(f"{name}.{'input_global_scale' if quantization.format else 'input_scale'}", "F32", (1,))
    elif quantization.format == "mxfp4-pack-quantized":
        yield Tensor(f"{name}.weight_packed", "U8", (rows, columns // 2))
        yield Tensor(f"{name}.weight_scale", "U8", (rows, _ceil_div(columns, 32)))
    elif quantization.format == "pack-quantized":
        yield Tensor(f"{name}.weight_packed", "I32", (rows, _ceil_div(columns * bits, 32)))
        yield Tensor(f"{name}.weight_scale", dtype, (rows, _ceil_div(columns, group)))
        yield Tensor(f"{name}.weight_shape", "I64", (2,))
    elif method in {"mxfp8", "modelopt_mxfp8"}:
        yield Tensor(f"{name}.weight", "F8_E4M3", (rows, columns))
        yield Tensor(f"{name}.weight_scale", "U8", (rows, _ceil_div(columns, 32)))
    elif quantization.block_shape is not None:
        block_rows, block_columns = quantization.block_shape
        yield Tensor(f"{name}.weight", "F8_E4M3", (rows, columns))
        scale = "weight_scale" if method == "compressed-tensors" else "weight_scale_inv"
        yield Tensor(f"{name}.{scale}", "F32", (_ceil_div(rows, block_rows), _ceil_div(columns, block_columns)))
    elif method in {"experts_int8", "torchao", "quark", "mxfp4", "gpt_oss_mxfp4", "humming"}:
        # vLLM quantises these weights while it loads them, or another library defines their layout.
        yield Tensor(f"{name}.weight", dtype, (rows, columns))
    else:
        weight_dtype = "I8" if quantization.format == "int-quantized" else "F8_E4M3"
        per_channel = method in {"compressed-tensors", "fbgemm_fp8"}
        yield Tensor(f"{name}.weight", weight_dtype, (rows, columns))
        yield Tensor(f"{name}.weight_scale", dtype if per_channel else "F32", (rows, 1) if per_channel else ())
        if method in {"fp8", "modelopt"}:
            yield Tensor(f"{name}.input_scale", "F32", ())
