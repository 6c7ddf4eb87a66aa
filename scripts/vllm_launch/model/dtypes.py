"""Data types: their names in vLLM and in safetensors, and their sizes. Pure."""

from __future__ import annotations

STORED_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
"""Bits of one element of a stored tensor, by safetensors' dtype name (safetensors/src/tensor.rs: Dtype::bitsize)."""

COMPUTE_BITS = {"float32": 32, "bfloat16": 16, "float16": 16}
"""Bits of one element of a compute dtype, by vLLM's name."""

SAFETENSORS_NAME = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""Safetensors' dtype names, by vLLM's name."""

ALIASES = {"half": "float16", "float": "float32", "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
"""Other names that --dtype and config.json accept (vllm/config/model.py:_STR_DTYPE_TO_TORCH_DTYPE)."""

NO_FLOAT16 = {"gemma2", "gemma3", "gemma3_text", "glm4"}
"""Model types that cannot run in float16 (vllm/config/model.py:_FLOAT16_NOT_SUPPORTED_MODELS)."""

ONLY_BFLOAT16 = {"fp_quant", "gpt_oss_mxfp4", "modelopt_mxfp8", "mxfp4", "mxfp8"}
"""Quantisation methods whose models compute only in bfloat16 (layers/quantization: get_supported_act_dtypes)."""
