"""PyTorch's CUDA allocator: the variables that set it up, and what forbids its expandable segments. Pure.

An expandable segment is one range of addresses, to which the allocator adds pages of 2 MiB and from which it takes
them. So a free piece can serve a larger request later. Ordinary segments are separate allocations of the driver, and
free pieces between used ones are lost.
"""

from __future__ import annotations

from collections.abc import Mapping

VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Variables with the allocator's settings. The first that is set counts (device_allocator/alloc_conf.py)."""

EXPANDABLE = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
"""The variable that turns expandable segments on. vLLM checks it under this name only
(config/vllm.py: it refuses expandable segments with a KV connector)."""

FORBIDDING = ("kv_transfer_config", "kv_offloading_size", "enable_sleep_mode", "enable_cumem_allocator")
"""Options with which the plan does not use expandable segments. KV connectors register memory, and an expandable
segment may get other pages later, so vLLM refuses the two together (config/vllm.py). vLLM makes a connector for
``kv_offloading_size``. Sleep mode has an allocator of its own, which turns expandable segments off for its memory
(device_allocator/cumem.py)."""


def expandable_segments(environ: Mapping[str, str], options: Mapping[str, object]) -> bool | None:
    """Return whether the user's variables or vLLM's ``options`` decide on expandable segments, and how.

    None: neither decides, so the plan may choose.
    """
    value = next((environ[name] for name in VARIABLES if environ.get(name)), None)
    if value is not None:
        fields = value.replace(" ", "").lower().split(",")
        return "expandable_segments:true" in fields or "expandable_segments:1" in fields
    return False if any(options.get(dest) for dest in FORBIDDING) else None
