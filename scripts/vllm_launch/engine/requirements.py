"""Requirements of the pinned vLLM on a machine: driver, CUDA, compute capability. Pure."""

from __future__ import annotations

ENGINE_CUDA = (13, 0)
"""CUDA version that the pinned vLLM's wheels are built for (its torch is a +cu130 build)."""

MINIMUM_DRIVER = 580
"""Lowest driver branch for CUDA 13.x on Linux (NVIDIA, "CUDA Compatibility", Minor Version Compatibility)."""

MINIMUM_COMPUTE_CAPABILITY = (7, 5)
"""Turing: the lowest of CUDA_SUPPORTED_ARCHS for CUDA 13 (vLLM's CMakeLists.txt), and the lowest for CUDA 13 itself."""


def driver_too_old(driver: str | None) -> str | None:
    """Return why ``driver`` cannot run the pinned engine and what to do, or None if it can or is unknown."""
    branch = (driver or "").partition(".")[0]
    if not branch.isdecimal() or int(branch) >= MINIMUM_DRIVER:
        return None
    cuda = ".".join(map(str, ENGINE_CUDA))
    return (
        f"NVIDIA driver {driver} is too old: vLLM is built for CUDA {cuda}, which needs {MINIMUM_DRIVER} or"
        " newer; upgrade the driver, or on data-center GPUs (not GeForce or RTX) install"
        f" cuda-compat-{cuda.replace('.', '-')} and set VLLM_ENABLE_CUDA_COMPATIBILITY=1"
    )
