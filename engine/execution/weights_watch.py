"""Knows when the weights of a decoder are no longer the ones they were."""

from __future__ import annotations

from engine.execution.environment import AnyDecoder
from engine.layers.linear import Linear


class WeightsWatch:
    """Gives every state of a decoder's weights a name of its own.

    A prepared shape holds the very tensors it computes with. Who swaps them need not tell: two engines may share a
    model. So the layers are looked at whenever any layer of the process was given another format.
    """

    def __init__(self, decoder: AnyDecoder) -> None:
        self._linears = [linear for _, linear, _ in (*decoder.linears(), *decoder.tables())]
        self._formats = [linear.format for linear in self._linears]
        self._swaps = Linear.swaps
        self._generation = 0
        self._label = self._make_label()

    def label(self) -> str:
        """Names the weights as they are now: another name after every swap."""
        if self._swaps != Linear.swaps:
            self._swaps = Linear.swaps
            formats = [linear.format for linear in self._linears]
            if any(format is not known for format, known in zip(formats, self._formats, strict=True)):
                self._formats = formats
                self._generation += 1
                self._label = self._make_label()
        return self._label

    def _make_label(self) -> str:
        names = dict.fromkeys(format.name for format in self._formats)
        return f"{'+'.join(names)}#{self._generation}"
