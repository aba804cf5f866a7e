"""From a checkpoint's tensors to the decoder's modules: stacked, checked for their shape, in the formats that are
wanted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import nn

from engine.layers.linear import Linear
from engine.layers.norm import RMSNorm
from engine.models.checkpoint import Checkpoint
from engine.models.weight_making import CheckpointRows, convert, make_weight, wrong_shape
from engine.quantization.registry import WeightChoice

Part = Literal["block", "embedding", "head"]
"""Of the model: linear layers of the blocks take the choice's ``weights``, the head its ``head``."""


class WeightSource:
    """A checkpoint whose weights are wanted in certain formats, each made before the next is read.

    Args:
        checkpoint: where they are.
        device, dtype: where and in which float type the unquantized ones live.
        choice: the formats; all in ``dtype`` if not given.
        read: called with the names of the tensors that have been read.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        choice: WeightChoice | None = None,
        read: Callable[[tuple[str, ...]], None] | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.device = device
        self.dtype = dtype
        self.choice = choice or WeightChoice()
        self._read = read or (lambda names: None)

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor that is never quantized, in the compute dtype on the device.

        Raises:
            ModelLoadError: if it is not there or has another shape; nothing is read then.
        """
        found = self.checkpoint.shape(name)
        if found != shape:
            raise wrong_shape(name, found, list(shape))
        tensor = self.checkpoint.tensor(name).to(device=self.device, dtype=self.dtype)
        self._read((name,))
        return tensor

    def linear(
        self,
        sources: tuple[str, ...],
        shape: tuple[int, int],
        *,
        label: str,
        part: Part = "block",
        bias: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> Linear:
        """The tensors ``sources`` stacked by rows into one weight of ``shape``.

        Args:
            label: what it is called in an error.
            out: where it goes if it is kept as it is, see :meth:`room`.

        Raises:
            ModelLoadError: if one is not there or the shape is another; nothing is read then.
        """
        found = CheckpointRows(self.checkpoint, sources).shape
        if found != shape:
            raise wrong_shape(label, found, list(shape))
        choice = self.choice
        weights = {"block": choice.weights, "embedding": "model", "head": choice.head}[part]
        format = make_weight(self.checkpoint, sources, weights, choice.group_size, self.device, self.dtype, out)
        self._read(sources)
        return Linear(convert(format, choice.linear), bias, sources)

    def room(self, count: int, shape: tuple[int, int]) -> list[torch.Tensor] | list[None]:
        """Room for so many weights of the blocks side by side in one tensor, for kernels that take them all at once;
        None for each where the choice lays them out in another way."""
        if self.choice.weights != "model" or self.choice.linear == "native":
            return [None] * count
        return list(torch.empty(count, *shape, dtype=self.dtype, device=self.device))


class WeightReader:
    """Reads what belongs under one prefix of names.

    Args:
        source: the weights.
        prefix: put before every name, e.g. ``"model.layers.3."``.
    """

    def __init__(self, source: WeightSource, prefix: str = "") -> None:
        self._source = source
        self._prefix = prefix

    def tensor(self, name: str, *shape: int) -> torch.Tensor:
        """``<prefix><name>.weight``.

        Raises:
            ModelLoadError: if it is not there or has another shape.
        """
        return self._source.tensor(f"{self._prefix}{name}.weight", shape)

    def norm(self, name: str | None, size: int, eps: float) -> nn.Module:
        """RMSNorm over ``size`` values; the identity if it has no name."""
        return nn.Identity() if name is None else RMSNorm(self.tensor(name, size), eps)

    def linear(
        self,
        names: tuple[str, ...],
        rows: int,
        columns: int,
        *,
        label: str,
        bias: bool = False,
        part: Part = "block",
        out: torch.Tensor | None = None,
    ) -> Linear:
        """The linear layers ``names`` stacked by rows into one of [rows, columns].

        Args:
            label: what the result is called in an error.
            bias: each of them has one.
            part: of the model.
            out: see :meth:`WeightSource.linear`.
        """
        sources = tuple(f"{self._prefix}{name}.weight" for name in names)
        stacked = self._biases(names, rows, label) if bias else None
        return self._source.linear(
            sources, (rows, columns), label=self._prefix + label, part=part, bias=stacked, out=out
        )

    def room(self, count: int, rows: int, columns: int) -> list[torch.Tensor] | list[None]:
        """As :meth:`WeightSource.room`."""
        return self._source.room(count, (rows, columns))

    def _biases(self, names: tuple[str, ...], rows: int, label: str) -> torch.Tensor:
        sources = [f"{self._prefix}{name}.bias" for name in names]
        shapes = [self._source.checkpoint.shape(source) for source in sources]
        if any(len(shape) != 1 for shape in shapes) or sum(shape[0] for shape in shapes) != rows:
            found: list[object] = [list(shape) for shape in shapes]
            raise wrong_shape(f"{self._prefix}{label}.bias", found, [rows])
        parts = [self._source.tensor(source, shape) for source, shape in zip(sources, shapes, strict=True)]
        return torch.cat(parts)
