"""NVLink multicast (NVLS): which libraries use it, how to switch it off in each, and how vLLM's log shows it. Pure.

Multicast is a resource of the NVSwitch, not of one GPU. A program that crashes while it uses multicast can leave GPUs
of the host unusable for other users. Shared hosts therefore forbid it. Each library has its own switch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

HOST_SWITCHES = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
"""Variables that the host's administrator sets to forbid multicast. Source: documentation of NCCL, PyTorch and NVSHMEM.
vLLM's FlashInfer all-reduce reads none of them."""

SWITCHES = HOST_SWITCHES | {
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",  # device_communicators/symm_mem.py
    "VLLM_ALLREDUCE_USE_FLASHINFER": "0",  # device_communicators/flashinfer_all_reduce.py
    "VLLM_FLASHINFER_ALLREDUCE_BACKEND": "trtllm",  # as above; "auto" takes mnnvl on one node
    "VLLM_USE_NCCL_SYMM_MEM": "0",  # device_communicators/pynccl_allocator.py
    "VLLM_DEEPEP_LOW_LATENCY_USE_MNNVL": "0",  # device_communicators/all2all.py
    "VLLM_USE_DIRECT_DCP_Q_GATHER": "0",  # v1/attention/ops/dcp.py
    "VLLM_USE_DIRECT_DCP_KV_GATHER": "0",  # as above
    "VLLM_ENABLE_GEMM_RS": "0",  # kernels/linear/cute_dsl/gemm_rs_ar.py
    "VLLM_KIMI_K3_GEMM_AR": "0",  # as above
}
"""All variables that switch multicast off, with those of vLLM 0.32.0. Each comment names the vLLM file that reads the
variable. The fused all-reduce has no variable (see ``without_fusion``)."""

FUSION = "fuse_allreduce_rms"
ALL2ALL = frozenset({"flashinfer_all2allv", "flashinfer_nvlink_one_sided", "flashinfer_nvlink_two_sided"})
"""Values of --all2all-backend that use multicast (device_communicators/all2all.py)."""

_MULTICAST_BACKENDS = frozenset({"FLASHINFER", "NCCL_SYMM_MEM", "SYMM_MEM"})
_ALL_REDUCE_LINE = re.compile(r"Using \[([^\]]*)\] all-reduce backends")  # device_communicators/cuda_communicator.py


def forbidden_by(environ: Mapping[str, str]) -> str | None:
    """Return the name of the variable by which the host forbids multicast, or None."""
    return next((name for name, value in HOST_SWITCHES.items() if environ.get(name) == value), None)


def fused_all_reduce(compilation_config: object) -> bool | None:
    """Return whether ``compilation_config`` sets the fused all-reduce on or off. None if it does not: vLLM decides."""
    value = _passes(compilation_config).get(FUSION)
    return value if isinstance(value, bool) else None


def without_fusion(compilation_config: object) -> dict[str, Any]:
    """Return the config without vLLM's fused all-reduce (compilation/passes/fusion/allreduce_rms_fusion.py)."""
    config = dict(compilation_config) if isinstance(compilation_config, dict) else {}
    return config | {"pass_config": _passes(config) | {FUSION: False}}


def _passes(compilation_config: object) -> dict[str, Any]:
    passes = compilation_config.get("pass_config") if isinstance(compilation_config, dict) else None
    return passes if isinstance(passes, dict) else {}


def all_reduce_backends(line: str) -> Sequence[str] | None:
    """Return the all-reduce backends of tensor parallelism that a log line of vLLM lists, or None for other lines."""
    match = _ALL_REDUCE_LINE.search(line)
    return re.findall(r"\w+", match[1]) if match else None


def multicast_users(backends: Sequence[str]) -> list[str]:
    """Return those of the all-reduce ``backends`` that use multicast if it is available."""
    return [name for name in backends if name in _MULTICAST_BACKENDS]
