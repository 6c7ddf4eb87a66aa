"""Whether vLLM accepts ``--quantization`` for a checkpoint, and in which dtypes a method computes. Pure."""

from __future__ import annotations

from typing import Literal

from vllm_launch.model.dtypes import ONLY_BFLOAT16
from vllm_launch.model.model import Model

NAMES = {
    "awq": {"awq", "auto_awq", "awq_marlin", "marlin", "moe_wna16"},
    "gptq": {"gptq", "auto_gptq", "gptq_marlin", "marlin", "moe_wna16"},
    "fp8": {"fp8", "deepseek_v4_fp8"},
}
"""Values of --quantization that vLLM's CUDA build accepts for a checkpoint's method. For other methods it accepts only
the method itself. Source: model_executor/layers/quantization, ``override_quantization_method`` of each class."""

AT_START = {
    "fp8", "fp8_per_tensor", "fp8_per_block", "fp8_per_channel", "int8_per_channel_weight_only", "nvfp4_per_token",
    "mxfp4", "gpt_oss_mxfp4", "mxfp8", "experts_int8", "humming", "deepseek_v4_fp8",
}  # fmt: skip
"""Values of --quantization with which vLLM quantises an unquantised checkpoint while it loads it. Others read their
configuration from the checkpoint (model_executor/model_loader/weight_utils.py:get_quant_config)."""

FLOAT32 = {"compressed-tensors", "torchao"}
"""Methods that can compute in float32 (``get_supported_act_dtypes``)."""

Answer = Literal["accepted", "ignored", "refused"]


def answer(model: Model, method: str, *, on_gpu: bool) -> Answer:
    """Return what vLLM does with ``--quantization method``. "ignored": it uses the checkpoint's own method.

    Source: vllm/config/model.py:ModelConfig._verify_quantization.
    """
    if model.quantization is None:
        return "accepted" if method in AT_START else "refused"
    own = model.quantization.method
    gpt_oss = own in {"mxfp4", "gpt_oss_mxfp4"} and model.model_type == "gpt_oss"
    if method == "humming":
        return "refused" if gpt_oss else "accepted"
    if gpt_oss or own == "inc" or own.startswith("modelopt"):
        return "accepted" if method == own else "ignored"
    if not on_gpu and own == "awq":  # auto_awq.py: override_quantization_method
        return "accepted" if method == own else "refused"
    return "accepted" if method in NAMES.get(own, {own}) else "refused"


def computes_in(method: str, dtype: str) -> bool:
    """Whether the kernels of the quantisation ``method`` compute in ``dtype``."""
    if dtype == "bfloat16":
        return True
    return method in FLOAT32 if dtype == "float32" else method not in ONLY_BFLOAT16
