"""Collects the tensors of a checkpoint, and quantises linear layers as the checkpoint does."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_launch.errors import UsageError
from vllm_launch.model.model import Quantization, Tensor, TowerPart
from vllm_launch.model.quantization import quantized_tensors
from vllm_launch.model.schemes import schemes_of

GATED = ("gate_proj", "up_proj", "down_proj")
"""The usual names of the layers of a gated feed-forward."""

MAX_TENSORS = 1_000_000
"""Upper limit for the number of tensors. The largest known checkpoint (Kimi K2, INT4) has 210,000. A larger number
means a typo in config.json."""


class TensorList:
    """A list of tensors. ``dtype`` is the model's, by safetensors' name. ``where`` is the config, for errors."""

    def __init__(self, dtype: str, quantization: Quantization | None, where: str) -> None:
        self.dtype, self.quantization, self.where = dtype, quantization, where
        self.schemes = schemes_of(quantization)
        self._tensors: list[Tensor] = []

    def add(self, name: str, *shape: int, dtype: str | None = None, tower: TowerPart | None = None) -> None:
        """Append one unquantised tensor.

        Raises:
            UsageError: the list already has MAX_TENSORS tensors.
        """
        if len(self._tensors) >= MAX_TENSORS:
            problem = f"its layers and experts make more than {MAX_TENSORS:,} tensors, and no model has so many"
            raise UsageError(self.where, problem, "correct it, or download the file again")
        self._tensors.append(Tensor(name, dtype or self.dtype, shape, tower))

    def linear(self, name: str, rows: int, columns: int, *, bias: bool = False, quantized: bool = True) -> None:
        """Append the tensors of a linear layer with ``rows`` outputs and ``columns`` inputs, and its bias."""
        scheme = self.schemes.of(name) if quantized else None
        if scheme is not None:
            for part in quantized_tensors(name, rows, columns, self.dtype, scheme):
                self.add(part.name, *part.shape, dtype=part.dtype)
        else:
            self.add(f"{name}.weight", rows, columns)
        if bias:
            self.add(f"{name}.bias", rows)

    def norm(self, name: str, width: int, *, bias: bool = False) -> None:
        """Append the weight of a norm over ``width`` channels, and its bias."""
        self.add(f"{name}.weight", width)
        if bias:
            self.add(f"{name}.bias", width)

    def gated(self, prefix: str, width: int, hidden: int, names: Sequence[str] = GATED, *, bias: bool = False) -> None:
        """Append a gated feed-forward: gate, up and down, by their ``names``. ``prefix`` is its module's."""
        gate, up, down = names
        self.linear(prefix + gate, width, hidden, bias=bias)
        self.linear(prefix + up, width, hidden, bias=bias)
        self.linear(prefix + down, hidden, width, bias=bias)

    def tensors(self) -> tuple[Tensor, ...]:
        """Return all tensors in the order of appending."""
        return tuple(self._tensors)
