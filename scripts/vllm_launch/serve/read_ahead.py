"""Reads weights into the kernel's page cache while vLLM still imports. vLLM reads its first weight 20 s later.

Nothing waits for these reads. The kernel evicts pages if memory is short. posix_fadvise(2) is not enough: for a whole
file, Linux reads only one readahead window, a few megabytes (mm/readahead.c:force_page_cache_ra).
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Sequence
from pathlib import Path

from vllm_launch.units import MIB

SHARE = 0.8
"""Largest share of available memory to read ahead. Beyond it, the first pages are evicted before vLLM reads them."""

READERS, BLOCK_BYTES = 4, 16 * MIB
"""Files that are read at the same time, enough to keep network disks busy, and the buffer for each, in bytes."""

LOADERS = frozenset({"auto", "hf", "safetensors"})
"""Values of --load-format that read safetensors files through the page cache (vllm/config/load.py)."""


def begin(files: Sequence[Path], available: int) -> int:
    """Start to read ``files`` in the background. Return their bytes, or 0 if nothing is read.

    Nothing is read if a file is missing or the files exceed ``SHARE`` of ``available``, the free memory in bytes.
    """
    try:
        size = sum(path.stat().st_size for path in files)
    except OSError:
        return 0
    if not files or size > SHARE * available:
        return 0
    unread: queue.SimpleQueue[Path] = queue.SimpleQueue()
    for path in files:
        unread.put(path)
    for _ in range(min(READERS, len(files))):
        threading.Thread(target=_read, args=(unread,), daemon=True, name="read ahead").start()
    return size


def _read(unread: queue.SimpleQueue[Path]) -> None:
    """Read the files one after another to their ends, in vLLM's order."""
    block = bytearray(BLOCK_BYTES)
    with contextlib.suppress(OSError, queue.Empty):
        while True:
            with unread.get_nowait().open("rb", buffering=0) as file:
                while file.readinto(block):
                    pass
