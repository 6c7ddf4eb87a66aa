"""Catalogue of known GPUs, to make a plan for a machine that you do not have: `--hardware H100:8`.

Every number has its source. ``memory`` is CUDA's total memory in GiB. It is the second number in vLLM's line "Free
memory on device (free/total GiB) on startup" (vllm/v1/worker/utils.py:request_memory), or the number in torch's "has
a total capacity of". Both round to 0.01 GiB. CUDA's total is less than the data sheet's, because the driver reserves
some memory. The reserve differs between drivers by up to 0.2 GiB. If public logs differ, the row has the number that
vLLM 0.26 and newer print, since their CUDA needs a 580 driver. The memory of a MIG slice comes from
`nvidia-smi mig -lgip`. torch prints the same number on a slice (A100 1g.10gb: 9.50 GiB, total_memory=9728MB).

Compute capabilities: NVIDIA, "CUDA GPU Compute Capability". NVLink and form factors: NVIDIA's data sheets.
Peer access: data-center GPUs have it over PCIe on bare metal, but not in every virtual machine (AWS G6 has none:
llm-d-incubation/llm-d-infra#181). "GeForce cards do not support P2P" (NVIDIA/nccl-tests#287, an NCCL maintainer).
"""

from __future__ import annotations

import difflib
import re
from typing import Literal, NamedTuple

from vllm_launch.errors import UsageError
from vllm_launch.machine.gpus import Gpu, Hardware, cautions
from vllm_launch.units import GIB

_MAX_GPUS = 64  # upper limit for the GPUs of one machine; a larger number is a typing error

Link = Literal["nvlink", "pcie", "none"]
"""How two GPUs of one model copy data: "nvlink", "pcie" (peer access without NVLink) or "none" (through the host)."""


class Entry(NamedTuple):
    """One GPU of the catalogue. ``nvml_name`` is its name in NVML and torch."""

    nvml_name: str
    memory: float  # GiB
    compute_capability: tuple[int, int]
    link: Link
    source: str  # of ``memory``


_H100_GIB = 85017493504 / GIB  # both quotients are exact as floats
_H200_GIB = 150109880320 / GIB
_MEASURED = "measured: NVML's total less reserved, and cudaMemGetInfo's total, to the byte, driver 580.159.04"
_LOGS = "vLLM startup lines in public logs"
_LGIP = "nvidia-smi mig -lgip"

