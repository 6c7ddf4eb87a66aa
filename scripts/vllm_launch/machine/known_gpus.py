"""Known GPUs: memory, compute capability and links of each model, with sources.

``memory`` is CUDA's total memory in GiB. Public logs show it in two places, rounded to 0.01 GiB: the second number in
vLLM's line "Free memory on device (free/total GiB) on startup" (vllm/v1/worker/utils.py:request_memory), and the number
in torch's error message after "has a total capacity of". CUDA's total is less than nvidia-smi's, because the driver
reserves some memory. The reserve differs between drivers by up to 0.2 GiB. If public logs show different numbers, the
row prefers one from a 580 driver or newer, which vLLM 0.26 and newer need. Some rows have no such number: their
``source`` names the log, or says how the number was derived. The memory of a MIG slice comes from `nvidia-smi mig
-lgip`. torch prints the same number on a slice (A100 1g.10gb: 9.50 GiB, total_memory=9728MB; H200 3g.71gb: 74625056768
bytes).

Compute capabilities: NVIDIA, "CUDA GPU Compute Capability". NVLink and form factors: NVIDIA's data sheets.
Peer access: data-center GPUs have it over PCIe on bare metal, but not in every virtual machine (AWS G6 has none:
llm-d-incubation/llm-d-infra#181). "GeForce cards do not support P2P" (NVIDIA/nccl-tests#287, an NCCL maintainer).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from vllm_launch.units import GIB

Link = Literal["nvlink", "pcie", "none"]
"""How two GPUs of one model copy data. "pcie": peer access over PCIe. "none": no peer access, through host memory."""


class Entry(NamedTuple):
    """One known GPU, or one MIG profile of it."""

    nvml_name: str  # its name in NVML and torch
    memory: float  # GiB
    compute_capability: tuple[int, int]
    link: Link
    source: str  # of ``memory``
    idle: float | None = None  # GiB of free memory on an idle machine, if the GPU uses the host's memory; else None


_H100_GIB = 85017493504 / GIB  # both quotients are exact as floats
_H200_GIB = 150109880320 / GIB
_MEASURED = "measured: NVML's total less reserved, and cudaMemGetInfo's total, to the byte, driver 580.159.04"
_LOGS = "vLLM startup lines in public logs"
_TORCH = "torch messages in public logs"
_UNNAMED = "torch messages in public logs that do not name the GPU; its memory size identifies it"
_LGIP = "nvidia-smi mig -lgip"

ENTRIES: dict[str, Entry] = {
    "T4": Entry("Tesla T4", 14.56, (7, 5), "pcie", _TORCH),
    "A10G": Entry("NVIDIA A10G", 22587 / 1024, (8, 6), "pcie", "torch 2.15+cu130: total_memory=22587MB"),
    "A40": Entry("NVIDIA A40", 44.34, (8, 6), "pcie", f"{_UNNAMED}; named: total_memory=45416MB"),
    "L4": Entry("NVIDIA L4", 22.03, (8, 9), "pcie", f"{_LOGS} (0.29); 22.05 in pytorch/pytorch#175666"),
    "L20": Entry("NVIDIA L20", 44.39, (8, 9), "pcie", "derived: the L40S has the same 46068 MiB in nvidia-smi"),
    "L40": Entry("NVIDIA L40", 44.39, (8, 9), "pcie", "derived: the L40S has the same 46068 MiB in nvidia-smi"),
    "L40S": Entry("NVIDIA L40S", 44.39, (8, 9), "pcie", f"{_LOGS} (0.24); 44.52 in vllm-project/vllm#14011"),
    "RTX 3090": Entry(
        "NVIDIA GeForce RTX 3090", 23.56, (8, 6), "none", f"{_UNNAMED}; named, older driver: total_memory=24259MB"
    ),
    "RTX 4090": Entry(
        "NVIDIA GeForce RTX 4090", 23.52, (8, 9), "none", "torch, driver 595.84; sgl-project/sglang#12496"
    ),
    "RTX 5090": Entry("NVIDIA GeForce RTX 5090", 31.36, (12, 0), "none", f"{_LOGS} (0.28, 0.30)"),
    "RTX A6000": Entry("NVIDIA RTX A6000", 47.4, (8, 6), "pcie", f"{_UNNAMED}; named, older: 48676MB"),
    "RTX 6000 Ada": Entry("NVIDIA RTX 6000 Ada Generation", 47.37, (8, 9), "pcie", f"{_TORCH}; older: 48622MB"),
    "RTX PRO 6000 Server": Entry(
        "NVIDIA RTX PRO 6000 Blackwell Server Edition", 97250 / 1024, (12, 0), "pcie", "torch: total_memory=97250MB"
    ),
    "RTX PRO 6000 Workstation": Entry(
        "NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 94.97, (12, 0), "pcie", f"{_LOGS}: 94.97"
    ),
    "RTX PRO 6000 Max-Q": Entry(
        "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", 94.97, (12, 0), "pcie",
        "derived: the other two editions have the same 97887 MiB in nvidia-smi",
    ),
    "A100-40GB": Entry("NVIDIA A100-SXM4-40GB", 39.49, (8, 0), "nvlink", _LOGS),
    "A100-80GB": Entry(
        "NVIDIA A100-SXM4-80GB", 79.25, (8, 0), "nvlink", f"{_LOGS}; 79.32 in vllm-project/vllm-omni#276"
    ),
    "A100-40GB PCIe": Entry("NVIDIA A100-PCIE-40GB", 39.49, (8, 0), "pcie", "derived: the same 40960 MiB as SXM"),
    "A100-80GB PCIe": Entry("NVIDIA A100 80GB PCIe", 79.25, (8, 0), "pcie", "derived: the same 81920 MiB as SXM"),
    "H20": Entry("NVIDIA H20", 97285 / 1024, (9, 0), "nvlink", "torch: total_memory=97285MB"),
    "H100": Entry("NVIDIA H100 80GB HBM3", _H100_GIB, (9, 0), "nvlink", _MEASURED),
    "H100 PCIe": Entry("NVIDIA H100 PCIe", _H100_GIB, (9, 0), "pcie", "derived: the same 81559 MiB as SXM"),
    "H100 NVL": Entry("NVIDIA H100 NVL", 93.02, (9, 0), "pcie", f"{_UNNAMED}, also 93.10; named, torch 2.5: 92.63"),
    "H200": Entry("NVIDIA H200", _H200_GIB, (9, 0), "nvlink", _MEASURED),
    "H200 NVL": Entry("NVIDIA H200 NVL", _H200_GIB, (9, 0), "pcie", "derived: the H200 has the same 143771 MiB"),
    "GH200-96GB": Entry(
        "NVIDIA GH200 480GB", 94.5, (9, 0), "nvlink",
        "derived: torch prints 94.50 on the H100 96GB, which has the same 97871 MiB in nvidia-smi",
    ),
    "GH200-144GB": Entry(
        "NVIDIA GH200 144G HBM3e", 142.31, (9, 0), "nvlink",
        "derived: 146831 MiB in nvidia-smi, less the reserve of the 96 GB model",
    ),
    "B200": Entry("NVIDIA B200", 178.35, (10, 0), "nvlink", "torch: total_memory=182631MB"),
    "B300": Entry("NVIDIA B300 SXM6 AC", 267.69, (10, 3), "nvlink", _UNNAMED),
    "GB200": Entry("NVIDIA GB200", 184.31, (10, 0), "nvlink", _UNNAMED),
    "GB300": Entry("NVIDIA GB300", 276.5, (10, 3), "nvlink", _UNNAMED),
    "GB10": Entry(
        "NVIDIA GB10", 121.69, (12, 1), "none", f"{_LOGS}; idle: llamastash/llamastash#81", idle=116.43
    ),
    "Jetson Thor": Entry(
        "NVIDIA Thor", 122.8, (11, 0), "none", "torch in public logs: 131.9 GB; idle: derived, as the GB10", idle=117.5
    ),
}  # fmt: skip
# GiB of each MIG profile, from lgip. Drivers differ by 1/8 GiB; the number is the newer driver's.
_SLICES: dict[str, dict[str, float]] = {
    "A100-40GB": {
        "1g.5gb": 4.75,
        "1g.10gb": 9.625,
        "2g.10gb": 9.625,
        "3g.20gb": 19.5,
        "4g.20gb": 19.5,
        "7g.40gb": 39.25,
    },
    "A100-80GB": {
        "1g.10gb": 9.5,
        "1g.20gb": 19.5,
        "2g.20gb": 19.5,
        "3g.40gb": 39.25,
        "4g.40gb": 39.25,
        "7g.80gb": 79.0,
    },
    "H100": {
        "1g.10gb": 9.75,
        "1g.20gb": 19.625,
        "2g.20gb": 19.625,
        "3g.40gb": 39.5,
        "4g.40gb": 39.5,
        "7g.80gb": 79.125,
    },
    "H200": {
        "1g.18gb": 16.0,
        "1g.35gb": 32.5,
        "2g.35gb": 32.5,
        "3g.71gb": 69.5,
        "4g.71gb": 69.5,
        "7g.141gb": 139.75,
    },
}
_DERIVED = {
    "A100-80GB-1g.20gb": "derived: same size as 2g.20gb, each has a quarter of the memory (NVIDIA, MIG User Guide)",
    "H100-7g.80gb": f"derived: {_LGIP} lists 79.25 with a driver that reserves less (here the whole GPU has 79.18)",
    "H200-1g.35gb": "derived: same size as 2g.35gb, each has a quarter of the memory (NVIDIA, MIG User Guide)",
    "H200-3g.71gb": "torch in public code: total_memory 74625056768",
    "H200-4g.71gb": "derived: same size as 3g.71gb, each has half of the memory (NVIDIA, MIG User Guide)",
    "H200-7g.141gb": f"derived: {_LGIP} lists 140.00 with a driver that reserves less (here the whole GPU has 139.80)",
}
ENTRIES |= {
    f"{parent}-{profile}": ENTRIES[parent]._replace(
        nvml_name=f"{ENTRIES[parent].nvml_name} MIG {profile}",
        memory=memory,
        link="none",
        source=_DERIVED.get(f"{parent}-{profile}", _LGIP),
    )
    for parent, profiles in _SLICES.items()
    for profile, memory in profiles.items()
}

ALIASES = {
    "H100-80GB": "H100",
    "H100-SXM": "H100",
    "H100-SXM5": "H100",
    "H200-141GB": "H200",
    "H200-SXM": "H200",
    "GH200-480GB": "GH200-96GB",
    "GH200-144G": "GH200-144GB",
    "3090": "RTX 3090",
    "4090": "RTX 4090",
    "5090": "RTX 5090",
    "A6000": "RTX A6000",
    "6000 Ada": "RTX 6000 Ada",
    "RTX PRO 6000": "RTX PRO 6000 Server",
    "DGX Spark": "GB10",
    "Thor": "Jetson Thor",
    "Jetson AGX Thor": "Jetson Thor",
}
"""Other names of entries. The three editions of the RTX PRO 6000 have the same memory and compute capability."""

DROPPED: dict[str, tuple[int, int]] = {
    "V100": (7, 0),
    "GV100": (7, 0),
    "Titan V": (7, 0),
    "P100": (6, 0),
    "P40": (6, 1),
    "P4": (6, 1),
    "GTX 1080": (6, 1),
    "GTX 1080 Ti": (6, 1),
    "GTX 1070": (6, 1),
    "Titan Xp": (6, 1),
    "M60": (5, 2),
    "M40": (5, 2),
    "K80": (3, 7),
}
"""Compute capabilities of GPUs that are too old for the pinned vLLM (requirements.MINIMUM_COMPUTE_CAPABILITY)."""


def known_gpu(nvml_name: str) -> Entry | None:
    """Return the entry of the GPU that NVML calls ``nvml_name``, or None if it is not known."""
    return next((entry for entry in ENTRIES.values() if entry.nvml_name == nvml_name), None)
