"""NVLink multicast (NVLS): who uses it, how each is told not to, and how vLLM's log shows it. Pure.

It is the NVSwitch's, not a GPU's own, and a program that ends badly with it can leave GPUs of the host unusable for
others. Where hosts are shared, it is therefore forbidden, and each library has a switch of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

TOLD_BY = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
"""Switches that whoever runs the host sets: NCCL's, PyTorch's and NVSHMEM's documentation. vLLM's own FlashInfer
all-reduce looks at none of them."""

SWITCHES = TOLD_BY | {
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
"""All of them, vLLM 0.32.0's included; the file that reads each stands beside it. The fused all-reduce has no variable
(``without_fusion``)."""

FUSION = "fuse_allreduce_rms"
ALL2ALL = frozenset({"flashinfer_all2allv", "flashinfer_nvlink_one_sided", "flashinfer_nvlink_two_sided"})
"""Values of --all2all-backend that are made of it (device_communicators/all2all.py)."""

_USERS = frozenset({"FLASHINFER", "NCCL_SYMM_MEM", "SYMM_MEM"})
_ALL_REDUCES = re.compile(r"Using \[([^\]]*)\] all-reduce backends")  # device_communicators/cuda_communicator.py


def forbidden_by(environ: Mapping[str, str]) -> str | None:
    """The variable by which the host says that multicast must stay unused."""
    return next((name for name, value in TOLD_BY.items() if environ.get(name) == value), None)


def fuses(compilation_config: object) -> bool | None:
    """What a ``compilation_config`` says of the fused all-reduce; None: nothing, and vLLM decides."""
    said = _passes(compilation_config).get(FUSION)
    return said if isinstance(said, bool) else None


def without_fusion(compilation_config: object) -> dict[str, Any]:
    """The same without vLLM's fused all-reduce (compilation/passes/fusion/allreduce_rms_fusion.py)."""
    config = dict(compilation_config) if isinstance(compilation_config, dict) else {}
    return config | {"pass_config": _passes(config) | {FUSION: False}}


def _passes(compilation_config: object) -> dict[str, Any]:
    passes = compilation_config.get("pass_config") if isinstance(compilation_config, dict) else None
    return passes if isinstance(passes, dict) else {}


def all_reduces(line: str) -> Sequence[str] | None:
    """The ways of tensor parallelism's all-reduce that a line of vLLM's log names; None where it is another line."""
    found = _ALL_REDUCES.search(line)
    return re.findall(r"\w+", found[1]) if found else None


def users(all_reduces: Sequence[str]) -> list[str]:
    """Those of them that use multicast where it is there."""
    return [name for name in all_reduces if name in _USERS]
