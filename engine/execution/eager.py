"""Eager execution: every operation is launched from Python."""

from __future__ import annotations

import torch

from engine.attention.base import AttentionBackend
from engine.execution.base import Decision, Step
from engine.execution.environment import ExecutionEnvironment, Kernels, Unsupported
from engine.execution.mode import ExecutionMode


class EagerMode(ExecutionMode):
    """Needs no preparation and serves every step of every model; weights are read at each step."""

    name = "eager"

    @classmethod
    def unsupported_reason(cls, environment: ExecutionEnvironment, kernels: Kernels) -> Unsupported | None:
        """None: it runs everywhere."""
        return None

    def prepare(self, attention: AttentionBackend) -> None:
        """Nothing to do."""

    def decide(self, step: Step) -> Decision:
        """As :meth:`ExecutionMode.decide`."""
        return Decision(self, "asked for")

    def forward(self, step: Step) -> torch.Tensor:
        """As :meth:`Execution.forward`."""
        hidden: torch.Tensor = self.environment.decoder(step.token_ids, step.positions, self.environment.context.attend)
        return hidden
