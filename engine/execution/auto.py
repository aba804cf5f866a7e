"""The quickest mode that needs no waiting: native on the CPU, fused on a GPU, else eager."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.attention.base import AttentionBackend
from engine.execution.base import Decision, Progress, Step, TokenRange
from engine.execution.eager import EagerMode
from engine.execution.environment import ExecutionEnvironment, Kernels, Unsupported
from engine.execution.fused import FusedMode
from engine.execution.mode import ExecutionMode
from engine.execution.native import NativeMode

BY_DEVICE: dict[str, tuple[type[ExecutionMode], ...]] = {"cuda": (NativeMode, FusedMode)}
"""What is tried, in this order; native alone on any other device."""


class AutoMode(ExecutionMode):
    """Chooses for the present weights and attention backend; eager with the reasons where none of the others can."""

    name = "auto"
    uses_attention = True

    def __init__(self, environment: ExecutionEnvironment) -> None:
        super().__init__(environment)
        self._chosen: ExecutionMode = EagerMode(environment)
        self._reasons: list[str] = []

    @classmethod
    def unsupported_reason(cls, environment: ExecutionEnvironment, kernels: Kernels) -> Unsupported | None:
        """None: there is always eager."""
        return None

    def prepare(self, attention: AttentionBackend) -> None:
        """As :meth:`ExecutionMode.prepare`."""
        kernels = self.environment.present_kernels(attention.name)
        for mode in BY_DEVICE.get(self.environment.device.type, (NativeMode,)):
            unsupported = mode.unsupported_reason(self.environment, kernels)
            if unsupported is None:
                self._reasons, self._chosen = [], mode(self.environment)
                self._chosen.prepare(attention)
                return
            self._reasons.append(f"{mode.name} execution is unavailable: {unsupported.reason}")

    def poll(self) -> None:
        """As :meth:`ExecutionMode.poll`."""
        self._chosen.poll()

    @property
    def has_work(self) -> bool:
        """As :attr:`ExecutionMode.has_work`."""
        return self._chosen.has_work

    def progress(self) -> Progress:
        """As :meth:`ExecutionMode.progress`."""
        return self._chosen.progress()

    def decide(self, step: Step) -> Decision:
        """As :meth:`ExecutionMode.decide`."""
        decision = self._chosen.decide(step)
        return Decision(decision.execution, " ".join(self._reasons)) if self._reasons else decision

    def forward(self, step: Step) -> torch.Tensor:
        """As :meth:`Execution.forward`."""
        return self._chosen.forward(step)

    def prepared(self) -> Sequence[TokenRange]:
        """As :meth:`ExecutionMode.prepared`. A mode that is passed over is no failure: :meth:`failed` stays empty."""
        return self._chosen.prepared()

    def path(self) -> str:
        """As :meth:`ExecutionMode.path`."""
        return self._chosen.path()

    def close(self) -> None:
        """As :meth:`ExecutionMode.close`."""
        self._chosen.close()
