"""What a checkpoint states of its own quantization: which matrices are in which format."""

from __future__ import annotations

import dataclasses

from engine.capacity.formats import UNQUANTIZED, WeightPrecision
from engine.capacity.model.layers import Layer
from engine.capacity.model.module_names import ModuleList


class RoleList(ModuleList):
    """The matrices of some roles in every layer."""

    def __init__(self, roles: list[str]) -> None:
        super().__init__([])
        self._roles = frozenset(roles)

    def holds(self, role: str, layer: int) -> bool:
        return role in self._roles


@dataclasses.dataclass(frozen=True, slots=True)
class QuantizationRule:
    """Matrices that ``targets`` holds (None: all) are in ``format``; a later rule wins over an earlier one."""

    targets: ModuleList | None
    format: WeightPrecision


@dataclasses.dataclass(frozen=True, slots=True)
class Quantization:
    """What a checkpoint states of its own quantization.

    Attributes:
        format: of most matrices; None if they are not quantized, or nobody knows how.
        rules: the exceptions, in order.
        kv_dtype: KV cache format that it asks for; None: none.
        remarks: what could not be read, for display.
    """

    format: WeightPrecision | None = None
    rules: tuple[QuantizationRule, ...] = ()
    kv_dtype: str | None = None
    remarks: tuple[str, ...] = ()

    def of(self, role: str, layer: int) -> WeightPrecision:
        """The format of the matrices of ``role`` (see :mod:`engine.capacity.model.module_names`) in a layer."""
        found = self.format or UNQUANTIZED
        for rule in self.rules:
            if rule.targets is None or rule.targets.holds(role, layer):
                found = rule.format
        return found

    def apply(self, layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
        """The layers, each with the formats that differ from the usual one."""
        if self.format is None or not self.rules:
            return layers
        roles: dict[int, list[str]] = {}
        made: dict[tuple[int, tuple[tuple[str, WeightPrecision], ...]], Layer] = {}
        found = []
        for index, layer in enumerate(layers):
            if id(layer) not in roles:
                roles[id(layer)] = [tensor.role for tensor in layer.tensors(1, 1, 1) if tensor.linear]
            formats = ((role, self.of(role, index)) for role in roles[id(layer)])
            own = tuple((role, form) for role, form in formats if form != self.format)
            key = (id(layer), own)
            if key not in made:
                made[key] = dataclasses.replace(layer, formats=own)
            found.append(made[key])
        return tuple(found)

    def head(self) -> WeightPrecision | None:
        """The format of a head of its own; None where it is not quantized."""
        if self.format is None:
            return None
        form = self.of("head", 0)
        return None if form == UNQUANTIZED else form
