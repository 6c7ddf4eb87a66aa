"""Which architectures and model types were compared with the pinned vLLM. compared.json is generated."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

import msgspec

Fact = Literal["layers", "weights"]


class Compared(msgspec.Struct, frozen=True):
    """Architectures and model types for which the planner reads the same as vLLM from config.json.

    ``different`` has the pairs of them for which it does not.
    """

    architectures: frozenset[str]
    model_types: frozenset[str]
    different: frozenset[tuple[str, str]]


@cache
def _table() -> dict[Fact, Compared]:
    path = Path(__file__).with_name("compared.json")
    return msgspec.json.decode(path.read_bytes(), type=dict[Fact, Compared])


def compared(fact: Fact, architecture: str, model_type: str) -> bool:
    """Whether ``fact`` was compared with vLLM for this architecture and model type, and is equal.

    "layers" are the KV cache of each layer, the tokens in it, and the maximum length. "weights" are bytes of weights
    that are derived from config.json, within 1 %. ``architecture`` is one of vLLM's registry.
    """
    table = _table()[fact]
    equal = architecture in table.architectures and model_type in table.model_types
    return equal and (architecture, model_type) not in table.different