ENTRIES: dict[str, Entry] = {
    "T4": Entry("Tesla T4", 14.56, (7, 5), "pcie", "torch messages in public logs"),
    "A10G": Entry("NVIDIA A10G", 22587 / 1024, (8, 6), "pcie", "torch 2.15+cu130: total_memory=22587MB"),
    "L4": Entry("NVIDIA L4", 22.03, (8, 9), "pcie", f"{_LOGS} (0.29); 22.05 in pytorch/pytorch#175666"),
    "L40S": Entry("NVIDIA L40S", 44.39, (8, 9), "pcie", f"{_LOGS} (0.24); 44.52 in vllm-project/vllm#14011"),
    "RTX 4090": Entry(
        "NVIDIA GeForce RTX 4090", 23.52, (8, 9), "none", "torch, driver 595.84; sgl-project/sglang#12496"
    ),
    "RTX 5090": Entry("NVIDIA GeForce RTX 5090", 31.36, (12, 0), "none", f"{_LOGS} (0.28, 0.30)"),
    "A100-40GB": Entry("NVIDIA A100-SXM4-40GB", 39.49, (8, 0), "nvlink", _LOGS),
    "A100-80GB": Entry(
        "NVIDIA A100-SXM4-80GB", 79.25, (8, 0), "nvlink", f"{_LOGS}; 79.32 in vllm-project/vllm-omni#276"
    ),
    "H100": Entry("NVIDIA H100 80GB HBM3", _H100_GIB, (9, 0), "nvlink", _MEASURED),
    "H200": Entry("NVIDIA H200", _H200_GIB, (9, 0), "nvlink", _MEASURED),
    "B200": Entry("NVIDIA B200", 178.35, (10, 0), "nvlink", "torch: total_memory=182631MB"),
}
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
}
_DERIVED = {
    "A100-80GB-1g.20gb": "derived: same size as 2g.20gb, each has a quarter of the memory (NVIDIA, MIG User Guide)",
    "H100-7g.80gb": f"derived: {_LGIP} lists 79.25 with a driver that reserves less (here the whole GPU has 79.18)",
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


def parse_hardware_name(text: str) -> Hardware:
    """Return a machine of idle GPUs for ``NAME`` or ``NAME:COUNT``: "H100:8", "A100-80GB-3g.40gb", "NVIDIA L4:2".

    Case, spaces, dashes and NVIDIA's brand names do not matter. Raises UsageError.
    """
    name, colon, number = text.partition(":")
    if colon and not (re.fullmatch(r"[0-9]{1,9}", number.strip()) and 1 <= int(number) <= _MAX_GPUS):
        raise UsageError(
            f"--hardware {text}",
            f"{number!r} is not a valid number of GPUs in one machine",
            f"give 1 to {_MAX_GPUS}, for example H100:8",
        )
    key = _entry_key(text, name)
    entry, count = ENTRIES[key], int(number) if colon else 1
    memory = round(entry.memory * GIB)
    gpus = tuple(
        Gpu(
            index=place,
            # The format is valid, but all digits except the position are zero, so it cannot be a real GPU's UUID.
            uuid=f"{'MIG' if ' MIG ' in entry.nvml_name else 'GPU'}-00000000-0000-0000-0000-{place:012x}",
            name=entry.nvml_name,
            memory_total=memory,
            memory_free=memory,
            compute_capability=entry.compute_capability,
            mig_profile=entry.nvml_name.partition(" MIG ")[2] or None,
        )
        for place in range(count)
    )

    def between_all(linked: bool) -> tuple[tuple[bool, ...], ...]:  # noqa: FBT001  the value of every pair
        return tuple(tuple(linked and a != b for b in range(count)) for a in range(count))

    return Hardware(
        gpus=gpus,
        nvlink=between_all(entry.link == "nvlink"),
        p2p=between_all(entry.link != "none"),
        source="catalogue",
        warnings=cautions(gpus),
    )


def _entry_key(text: str, name: str) -> str:
    """Return the key in ``ENTRIES`` that ``name`` stands for. Raises UsageError; ``text`` is the whole argument."""
    known = {_normalized(key): key for key in ENTRIES}
    known |= {_normalized(entry.nvml_name): key for key, entry in ENTRIES.items()}
    known |= {_normalized(alias): key for alias, key in _ALIASES.items()}
    wanted = _normalized(name)
    if wanted in known:
        return known[wanted]
    # "A100" and "A100-1g.5gb" lack the memory size, which distinguishes the two A100s.
    same_model = [key for key in ENTRIES if wanted == _normalized(re.sub("-[0-9]+GB", "", key))]
    if len(same_model) == 1:
        return same_model[0]
    near = same_model or [known[match] for match in difflib.get_close_matches(wanted, known, n=4, cutoff=0.5)]
    near = list(dict.fromkeys(near)) or [key for key in ENTRIES if "g." not in key]
    problem = f"{name.strip()!r} " + ("matches several GPUs" if same_model else "is not in the catalogue")
    raise UsageError(
        f"--hardware {text}", problem, f"use {' or '.join(near)}, or a file from `vllm-launch gpus --format json`"
    )


_ALIASES = {"H100-80GB": "H100", "H100-SXM": "H100", "H100-SXM5": "H100", "4090": "RTX 4090", "5090": "RTX 5090"}


def _normalized(name: str) -> str:
    """Return ``name`` in lower case, without brand names, spaces and punctuation, to compare spellings."""
    return re.sub(r"nvidia|geforce|tesla|[^a-z0-9.]", "", name.casefold())
