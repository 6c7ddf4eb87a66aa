"""Reads weights into the kernel's page cache while vLLM still imports: it reads its first only 20 s later.

Nobody waits for it, and what memory cannot keep the kernel drops again. posix_fadvise(2) would not do: of a whole file
that it is advised of, Linux reads one window of readahead, a few megabytes (mm/readahead.c:force_page_cache_ra).
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
"""As many files at once as give a network's disks something to do, and a buffer for each."""

LOADERS = frozenset({"auto", "hf", "safetensors"})
"""Values of --load-format that read safetensors files through the page cache (vllm/config/load.py)."""


def begin(files: Sequence[Path], available: int) -> int:
    """Bytes that are being read from now on; 0 where they would not fit into ``available`` bytes of memory."""
    try:
        size = sum(path.stat().st_size for path in files)
    except OSError:
        return 0
    if not files or size > SHARE * available:
        return 0
    rest: queue.SimpleQueue[Path] = queue.SimpleQueue()
    for path in files:
        rest.put(path)
    for _ in range(min(READERS, len(files))):
        threading.Thread(target=_read, args=(rest,), daemon=True, name="read ahead").start()
    return size


def _read(rest: queue.SimpleQueue[Path]) -> None:
    """File by file, in the order in which vLLM reads them, each to its end."""
    block = bytearray(BLOCK_BYTES)
    with contextlib.suppress(OSError, queue.Empty):
        while True:
            with rest.get_nowait().open("rb", buffering=0) as file:
                while file.readinto(block):
                    pass
