"""Copies a known pattern between every two GPUs that CUDA calls peers, and reports whether it arrived.

``p2p`` runs this file as its own program. With wrong ACS or IOMMU settings, such a copy hangs or delivers wrong data,
so it needs a process that can be killed. The program writes one JSON object per line to stdout, before and after
every copy, so that a reader knows which copy was running when the program died: {"event": "unknown", "why"},
{"event": "copying", "pair"}, {"event": "copied", "pair", "ok"}, {"event": "done"}.
"""

from __future__ import annotations

import json
import sys
from itertools import permutations

_WORDS = 8 << 20  # words of 4 bytes in one copy: 32 MiB, larger than any cache on the path
_ROUNDS = 3  # copies of each pair, each with other data


def _write(event: str, **facts: object) -> None:
    print(json.dumps({"event": event, **facts}), flush=True)


def main() -> int:
    """Test all pairs and return exit status 0, also if a copy delivered wrong data."""
    try:
        import torch  # noqa: PLC0415, TID251  this program needs torch
    except ImportError as error:
        _write("unknown", why=f"torch cannot be loaded ({error})")
        return 0
    if not torch.cuda.is_available():
        _write("unknown", why="torch sees no CUDA device")
        return 0
    for source, target in permutations(range(torch.cuda.device_count()), 2):
        if not torch.cuda.can_device_access_peer(target, source):
            continue
        _write("copying", pair=[source, target])
        ok = True
        for seed in range(_ROUNDS):
            # The target computes the expected data itself, so it does not come over the tested path.
            sent = torch.arange(_WORDS, dtype=torch.int32, device=f"cuda:{source}") * 2654435 + seed
            expected = torch.arange(_WORDS, dtype=torch.int32, device=f"cuda:{target}") * 2654435 + seed
            arrived = torch.full_like(expected, -1)
            torch.cuda.synchronize(source)
            torch.cuda.synchronize(target)
            arrived.copy_(sent)
            torch.cuda.synchronize(source)
            torch.cuda.synchronize(target)
            ok = ok and torch.equal(arrived, expected)
        _write("copied", pair=[source, target], ok=ok)
    _write("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
