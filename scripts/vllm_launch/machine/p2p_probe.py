"""Copies a known pattern between every two GPUs that CUDA calls peers, and says what arrived.

A program of its own, run by ``p2p``: with broken ACS or IOMMU settings such a copy hangs or brings other bytes, and
only a process that can be killed may try. One JSON object a line on stdout, written before and after every copy so
that a reader knows where it stood when it died: {"event": "unknown", "why"}, {"event": "copying", "pair"},
{"event": "copied", "pair", "ok"}, {"event": "done"}.
"""

from __future__ import annotations

import json
import sys
from itertools import permutations

_WORDS = 8 << 20  # of 4 bytes: 32 MiB, more than any cache on the way
_ROUNDS = 3


def _say(event: str, **facts: object) -> None:
    print(json.dumps({"event": event, **facts}), flush=True)


def main() -> int:
    """Exit status: 0 when it could say everything, whatever it found."""
    try:
        import torch  # noqa: PLC0415, TID251  this process exists to use it
    except ImportError as error:
        _say("unknown", why=f"torch cannot be loaded ({error})")
        return 0
    if not torch.cuda.is_available():
        _say("unknown", why="torch sees no CUDA device")
        return 0
    for source, target in permutations(range(torch.cuda.device_count()), 2):
        if not torch.cuda.can_device_access_peer(target, source):
            continue
        _say("copying", pair=[source, target])
        ok = True
        for seed in range(_ROUNDS):
            # The expected bytes are made on the target itself, so they do not come over the path that is tested.
            sent = torch.arange(_WORDS, dtype=torch.int32, device=f"cuda:{source}") * 2654435 + seed
            wanted = torch.arange(_WORDS, dtype=torch.int32, device=f"cuda:{target}") * 2654435 + seed
            arrived = torch.full_like(wanted, -1)
            torch.cuda.synchronize(source)
            torch.cuda.synchronize(target)
            arrived.copy_(sent)
            torch.cuda.synchronize(source)
            torch.cuda.synchronize(target)
            ok = ok and torch.equal(arrived, wanted)
        _say("copied", pair=[source, target], ok=ok)
    _say("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
