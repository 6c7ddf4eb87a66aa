"""What the pinned vLLM asks of a machine: driver, CUDA, compute capability. Pure."""

from __future__ import annotations

ENGINE_CUDA = (13, 0)
"""The CUDA that the pinned vLLM's wheels are built for (its torch is a +cu130 build)."""

MINIMUM_DRIVER = 580
"""The driver branch that CUDA 13.x needs on Linux (NVIDIA, "CUDA Compatibility", Minor Version Compatibility)."""

MINIMUM_COMPUTE_CAPABILITY = (7, 5)
"""Turing: the first of CUDA_SUPPORTED_ARCHS for CUDA 13 (vLLM's CMakeLists.txt), and CUDA 13's own floor."""


def driver_too_old(driver: str | None) -> str | None:
    """Return why ``driver`` cannot run the pinned engine, and what to do; None when it can, or when it is unknown."""
    branch = (driver or "").partition(".")[0]
    if not branch.isdecimal() or int(branch) >= MINIMUM_DRIVER:
        return None
    cuda = ".".join(map(str, ENGINE_CUDA))
    return (
        f"NVIDIA driver {driver} is too old: vLLM is built for CUDA {cuda}, which needs {MINIMUM_DRIVER} or"
        " newer; upgrade the driver, or on data-center GPUs (not GeForce or RTX) install"
        f" cuda-compat-{cuda.replace('.', '-')} and set VLLM_ENABLE_CUDA_COMPATIBILITY=1"
    )
