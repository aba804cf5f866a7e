"""Exchanging the weight format of a loaded model: prepared beside the running engine, committed between two steps."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable

import psutil
import torch

from engine.capacity import ModelSpec, weight_bytes
from engine.device import available_memory
from engine.errors import CapacityError, ConfigError
from engine.models.checkpoint import Checkpoint, read_tensor
from engine.models.decoder import Decoder
from engine.models.fallback import TransformersDecoder
from engine.models.weight_reader import read_stacked
from engine.quantization.error import QuantizationError, quantization_error
from engine.quantization.formats import ModelDtypeFormat, WeightFormat, dtype_name
from engine.quantization.native import to_native
from engine.quantization.registry import QUANTIZED_FORMATS, WeightChoice

Progress = Callable[[float], None]


@dataclasses.dataclass(frozen=True, slots=True)
class PreparedWeights:
    """New formats of all exchangeable layers, ready to be put in place.

    Attributes:
        choice: what was asked for.
        formats: by name, as :meth:`Decoder.linears` and :meth:`Decoder.tables` have them.
    """

    choice: WeightChoice
    formats: dict[str, WeightFormat]

    def nbytes(self) -> int:
        """Bytes they occupy; what is taken over from the present weights is counted too."""
        return sum(format.nbytes() for format in self.formats.values())


def prepare(
    decoder: Decoder | TransformersDecoder,
    checkpoint: Checkpoint,
    spec: ModelSpec,
    choice: WeightChoice,
    present: WeightChoice,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress | None = None,
) -> PreparedWeights:
    """Read every layer's weight again and make its new format; the decoder is only looked at, never changed.

    The layers of the blocks take ``choice.weights``, the head takes ``choice.head``; an embedding follows the head only
    if the two are one. Where both stay as they are at present they are taken over, not read.

    Raises:
        ConfigError: if the decoder keeps the weights it has.
        CapacityError: if the new weights do not fit into free memory beside the present ones.
        ModelLoadError: if the checkpoint is gone or has changed.
    """
    if not decoder.exchanges_weights:
        raise ConfigError(
            f"{choice.label!r} is not available for {spec.architecture}, which runs through transformers.",
            field="weights",
            remedy="Choose model.",
        )
    checkpoint.check_unchanged()
    _check_memory(decoder, spec, choice, device, dtype)
    wanted = [(name, choice.weights, sources) for name, _, sources in decoder.linears()]
    formats: dict[str, WeightFormat] = {}
    if (choice.head, choice.linear) == (present.head, present.linear):
        formats |= {name: table.format for name, table, _ in decoder.tables()}
    else:
        *embeddings, head = decoder.tables()
        wanted += [(name, "model", sources) for name, _, sources in embeddings]
        wanted.append((head[0], choice.head, head[2]))
    for done, (name, weights, sources) in enumerate(wanted, start=1):
        format = _make(checkpoint, sources, weights, choice.group_size, device, dtype)
        formats[name] = convert(format, choice.linear)
        if progress is not None:
            progress(done / len(wanted))
    return PreparedWeights(choice, formats)


def convert(format: WeightFormat, linear: str) -> WeightFormat:
    """The format in the layout of the kernels that will multiply: ``"torch"``, ``"native"`` or ``"triton"``."""
    if linear == "native":
        return to_native(format)
    if linear == "triton":
        from engine.quantization.triton import to_triton  # Triton should load only where it is asked for

        return to_triton(format)
    return format


def repack(decoder: Decoder, linear: str) -> None:
    """Bring freshly loaded weights into the layout of other kernels, one layer at a time."""
    for _, module, _ in (*decoder.linears(), *decoder.tables()):
        module.exchange(convert(module.format, linear))


def commit(decoder: Decoder | TransformersDecoder, prepared: PreparedWeights) -> None:
    """Put the prepared formats in place: pointers only. The former weights are freed as nothing refers to them.

    All layers or none: should one of them fail, those before it get their former weights back.

    Raises:
        ValueError: if they were prepared for another decoder; nothing is exchanged then.
    """
    linears = {name: linear for name, linear, _ in (*decoder.linears(), *decoder.tables())}
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
            linear.exchange(former[name])
        raise


def describe_path(decoder: Decoder | TransformersDecoder, dtype: torch.dtype) -> str:
    """What really runs in the linear layers; where they differ, each path with its number of layers."""
    if not decoder.exchanges_weights:
        return f"model: {dtype_name(dtype)} matmul by transformers"
    paths = collections.Counter(linear.format.path for _, linear, _ in decoder.linears())
    total = sum(paths.values())
    parts = [f"{path} [{count} of {total} layers]" for path, count in paths.most_common()]
    *_, (_, head, _) = decoder.tables()
    text = next(iter(paths)) if len(paths) == 1 else "; ".join(parts)
    return text if head.format.bits is None else f"{text}; head {head.format.path}"


def left_to_torch(decoder: Decoder | TransformersDecoder, linear: str) -> str:
    """A sentence where other kernels were chosen but have no form for all layers' formats and shapes, else ``""``."""
    if linear == "torch" or not decoder.exchanges_weights:
        return ""
    formats = [module.format for _, module, _ in decoder.linears()]
    # On a GPU unquantized weights are torch's by design.
    left = [f for f in formats if linear not in f.path and not (linear == "triton" and f.bits is None)]
    kinds = ", ".join(sorted({format.name for format in left}))
    words = (
        f"{len(left)} of {len(formats)} layers ({kinds}) go through torch: the {linear} kernels have no form for them."
    )
    return words if left else ""


def measure_errors(decoder: Decoder | TransformersDecoder, checkpoint: Checkpoint) -> dict[str, QuantizationError]:
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
    return int(available_memory(device) if device.type == "cuda" else psutil.virtual_memory().available)


def _check_memory(
    decoder: Decoder | TransformersDecoder,
    spec: ModelSpec,
    choice: WeightChoice,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """The present weights stay until the commit, so the new ones must fit beside them."""
    name = dtype_name(dtype)
    needed = weight_bytes(spec, name if choice.weights == "model" else choice.format_name, dtype=name)
    free = free_bytes(device)
    if needed > free:
        raise CapacityError(
            f"the new weights need {needed / 2**30:.2f} GiB beside the present ones; {free / 2**30:.2f} are free.",
            field="weights",
            remedy="Free memory, or load the model again with these weights.",
        )
