"""Swapping the weight format of a loaded model: prepared alongside the running engine, committed between two steps."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable

import psutil
import torch

from engine.capacity import ModelSpec, weight_bytes
from engine.capacity.formats import compute_dtype, weight_precision
from engine.capacity.text import GIB
from engine.device import available_memory
from engine.errors import CapacityError, ConfigError
from engine.models.checkpoint import Checkpoint
from engine.models.decoder import Decoder
from engine.models.fallback import TransformersDecoder
from engine.models.weight_making import CheckpointRows, convert, make_weight
from engine.quantization.error import QuantizationError, quantization_error
from engine.quantization.formats import WeightFormat, dtype_name
from engine.quantization.registry import WeightChoice

Progress = Callable[[float], None]


@dataclasses.dataclass(frozen=True, slots=True)
class PreparedWeights:
    """New formats of all swappable layers, ready to be put in place.

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

    Until the commit both formats are in memory: the peak is the sum of the two and what :mod:`weight_making` needs for
    the largest weight.

    The layers of the blocks take ``choice.weights``, the head takes ``choice.head``; an embedding follows the head only
    if the two are one. Where both stay as they are at present they are taken over, not read.

    Raises:
        ConfigError: if the decoder keeps the weights it has.
        CapacityError: if the new weights do not fit into free memory next to the present ones.
        ModelLoadError: if the checkpoint is gone or has changed.
    """
    if not decoder.swaps_weights:
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
        format = make_weight(checkpoint, sources, weights, choice.group_size, device, dtype)
        formats[name] = convert(format, choice.linear)
        if progress is not None:
            progress(done / len(wanted))
    return PreparedWeights(choice, formats)


def repack(decoder: Decoder, linear: str) -> None:
    """Bring freshly loaded weights into the layout of other kernels, one layer at a time."""
    for _, module, _ in (*decoder.linears(), *decoder.tables()):
        module.swap(convert(module.format, linear))


def commit(decoder: Decoder | TransformersDecoder, prepared: PreparedWeights) -> None:
    """Put the prepared formats in place: pointers only. The previous weights are freed as nothing refers to them.

    All layers or none: should one of them fail, those before it get their previous weights back.

    Raises:
        ValueError: if they were prepared for another decoder; nothing is swapped then.
    """
    linears = {name: linear for name, linear, _ in (*decoder.linears(), *decoder.tables())}
    if linears.keys() != prepared.formats.keys() or any(
        linear.format.shape != prepared.formats[name].shape for name, linear in linears.items()
    ):
        raise ValueError("these weights were prepared for another model")
    previous = {name: linear.format for name, linear in linears.items()}
    try:
        for name, linear in linears.items():
            linear.swap(prepared.formats[name])
    except BaseException:
        for name, linear in linears.items():
            linear.swap(previous[name])
        raise


def describe_path(decoder: Decoder | TransformersDecoder, dtype: torch.dtype) -> str:
    """What really runs in the linear layers; where they differ, each path with its number of layers."""
    if not decoder.swaps_weights:
        return f"model: {dtype_name(dtype)} matmul by transformers"
    paths = collections.Counter(linear.format.path for _, linear, _ in decoder.linears())
    total = sum(paths.values())
    parts = [f"{path} [{count} of {total} layers]" for path, count in paths.most_common()]
    *_, (_, head, _) = decoder.tables()
    text = next(iter(paths)) if len(paths) == 1 else "; ".join(parts)
    return text if head.format.bits is None else f"{text}; head {head.format.path}"


def left_to_torch(decoder: Decoder | TransformersDecoder, linear: str) -> str:
    """A sentence where other kernels were chosen but have no form for all layers' formats and shapes, else ``""``."""
    if linear == "torch" or not decoder.swaps_weights:
        return ""
    formats = [module.format for _, module, _ in decoder.linears()]
    # On a GPU unquantized weights are torch's by design.
    left = [f for f in formats if linear not in f.path and not (linear == "triton" and f.bits is None)]
    kinds = ", ".join(sorted({format.name for format in left}))
    sentence = (
        f"{len(left)} of {len(formats)} layers ({kinds}) go through torch: the {linear} kernels have no form for them."
    )
    return sentence if left else ""


def measure_errors(decoder: Decoder | TransformersDecoder, checkpoint: Checkpoint) -> dict[str, QuantizationError]:
    """Weight error of every layer against the checkpoint, by layer name. Reads the whole checkpoint."""
    return {
        name: quantization_error(_original(checkpoint, sources), linear.format)
        for name, linear, sources in decoder.linears()
    }


def _original(checkpoint: Checkpoint, sources: tuple[str, ...]) -> torch.Tensor:
    """float32 [N, K], as the checkpoint has it."""
    rows = CheckpointRows(checkpoint, sources)
    return rows.read(0, rows.shape[0]).float()


def planned_bytes(spec: ModelSpec, choice: WeightChoice, dtype: torch.dtype) -> int:
    """Bytes of all weights in the formats of ``choice``, by the planner's formula."""
    name = dtype_name(dtype)
    # torch's operator wants an INT4 group's zero point in bfloat16, next to its scale
    stored = name if choice.planned_as == "model" else choice.planned_as
    total = weight_bytes(spec, weight_precision(stored, zero_point_bits=16), compute_dtype(name))
    if choice.head == "int8":
        rows, width = spec.vocab_size, spec.hidden_size
        total += rows * (width + 2) - rows * width * dtype.itemsize  # one bfloat16 scale a row
    return total


def free_bytes(device: torch.device) -> int:
    """Memory of the device that is available without swapping, in bytes."""
    return int(available_memory(device) if device.type == "cuda" else psutil.virtual_memory().available)


def _check_memory(
    decoder: Decoder | TransformersDecoder,
    spec: ModelSpec,
    choice: WeightChoice,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """The present weights stay until the commit, so the new ones must fit next to them."""
    needed = planned_bytes(spec, choice, dtype)
    free = free_bytes(device)
    if needed > free:
        raise CapacityError(
            f"the new weights need {needed / GIB:.2f} GiB{choice.planning_note} next to the current ones; "
            f"{free / GIB:.2f} are free.",
            field="weights",
            remedy="Free memory, or load the model again with these weights.",
        )
