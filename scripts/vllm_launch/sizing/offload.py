"""Computes which weights vLLM keeps in host memory instead of on the GPU, in bytes. Pure.

Only the tensors of decoder layers can move (vllm/model_executor/models/utils.py:make_layers). vLLM can also move those
of some vision towers, which this module does not count.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import msgspec


class Offload(msgspec.Struct, frozen=True, kw_only=True):
    """How vLLM offloads weights (vllm/config/offload.py:OffloadConfig).

    ``backend``: "uva" moves tensors until ``limit`` bytes of each GPU are in host memory, and the GPU reads them there.
    "prefetch" moves the last ``num_in_group`` of every ``group_size`` layers. The GPU has buffers for
    ``prefetch_step`` of these layers.
    ``params``: parts of parameter names, such as "experts". Only parameters with such a part move. Empty: all move.
    """

    backend: Literal["uva", "prefetch"]
    limit: int = 0
    group_size: int = 0
    num_in_group: int = 1
    prefetch_step: int = 1
    params: tuple[str, ...] = ()


class LayerTensor(NamedTuple):
    """A tensor of a decoder layer. ``layer``: index on the pipeline rank. ``path``: vLLM's name of it in the layer."""

    layer: int
    path: str
    size: int


class Offloaded(NamedTuple):
    """The effect of offloading on one GPU, in bytes.

    ``saved``: GPU memory that the plan counts as saved. ``host``: size of the weights that move to host memory.
    ``pinned``: pinned host memory that these weights take. PyTorch rounds each tensor in pinned memory up to a power of
    two (ATen/core/CachingHostAllocator.h:allocate).
    """

    saved: int
    host: int
    pinned: int


def offloaded(offload: Offload, tensors: Iterable[LayerTensor]) -> Offloaded:
    """Return the effect of ``offload`` on one GPU with ``tensors``.

    "uva" moves whole tensors until their sizes reach the limit, so the last tensor can exceed it. ``saved`` is at most
    the limit. ``host`` includes the whole last tensor. Source: vllm/model_executor/offloader
    (uva.py:_maybe_offload_to_cpu, prefetch.py).
    """
    movable = [tensor for tensor in tensors if _matches(offload.params, tensor.path)]
    if offload.backend == "uva":
        moved = _first_until(movable, offload.limit)
        host = sum(tensor.size for tensor in moved)
        return Offloaded(min(offload.limit, host), host, _pinned(moved))
    first = offload.group_size - offload.num_in_group
    moved = [tensor for tensor in movable if tensor.layer % offload.group_size >= first]
    host = sum(tensor.size for tensor in moved)
    buffers = offload.prefetch_step * sum(size for _, size in {(tensor.path, tensor.size) for tensor in moved})
    return Offloaded(host - buffers, host, _pinned(moved))


def _matches(params: Sequence[str], path: str) -> bool:
    """Whether a parameter moves: its name contains one of ``params`` as whole segments."""
    return not params or any(f".{param}." in f".{path}." for param in params)


def _first_until(tensors: Sequence[LayerTensor], limit: int) -> list[LayerTensor]:
    """Return the first tensors of the first layers whose sizes reach ``limit``."""
    moved, total = [], 0
    for tensor in sorted(tensors, key=lambda tensor: tensor.layer):
        if total >= limit:
            break
        moved.append(tensor)
        total += tensor.size
    return moved


def _pinned(tensors: Iterable[LayerTensor]) -> int:
    return sum(1 << max(0, tensor.size - 1).bit_length() for tensor in tensors)
