"""What the modes have in common that serve every step at once: there is nothing to wait for."""

from __future__ import annotations

from collections.abc import Sequence

from engine.attention.base import AttentionBackend
from engine.execution.base import Decision, Step, TokenRange
from engine.execution.eager import EagerMode
from engine.execution.environment import ExecutionEnvironment
from engine.execution.mode import ExecutionMode


class DirectMode(ExecutionMode):
    """Kernels that take the weights as they lie. Eager serves where those, swapped meanwhile, turn out to be others."""

    uses_attention = True

    def __init__(self, environment: ExecutionEnvironment) -> None:
        super().__init__(environment)
        self._tokens = TokenRange(1, environment.max_tokens)
        self._eager = EagerMode(environment)
        self._error: str | None = None

    def prepare(self, attention: AttentionBackend) -> None:
        """As :meth:`ExecutionMode.prepare`."""
        unsupported = self.unsupported_reason(self.environment, self.environment.present_kernels(attention.name))
        if unsupported is None:
            self.make(attention)
        else:
            self._error = f"{self.name} execution is unavailable: {unsupported.reason}"

    def make(self, attention: AttentionBackend) -> None:
        """Make what :meth:`forward` needs."""

    def decide(self, step: Step) -> Decision:
        """As :meth:`ExecutionMode.decide`."""
        if self._error is None:
            return Decision(self, f"prepared for {self._tokens} tokens")
        return Decision(self._eager, f"preparing {self._tokens} tokens failed: {self._error}")

    def prepared(self) -> Sequence[TokenRange]:
        """As :meth:`ExecutionMode.prepared`."""
        return (self._tokens,) if self._error is None else ()

    def failed(self) -> Sequence[tuple[TokenRange, str]]:
        """As :meth:`ExecutionMode.failed`."""
        return () if self._error is None else ((self._tokens, self._error),)

    def path(self) -> str:
        """As :meth:`ExecutionMode.path`."""
        return self.name if self._error is None else self._eager.path()
