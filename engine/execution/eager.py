"""Eager execution: every operation is launched from Python."""

from __future__ import annotations

import torch

from engine.execution.base import Execution, Step
from engine.models.decoder import Decoder
from engine.models.fallback import TransformersDecoder


class EagerExecution(Execution):
    """Needs no preparation and serves every step.

    Args:
        decoder: of the model; read at each step, so swapped weights are seen at once.
    """

    mode = "eager"

    def __init__(self, decoder: Decoder | TransformersDecoder) -> None:
        self._decoder = decoder

    def forward(self, step: Step) -> torch.Tensor:
        """As :meth:`Execution.forward`."""
        hidden: torch.Tensor = self._decoder(step.token_ids, step.positions, step.context.attend)
        return hidden
