"""A model with its engine arguments, its split and its GPU: the input of all size computations. Pure."""

from __future__ import annotations

from functools import cached_property

import msgspec

from vllm_launch.machine.generation import Generation
from vllm_launch.machine.gpus import Gpu
from vllm_launch.model.model import Model
from vllm_launch.sizing.parallel import Layout, layer_split
from vllm_launch.sizing.run_config import RunConfig


class Placement(msgspec.Struct, frozen=True, eq=False, dict=True):
    """A ``model``, run with ``run_config`` and split by ``layout`` over GPUs.

    ``gpu`` is the GPU with the least free memory, or None on the CPU engine. Placements are compared by identity, so
    results can be cached by placement without comparing the model's tensors.
    """

    model: Model
    run_config: RunConfig
    layout: Layout
    gpu: Gpu | None = None

    @cached_property
    def generation(self) -> Generation | None:
        """Return the generation of the GPUs, or None on the CPU engine."""
        return self.gpu.generation if self.gpu else None

    @cached_property
    def layers_by_rank(self) -> tuple[int, ...]:
        """Return the number of layers on each pipeline rank."""
        return layer_split(len(self.model.layers), self.layout.pipeline)

    @cached_property
    def rank_of_layer(self) -> tuple[int, ...]:
        """Return the pipeline rank of each layer."""
        return tuple(rank for rank, count in enumerate(self.layers_by_rank) for _ in range(count))
