"""The configurations that throughput.py can start: a fixed list, and those of ``--also``."""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Sequence

import bench
import msgspec

from vllm_launch.engine import multicast


class Configuration(msgspec.Struct, frozen=True):
    """``servers`` processes that share the load evenly. ``command`` starts each of them on GPUs of its own."""

    command: str = "plan"
    flags: tuple[str, ...] = ()
    gpus: int = 1
    servers: int = 1


COMMANDS = {"plan": bench.launcher_command, "vllm": bench.vllm_command, "forked": bench.forked_command}

NO_MULTICAST = ("--compilation-config", json.dumps(multicast.without_fusion(None)))
"""Turns off the fused all-reduce of vLLM's own server. ``bench.environment`` makes the launcher do the same."""

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
"""Name: configuration. Those of vLLM are its own server with no other arguments."""


def parse(texts: Sequence[str], *, used_names: Collection[str]) -> dict[str, Configuration]:
    """Return the configurations of "NAME=COMMAND FLAGS" texts, by name, each on one GPU.

    ``used_names`` are names of other configurations.

    Raises:
        ValueError: a text is invalid. One line for the user.
    """
    parsed: dict[str, Configuration] = {}
    for text in texts:
        name, _, words = text.partition("=")
        command, *flags = shlex.split(words) or [""]
        if command not in COMMANDS:
            raise ValueError(f"--also {text}: after NAME= comes one of {', '.join(COMMANDS)}")
        if name in {"", *parsed, *used_names}:
            raise ValueError(f"--also {text}: the name is empty or already used: choose another")
        parsed[name] = Configuration(command, flags=tuple(flags))
    return parsed
