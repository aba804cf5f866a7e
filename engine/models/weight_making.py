"""From a checkpoint's tensors to one weight in the format and layout that is wanted, slice by slice.

Of the original there is never more in memory than a slice of rows: peak = the finished weight, once more its bytes
while it is brought into another kernel's layout, and the slice's temporaries (less than 50 MiB).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.errors import ModelLoadError
from engine.models.checkpoint import Checkpoint
from engine.quantization.formats import ModelDtypeFormat, WeightFormat
from engine.quantization.native import to_native
from engine.quantization.registry import QUANTIZED_FORMATS
from engine.quantization.rows import WeightRows


class CheckpointRows(WeightRows):
    """Tensors of a checkpoint stacked by rows, read as they are needed.

    Args:
        checkpoint: where they are.
        sources: their names, at least one.

    Raises:
        ModelLoadError: if one is missing, is no matrix, or has another width than the first.
    """

    def __init__(self, checkpoint: Checkpoint, sources: Sequence[str]) -> None:
        shapes = [checkpoint.shape(name) for name in sources]
        for name, shape in zip(sources, shapes, strict=True):
            if len(shape) != 2 or shape[1] != shapes[0][1] or 0 in shape:
                raise wrong_shape(name, shape, f"[rows, {shapes[0][1]}]" if len(shapes[0]) == 2 else "a matrix")
        self._checkpoint = checkpoint
        self._sources = tuple(zip(sources, (shape[0] for shape in shapes), strict=True))
        self.shape = (sum(shape[0] for shape in shapes), shapes[0][1])

    def read(self, start: int, stop: int) -> torch.Tensor:
        parts, before = [], 0
        for name, count in self._sources:
            first, last = max(start - before, 0), min(stop - before, count)
            if first < last:
                parts.append(self._checkpoint.rows(name, first, last))
            before += count
        # Sources may be stored in different types, of which float32 holds every one that a weight is stored in.
        same = len({part.dtype for part in parts}) == 1
        return parts[0] if len(parts) == 1 else torch.cat(parts if same else [part.float() for part in parts])


def make_weight(
    checkpoint: Checkpoint,
    sources: Sequence[str],
    weights: str,
    group_size: int,
    device: torch.device,
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
) -> WeightFormat:
    """One weight in the format ``weights``, quantized from the checkpoint's own values, not from their rounding to the
    compute dtype.

    Args:
        out: where an unquantized weight goes, [N, K] in ``dtype`` on the device; it is made if not given.

    Raises:
        ModelLoadError: if a source is missing or of another width than the others.
    """
    rows = CheckpointRows(checkpoint, sources)
    if weights == "model":
        return ModelDtypeFormat.read(rows, device, dtype, out)
    return QUANTIZED_FORMATS[weights](rows, group_size, device, dtype)


def convert(format: WeightFormat, linear: str) -> WeightFormat:
    """The format in the layout of the kernels that will multiply: ``"torch"``, ``"native"`` or ``"triton"``."""
    if linear == "native":
        return to_native(format)
    if linear == "triton":
        from engine.quantization.triton import to_triton  # Triton should load only where it is asked for

        return to_triton(format)
    return format


def wrong_shape(name: str, found: Sequence[object], wanted: object) -> ModelLoadError:
    """The error for a tensor that the configuration wants in another shape."""
    return ModelLoadError(
        f"{name} has shape {list(found)} but the configuration asks for {wanted}.",
        field="model",
        remedy="The weights and config.json do not belong together: download the model again.",
    )
