"""Exchanging the weight format of a loaded model: prepared beside the running engine, committed between two steps."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable

import psutil
import torch

from engine.capacity import ModelSpec, weight_bytes
from engine.errors import CapacityError
from engine.models.checkpoint import Checkpoint, read_tensor
from engine.models.decoder import Decoder, read_stacked
from engine.quantization.error import QuantizationError, quantization_error
from engine.quantization.formats import ModelDtypeFormat, WeightFormat, dtype_name
from engine.quantization.registry import QUANTIZED_FORMATS, format_label

Progress = Callable[[float], None]


@dataclasses.dataclass(frozen=True, slots=True)
class PreparedWeights:
    """New formats of all exchangeable layers, ready to be put in place.

    Attributes:
        label: ``"model"``, ``"int8"``, ``"int4-g64"`` …
        formats: by layer name, as :meth:`Decoder.linears` names them.
    """

    label: str
    formats: dict[str, WeightFormat]

    def nbytes(self) -> int:
        """Bytes they occupy, beside the present weights until these are dropped at the commit."""
        return sum(format.nbytes() for format in self.formats.values())


def prepare(
    decoder: Decoder,
    checkpoint: Checkpoint,
    spec: ModelSpec,
    weights: str,
    group_size: int,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress | None = None,
) -> PreparedWeights:
    """Read every layer's weight again and make its new format; the decoder is only looked at, never changed.

    Raises:
        ConfigError: if the format or group size is unknown.
        CapacityError: if the new weights do not fit into free memory beside the present ones.
        ModelLoadError: if the checkpoint is gone or has changed.
    """
    label = format_label(weights, group_size)
    checkpoint.check_unchanged()
    _check_memory(decoder, spec, label, device, dtype)
    linears = list(decoder.linears())
    formats: dict[str, WeightFormat] = {}
    for done, (name, _, sources) in enumerate(linears, start=1):
        formats[name] = _make(checkpoint, sources, weights, group_size, device, dtype)
        if progress is not None:
            progress(done / len(linears))
    return PreparedWeights(label, formats)


def commit(decoder: Decoder, prepared: PreparedWeights) -> None:
    """Put the prepared formats in place: pointers only. The former weights are freed as nothing refers to them.

    All layers or none: should one of them fail, those before it get their former weights back.

    Raises:
        ValueError: if they were prepared for another decoder; nothing is exchanged then.
    """
    linears = {name: linear for name, linear, _ in decoder.linears()}
    if linears.keys() != prepared.formats.keys() or any(
        linear.format.shape != prepared.formats[name].shape for name, linear in linears.items()
    ):
        raise ValueError("these weights were prepared for another model")
    former = {name: linear.format for name, linear in linears.items()}
    try:
        for name, linear in linears.items():
            linear.exchange(prepared.formats[name])
    except BaseException:
        for name, linear in linears.items():
            linear.format = former[name]
        raise


def describe_path(decoder: Decoder) -> str:
    """What really runs in the linear layers; where they differ, each path with its number of layers."""
    paths = collections.Counter(linear.format.path for _, linear, _ in decoder.linears())
    if len(paths) == 1:
        return next(iter(paths))
    total = sum(paths.values())
    return "; ".join(f"{path} [{count} of {total} layers]" for path, count in paths.most_common())


def measure_errors(decoder: Decoder, checkpoint: Checkpoint) -> dict[str, QuantizationError]:
    """Weight error of every layer against the checkpoint, by layer name. Reads the whole checkpoint."""
    return {
        name: quantization_error(read_stacked(sources, lambda source: checkpoint.tensor(source).float()), linear.format)
        for name, linear, sources in decoder.linears()
    }


def _make(
    checkpoint: Checkpoint,
    sources: tuple[str, ...],
    weights: str,
    group_size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> WeightFormat:
    if weights == "model":
        # Converted first and stacked after, exactly as at loading: the bits are the same.
        return ModelDtypeFormat(read_stacked(sources, lambda name: read_tensor(checkpoint, name, device, dtype)))
    # Quantized from the checkpoint's own values, not from their rounding to the compute dtype.
    weight = read_stacked(sources, lambda name: checkpoint.tensor(name).float())
    return QUANTIZED_FORMATS[weights](weight, group_size, device, dtype)


def free_bytes(device: torch.device) -> int:
    """Memory of the device that can be had without swapping, in bytes."""
    return int(torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available)


def _check_memory(decoder: Decoder, spec: ModelSpec, label: str, device: torch.device, dtype: torch.dtype) -> None:
    """The present weights stay until the commit, so the new ones must fit beside them."""
    unquantized = decoder.resident_bytes() - sum(linear.format.nbytes() for _, linear, _ in decoder.linears())
    name = dtype_name(dtype)
    needed = weight_bytes(spec, name if label == "model" else label, dtype=name) - unquantized
    free = free_bytes(device)
    if needed > free:
        raise CapacityError(
            f"the new weights need {needed / 2**30:.2f} GiB beside the present ones; {free / 2**30:.2f} are free.",
            field="weights",
            remedy="Free memory, or load the model again with these weights.",
        )
