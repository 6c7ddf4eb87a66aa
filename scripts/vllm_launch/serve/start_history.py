"""Stores how long each phase of earlier starts took, to estimate the remaining time. Touches a file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from vllm_launch.serve.progress import PHASES

MAX_STARTS = 50
"""Largest number of kinds of starts in the file. The oldest is dropped first."""


def key(argv: Sequence[str], gpus: Sequence[str]) -> str:
    """Return the key for starts that take equally long: the same command line, except ports, on the same GPUs."""
    words = [word for word in argv[1:] if not word.startswith(("--host", "--port"))]
    return hashlib.sha256(json.dumps([words, gpus]).encode()).hexdigest()[:16]


def last_phases(path: Path, key: str) -> dict[str, float]:
    """Return the seconds by phase of the last start with ``key``. Empty if there is none."""
    phases = _read(path).get(key, {})
    return {phase: seconds for phase, seconds in phases.items() if phase in PHASES and seconds >= 0}


def remember(path: Path, key: str, phases: Mapping[str, float]) -> None:
    """Store the seconds by phase of this start. Ignore a file that cannot be written."""
    starts = _read(path)
    starts.pop(key, None)
    starts[key] = dict(phases)
    newest = dict(list(starts.items())[-MAX_STARTS:])
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f"{path.name}.{os.getpid()}")
        new.write_bytes(msgspec.json.encode(newest))
        new.replace(path)


def _read(path: Path) -> dict[str, dict[str, float]]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, dict[str, float]])
    except (OSError, msgspec.DecodeError):
        return {}
