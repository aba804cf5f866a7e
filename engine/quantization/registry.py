"""The weight formats that can be chosen, one row each: the values of the knob ``weights``."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch

from engine.capacity import weight_precision
from engine.config import add_choice
from engine.errors import ConfigError
from engine.quantization.formats import ModelDtypeFormat, WeightFormat
from engine.quantization.int4 import GROUP_SIZES, Int4Format, largest_group_size
from engine.quantization.int8 import Int8Format
from engine.quantization.rows import Weight
from engine.quantization.scaled import KINDS, ScaledFormat
from engine.quantization.w4a8 import W4A8Format

MakeFormat = Callable[[Weight, int, torch.device, torch.dtype], WeightFormat]
"""(weight [N, K], read slice by slice; group size, device, compute dtype) → the format."""


def _make_int8(weight: Weight, group_size: int, device: torch.device, dtype: torch.dtype) -> WeightFormat:
    return Int8Format(weight, device, dtype)


def _make_int4(weight: Weight, group_size: int, device: torch.device, dtype: torch.dtype) -> WeightFormat:
    """The group size asked for, else the largest that divides the width, else unquantized; the path says which."""
    fitting = largest_group_size(weight.shape[1], group_size)
    if fitting is None or weight.shape[0] % 2:
        return ModelDtypeFormat.read(weight, device, dtype)
    return Int4Format(weight, fitting, device, dtype)


def _make_w4a8(weight: Weight, group_size: int, device: torch.device, dtype: torch.dtype) -> WeightFormat:
    """Unquantized where the groups of 32 do not divide the width; the path says so."""
    if largest_group_size(weight.shape[1], W4A8Format.group_size) is None or weight.shape[0] % 2:
        return ModelDtypeFormat.read(weight, device, dtype)
    return W4A8Format(weight, device, dtype)


def _make_scaled(name: str, weight: Weight, group_size: int, device: torch.device, dtype: torch.dtype) -> WeightFormat:
    return ScaledFormat(name, weight, device, dtype)


QUANTIZED_FORMATS: dict[str, MakeFormat] = {
    "int8": _make_int8,
    "int4": _make_int4,
    "w4a8": _make_w4a8,
    **{name: functools.partial(_make_scaled, name) for name in KINDS},
}

#: Registered formats → the planner's format of the same size; ``"model"`` where the planner has none.
_PLANNED_AS: dict[str, str] = {}


def register_weight_format(name: str, make: MakeFormat, *, planned_as: str = "model") -> Callable[[], None]:
    """Make a weight format a value of the knob ``weights``: page, command line, API and engine have it from then on.

    The engine sizes its cache with the weights as they are resident. Only before they exist (to refuse a swap or a load
    that cannot fit) it asks the planner.

    Args:
        name: the value, e.g. ``"int6"``.
        make: a :class:`WeightFormat` that is constructed with these arguments, or a function that makes one.
        planned_as: the planner's format that takes the same bytes, e.g. ``"int8"``. By default the model's compute
            dtype, which is more than a smaller format needs, so that a swap may be refused that would have fitted.

    Returns:
        A function that takes it away again; no engine may use it then.

    Raises:
        ConfigError: if the knob has that value already, or the planner has no format ``planned_as``.
    """
    if planned_as != "model":
        weight_precision(planned_as)
    remove_choice = add_choice("weights", name)
    QUANTIZED_FORMATS[name], _PLANNED_AS[name] = make, planned_as

    def remove() -> None:
        remove_choice()
        del QUANTIZED_FORMATS[name], _PLANNED_AS[name]

    return remove


@dataclasses.dataclass(frozen=True, slots=True)
class WeightChoice:
    """In which format the weights of a model are kept, and which kernels multiply with them.

    Attributes:
        weights: of the blocks' linear layers: ``"model"`` or a key of :data:`QUANTIZED_FORMATS`.
        group_size: of INT4.
        head: of the head (and of an embedding tied to it): ``"model"`` or ``"int8"``.
        linear: ``"torch"``, ``"native"`` or ``"triton"``.

    Raises:
        ConfigError: if there is no such format or group size.
    """

    weights: str = "model"
    group_size: int = 32
    head: str = "model"
    linear: str = "torch"

    def __post_init__(self) -> None:
        _require("weights", self.weights, ("model", *QUANTIZED_FORMATS))
        _require("head_weights", self.head, ("model", "int8"))
        _require("linear", self.linear, ("torch", "native", "triton"))
        if self.weights == "int4":
            _require("group_size", self.group_size, tuple(sorted(GROUP_SIZES)))

    @property
    def format_name(self) -> str:
        """Of the linear layers: ``"model"``, ``"int8"``, ``"int4-g64"`` …"""
        return f"int4-g{self.group_size}" if self.weights == "int4" else self.weights

    @property
    def planned_as(self) -> str:
        """The planner's name of a format of the same size; ``"model"`` for the compute dtype."""
        return _PLANNED_AS.get(self.weights, self.format_name)

    @property
    def planning_note(self) -> str:
        """What an error about planned bytes adds where they are only an upper bound, else ``""``."""
        if self.weights == "model" or self.planned_as != "model":
            return ""
        return f" (counted in the model's dtype: {self.weights} declares no size)"

    @property
    def label(self) -> str:
        """All of it for people, e.g. ``"int4-g64, head int8"``."""
        return self.format_name + (f", head {self.head}" if self.head != "model" else "")

    def same_as(self, other: WeightChoice) -> bool:
        """True if nothing has to be swapped between the two: the group size matters to INT4 only."""
        return (self.label, self.linear) == (other.label, other.linear)


def _require(field: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        known = ", ".join(map(str, choices))
        raise ConfigError(f"{value!r} is not available.", field=field, remedy=f"Choose one of: {known}.")
