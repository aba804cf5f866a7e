"""Weight tensors as a serving engine stores them on one GPU."""

from __future__ import annotations

import dataclasses

from engine.capacity.formats import WeightPrecision


@dataclasses.dataclass(frozen=True, slots=True)
class Tensor:
    """``count`` equal tensors of ``rows`` outputs and ``columns`` inputs.

    Attributes:
        part: of the model, see :data:`engine.capacity.model.parameters.PARTS`.
        role: what it does, e.g. ``"qkv"``; operators of the roofline are named after it.
        rows, columns: numbers of elements.
        count: how many there are.
        active: how many of them one token passes through; None: all.
        linear: a matrix that weight formats apply to; else it keeps the model's dtype.
        slices: projections that are fused into one tensor (query, key and value: 3).
        own: its format in a quantized checkpoint, where that is not the one of most matrices there.
    """

    part: str
    role: str
    rows: int
    columns: int
    count: int = 1
    active: int | None = None
    linear: bool = False
    slices: int = 1
    own: WeightPrecision | None = None

    @property
    def size(self) -> int:
        """Elements of all of them."""
        return self.rows * self.columns * self.count

    @property
    def active_size(self) -> int:
        """Elements that one token passes through."""
        return self.rows * self.columns * (self.count if self.active is None else self.active)

    def times(self, layers: int) -> Tensor:
        """The same tensors in ``layers`` layers."""
        active = None if self.active is None else self.active * layers
        return dataclasses.replace(self, count=self.count * layers, active=active)


def share(size: int, parts: int) -> int:
    """What the fullest of ``parts`` GPUs holds of ``size`` equal things."""
    return -(-size // parts)
