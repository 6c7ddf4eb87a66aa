"""GPUs that one does not have: `--hardware H100:8`. Every number says where it is from.

``memory`` is what CUDA calls total, GiB: the second number in vLLM's own line "Free memory on device (free/total GiB)
on startup" (vllm/v1/worker/utils.py:request_memory), or of torch's "has a total capacity of". Both round to 0.01 GiB.
It is less than the data sheet's by the driver's reserve, which differs between drivers by up to 0.2 GiB; where public
logs differ, the row has what vLLM 0.26 and newer say, whose CUDA needs a 580 driver. For slices it is what
`nvidia-smi mig -lgip` lists, which torch repeats on a slice (A100 1g.10gb: 9.50 GiB, total_memory=9728MB).

Compute capabilities: NVIDIA, "CUDA GPU Compute Capability". NVLink and form factors: NVIDIA's data sheets.
Peer access: data-center GPUs have it over PCIe on bare metal, though not in every virtual machine (AWS G6 has none:
llm-d-incubation/llm-d-infra#181); "GeForce cards do not support P2P" (NVIDIA/nccl-tests#287, an NCCL maintainer).
"""

from __future__ import annotations

import difflib
import re
from typing import Literal, NamedTuple

from vllm_launch.errors import UsageError
from vllm_launch.machine.gpus import Gpu, Hardware, cautions
from vllm_launch.units import GIB

_MOST = 64  # GPUs in one machine; more is a slip of the keyboard

Link = Literal["nvlink", "pcie", "none"]
"""How two of a kind reach each other's memory: "pcie" is peer access without NVLink, "none" goes through the host."""


class Entry(NamedTuple):
    """One row. ``nvml_name`` is what NVML and torch call the GPU."""

    nvml_name: str
    memory: float  # GiB
    compute_capability: tuple[int, int]
    link: Link
    source: str  # of ``memory``


_H100_GIB = 85017493504 / GIB  # as floats these are exact
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
# GiB of each MIG profile, as lgip lists it; where drivers differ (by 1/8 GiB), what the newer one says.
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
    "A100-80GB-1g.20gb": "derived: as large as 2g.20gb, both a quarter of the memory (NVIDIA, MIG User Guide)",
    "H100-7g.80gb": f"derived: {_LGIP} says 79.25, of a driver that left the whole GPU more than the 79.18 above",
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
    """``NAME`` or ``NAME:COUNT`` as a machine of idle GPUs: "H100:8", "A100-80GB-3g.40gb", "NVIDIA L4:2".

    Case, spaces, dashes and NVIDIA's brand names do not matter. Raises UsageError.
    """
    name, colon, number = text.partition(":")
    if colon and not (re.fullmatch(r"[0-9]{1,9}", number.strip()) and 1 <= int(number) <= _MOST):
        raise UsageError(
            f"--hardware {text}", f"{number!r} is no number of GPUs in one machine", f"give 1 to {_MOST}, as in H100:8"
        )
    key = _find(text, name)
    entry, count = ENTRIES[key], int(number) if colon else 1
    memory = round(entry.memory * GIB)
    gpus = tuple(
        Gpu(
            index=place,
            # Valid in form, and all zeros but for the place, so that nobody takes it for a real GPU's.
            uuid=f"{'MIG' if ' MIG ' in entry.nvml_name else 'GPU'}-00000000-0000-0000-0000-{place:012x}",
            name=entry.nvml_name,
            memory_total=memory,
            memory_free=memory,
            compute_capability=entry.compute_capability,
            mig_profile=entry.nvml_name.partition(" MIG ")[2] or None,
        )
        for place in range(count)
    )

    def between_all(there: bool) -> tuple[tuple[bool, ...], ...]:  # noqa: FBT001  one truth value for a matrix of them
        return tuple(tuple(there and a != b for b in range(count)) for a in range(count))

    return Hardware(
        gpus=gpus,
        nvlink=between_all(entry.link == "nvlink"),
        p2p=between_all(entry.link != "none"),
        source="catalogue",
        warnings=cautions(gpus),
    )


def _find(text: str, name: str) -> str:
    """The key of the entry that a person means."""
    known = {_plain(key): key for key in ENTRIES}
    known |= {_plain(entry.nvml_name): key for key, entry in ENTRIES.items()}
    known |= {_plain(alias): key for alias, key in _ALIASES.items()}
    wanted = _plain(name)
    if wanted in known:
        return known[wanted]
    # "A100" and "A100-1g.5gb" lack the size that tells two A100s apart.
    sized = [key for key in ENTRIES if wanted == _plain(re.sub("-[0-9]+GB", "", key))]
    if len(sized) == 1:
        return sized[0]
    near = sized or [known[match] for match in difflib.get_close_matches(wanted, known, n=4, cutoff=0.5)]
    near = list(dict.fromkeys(near)) or [key for key in ENTRIES if "g." not in key]
    what = f"{name.strip()!r} " + ("may be several GPUs" if sized else "is not in the catalogue")
    raise UsageError(
        f"--hardware {text}", what, f"say {' or '.join(near)}, or give a file from `vllm-launch gpus --format json`"
    )


_ALIASES = {"H100-80GB": "H100", "H100-SXM": "H100", "H100-SXM5": "H100", "4090": "RTX 4090", "5090": "RTX 5090"}


def _plain(name: str) -> str:
    """A name without what people write in different ways."""
    return re.sub(r"nvidia|geforce|tesla|[^a-z0-9.]", "", name.casefold())
