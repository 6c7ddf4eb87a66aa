"""The reason for a value of the plan, and a split that was rejected. Pure."""

from __future__ import annotations

from enum import StrEnum

import msgspec


class Source(StrEnum):
    """Where a value comes from."""

    YOU = "you"  # the user set it
    MODEL = "model"  # config.json
    HARDWARE = "hardware"  # the memory and number of GPUs, or the CPU
    VLLM = "vLLM"  # vLLM's own default
    LAUNCHER = "launcher"  # a rule of this planner


class Reason(msgspec.Struct, frozen=True, kw_only=True):
    """The reason for one value of the plan.

    ``field`` is a vLLM option by dest, or "kv_cache", which is not an option. ``value`` is None if the plan does not
    set the option. ``origin`` is where the user set the
    value, such as "flag --max-model-len". It is None if the user did not set it.
    """

    field: str
    value: object
    why: str
    source: Source
    origin: str | None = None


class Rejected(msgspec.Struct, frozen=True, kw_only=True):
    """A plan that was considered and rejected, such as "TP=3", and the reason."""

    plan: str
    why: str
