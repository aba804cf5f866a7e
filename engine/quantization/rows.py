"""A weight that is made of rows, taken slice by slice: what quantizes one needs room for a slice, not for all of it."""

from __future__ import annotations

import abc
from collections.abc import Iterator

import torch

#: Rows of every slice but the last are a multiple of this: whole blocks and panels of every packed layout.
ROWS_MULTIPLE = 64
_SLICE_ELEMENTS = 1 << 20  # 4 MiB in float32: large enough for vector units, small next to any model
_SLICE_ELEMENTS_CUDA = 1 << 25  # a launch and a transfer each cost more than a CPU's loop


class WeightRows(abc.ABC):
    """A matrix [N, K] that is somewhere else, most often in a file.

    Attributes:
        shape: (N, K).
    """

    shape: tuple[int, int]

    @abc.abstractmethod
    def read(self, start: int, stop: int) -> torch.Tensor:
        """Rows ``start`` … ``stop`` - 1, [stop - start, K], in the float dtype that they are stored in."""


Weight = torch.Tensor | WeightRows
"""A weight [N, K] in memory, or one that is read as it is needed."""


def slice_rows(columns: int, device: torch.device) -> int:
    """Rows of a slice of a weight with so many columns, a multiple of :data:`ROWS_MULTIPLE`."""
    elements = _SLICE_ELEMENTS_CUDA if device.type == "cuda" else _SLICE_ELEMENTS
    return max(elements // max(columns, 1) // ROWS_MULTIPLE, 1) * ROWS_MULTIPLE


def row_slices(weight: Weight, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """The rows of a weight in order: (which, their values on the device in ``dtype``), one slice at a time."""
    num_rows, columns = weight.shape
    step = slice_rows(columns, device)
    for start in range(0, num_rows, step):
        rows = slice(start, min(start + step, num_rows))
        part = weight[rows] if isinstance(weight, torch.Tensor) else weight.read(rows.start, rows.stop)
        yield rows, part.to(device=device, dtype=dtype)
