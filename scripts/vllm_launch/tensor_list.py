"""Collects tensors: linear layers come out quantised where the checkpoint's are."""

from __future__ import annotations

from vllm_launch.model import Quantization, Tensor
from vllm_launch.quantization import is_ignored, stored


class TensorList:
    """A growing list. ``dtype`` in safetensors' words."""

    def __init__(self, dtype: str, quantization: Quantization | None) -> None:
        self.dtype, self.quantization = dtype, quantization
        self._tensors: list[Tensor] = []

    def add(self, name: str, *shape: int, dtype: str | None = None) -> None:
        """One tensor as it is."""
        self._tensors.append(Tensor(name, dtype or self.dtype, shape))

    def linear(self, name: str, rows: int, columns: int, *, bias: bool = False, quantized: bool = True) -> None:
        """The weights of a layer with ``rows`` outputs and ``columns`` inputs, and its bias."""
        if quantized and self.quantization is not None and not is_ignored(name, self.quantization):
            self._tensors.extend(stored(name, rows, columns, self.dtype, self.quantization))
        else:
            self.add(f"{name}.weight", rows, columns)
        if bias:
            self.add(f"{name}.bias", rows)

    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, in the order they came."""
        return tuple(self._tensors)
