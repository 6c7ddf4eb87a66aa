"""How long the phases of earlier starts took, so that this one can say what is normal. Touches a file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from vllm_launch.serve.progress import PHASES

KEPT = 50
"""Starts of different kinds that are remembered; the oldest goes first."""


def key(argv: Sequence[str], gpus: Sequence[str]) -> str:
    """A name for starts that should take the same time: one command line, whatever its ports, on one kind of GPUs."""
    words = [word for word in argv[1:] if not word.startswith(("--host", "--port"))]
    return hashlib.sha256(json.dumps([words, gpus]).encode()).hexdigest()[:16]


def usual(path: Path, key: str) -> dict[str, float]:
    """Seconds by phase of the last start of this kind; empty where none is known."""
    phases = _read(path).get(key, {})
    return {phase: seconds for phase, seconds in phases.items() if phase in PHASES and seconds >= 0}


def remember(path: Path, key: str, phases: Mapping[str, float]) -> None:
    """Keep what this start took. A cache that cannot be written is no reason for anything."""
    known = _read(path)
    known.pop(key, None)
    known[key] = dict(phases)
    kept = dict(list(known.items())[-KEPT:])
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f"{path.name}.{os.getpid()}")
        new.write_bytes(msgspec.json.encode(kept))
        new.replace(path)


def _read(path: Path) -> dict[str, dict[str, float]]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, dict[str, float]])
    except (OSError, msgspec.DecodeError):
        return {}
