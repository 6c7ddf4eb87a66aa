"""Which splits of a model over GPUs are possible, and why the others are not. Pure."""

from __future__ import annotations

import msgspec


class Layout(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """How one replica is split, and how many replicas there are. A replica takes ``tensor * pipeline`` GPUs."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    expert_parallel: bool = False
