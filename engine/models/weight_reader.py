"""From a checkpoint's tensors to the decoder's modules: stacked, checked for their shape, wrapped."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from engine.errors import ModelLoadError
from engine.layers.linear import Linear
from engine.layers.norm import RMSNorm
from engine.quantization.formats import ModelDtypeFormat

ReadTensor = Callable[[str], torch.Tensor]
"""Checkpoint tensor by its Hugging Face name, in the compute dtype, on the device."""


class WeightReader:
    """Reads what belongs under one prefix of names.

    Args:
        read: called once per tensor.
        prefix: put before every name, e.g. ``"model.layers.3."``.
    """

    def __init__(self, read: ReadTensor, prefix: str = "") -> None:
        self._read = read
        self._prefix = prefix

    def under(self, prefix: str) -> WeightReader:
        """A reader of the names below ``prefix``."""
        return WeightReader(self._read, self._prefix + prefix)

    def tensor(self, name: str, *shape: int) -> torch.Tensor:
        """``<prefix><name>.weight``.

        Raises:
            ModelLoadError: if it is not there or has another shape.
        """
        return _checked(self._read(f"{self._prefix}{name}.weight"), self._prefix + name, shape)

    def norm(self, name: str | None, size: int, eps: float) -> nn.Module:
        """RMSNorm over ``size`` values; the identity if it has no name."""
        return nn.Identity() if name is None else RMSNorm(self.tensor(name, size), eps)

    def linear(self, names: tuple[str, ...], rows: int, columns: int, *, label: str, bias: bool = False) -> Linear:
        """The linear layers ``names`` stacked by rows into one of [rows, columns].

        Args:
            label: what the result is called in an error.
            bias: each of them has one.
        """
        sources = tuple(f"{self._prefix}{name}.weight" for name in names)
        weight = _checked(read_stacked(sources, self._read), self._prefix + label, (rows, columns))
        stacked = None
        if bias:
            biases = tuple(f"{self._prefix}{name}.bias" for name in names)
            stacked = _checked(read_stacked(biases, self._read), f"{self._prefix}{label}.bias", (rows,))
        return Linear(ModelDtypeFormat(weight), stacked, sources)


def read_stacked(sources: tuple[str, ...], read: ReadTensor) -> torch.Tensor:
    """The checkpoint tensors ``sources`` stacked by rows; a single one as it is."""
    return read(sources[0]) if len(sources) == 1 else torch.cat([read(name) for name in sources])


def _checked(tensor: torch.Tensor, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    if tuple(tensor.shape) != shape:
        raise ModelLoadError(
            f"{name} has shape {list(tensor.shape)} but the configuration asks for {list(shape)}.",
            field="model",
            remedy="The weights and config.json do not belong together: download the model again.",
        )
    return tensor
