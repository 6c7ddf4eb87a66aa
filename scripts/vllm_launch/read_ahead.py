"""Has the kernel read weights into its page cache while vLLM still imports: it reads its first only 20 s later.

Only advice is given, by posix_fadvise(2): nobody waits for it, and what memory cannot keep the kernel drops again.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Sequence
from pathlib import Path

SHARE = 0.8
"""Of the memory that is available, the most that weights may take: of more, the first would be gone when wanted."""

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
    threading.Thread(target=_advise, args=(tuple(files),), daemon=True, name="read ahead").start()
    return size


def _advise(files: Sequence[Path]) -> None:
    """File by file, as vLLM reads them; the call comes back once a file's reads are queued."""
    for path in files:
        with contextlib.suppress(OSError), path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
