"""What throughput.py starts: its own list, and others that a person names."""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Sequence

import bench
import msgspec

from vllm_launch.engine import multicast


class Configuration(msgspec.Struct, frozen=True):
    """``servers`` processes side by side, started by ``command``, each on GPUs of its own, share the load evenly."""

    command: str = "plan"
    flags: tuple[str, ...] = ()
    gpus: int = 1
    servers: int = 1


COMMANDS = {"plan": bench.launcher_command, "vllm": bench.vllm_command, "forked": bench.forked_command}

NO_MULTICAST = ("--compilation-config", json.dumps(multicast.without_fusion(None)))
"""For vLLM's own server what the launcher does by itself in ``bench.environment``."""

CONFIGURATIONS = {
    "vllm-defaults": Configuration("vllm"),
    "plan": Configuration(),
    "plan-fp8-kv": Configuration(flags=("--launch-quality=fp8-kv",)),
    "vllm-tp-2": Configuration("vllm", flags=("--tensor-parallel-size=2", *NO_MULTICAST), gpus=2),
    "plan-2": Configuration(gpus=2),
    "plan-2-uni": Configuration(flags=("--distributed-executor-backend=uni",), gpus=2),
    "plan-2-latency": Configuration(flags=("--launch-objective=latency",), gpus=2),
    "two-servers": Configuration(gpus=2, servers=2),
    "vllm-tp-4": Configuration("vllm", flags=("--tensor-parallel-size=4", *NO_MULTICAST), gpus=4),
    "plan-4": Configuration(gpus=4),
}
"""Name: what is started. vLLM's are its server with no argument but those."""


def also(texts: Sequence[str], *, taken: Collection[str]) -> dict[str, Configuration]:
    """Those of "NAME=COMMAND FLAGS", each on one GPU; ``taken`` are names of others.

    Raises:
        ValueError: one line for the person who wrote the text.
    """
    found: dict[str, Configuration] = {}
    for text in texts:
        name, _, words = text.partition("=")
        command, *flags = shlex.split(words) or [""]
        if command not in COMMANDS:
            raise ValueError(f"--also {text}: after NAME= comes one of {', '.join(COMMANDS)}")
        if name in {"", *found, *taken}:
            raise ValueError(f"--also {text}: give it a name of its own")
        found[name] = Configuration(command, flags=tuple(flags))
    return found
