"""What the modes have in common that prepare one shape after the other while other modes serve."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from engine.execution.base import Decision, PreparedShape, Step, TokenRange
from engine.execution.dispatcher import Dispatcher
from engine.execution.eager import EagerMode
from engine.execution.environment import ExecutionEnvironment
from engine.execution.mode import ExecutionMode


@dataclasses.dataclass(frozen=True, slots=True)
class ShapeNews:
    """What became of one shape.

    Attributes:
        tokens: the numbers of tokens concerned.
        shape: ready to run; None if it failed.
        seconds: how long it took.
        origin: "compiled", "from disk" or "captured".
        error: why it failed, else empty.
    """

    tokens: TokenRange
    shape: PreparedShape | None
    seconds: float
    origin: str = ""
    error: str = ""


class ShapedMode(ExecutionMode):
    """Shapes take over as they become ready; until then, and where one failed, ``fallback`` serves.

    Attributes:
        fallback: eager, unless a mode finds a quicker one.
    """

    def __init__(self, environment: ExecutionEnvironment) -> None:
        super().__init__(environment)
        self.dispatcher = Dispatcher()
        self.fallback: ExecutionMode = EagerMode(environment)

    def take_over(self, news: ShapeNews) -> None:
        """Serve with a shape that is ready, or remember why it is none; the event log has it."""
        detail = {"low": news.tokens.low, "high": news.tokens.high, "seconds": round(news.seconds, 2)}
        if news.shape is None:
            self.dispatcher.fail(news.tokens, news.error)
            summary = f"{self.name}: {news.tokens} tokens stay eager: {news.error}"
            self.environment.add_event("execution", summary, {**detail, "error": news.error})
            return
        self.dispatcher.add(news.shape)
        summary = f"{self.name}: {news.tokens} tokens ready ({news.origin}, {news.seconds:.1f} s)"
        self.environment.add_event("execution", summary, {**detail, "origin": news.origin})

    def decide(self, step: Step) -> Decision:
        """As :meth:`ExecutionMode.decide`."""
        return self.dispatcher.decide(step.num_tokens, self.fallback)

    def forward(self, step: Step) -> torch.Tensor:
        """As :meth:`Execution.forward`, by what is ready."""
        return self.decide(step).execution.forward(step)

    def prepared(self) -> Sequence[TokenRange]:
        """As :meth:`ExecutionMode.prepared`."""
        return self.dispatcher.prepared()

    def failed(self) -> Sequence[tuple[TokenRange, str]]:
        """As :meth:`ExecutionMode.failed`."""
        return self.dispatcher.failed()

    def path(self) -> str:
        """The mode, the token counts it is prepared for, what failed."""
        ready = ", ".join(map(str, self.prepared()))
        parts = [f"{self.name} ({ready} tokens)" if ready else self.fallback.path()]
        if self.preparing:
            parts.append(f"preparing {self.name}")
        parts += [f"{tokens} tokens eager: {error}" for tokens, error in self.failed()]
        return "; ".join(parts)

    def close(self) -> None:
        """As :meth:`ExecutionMode.close`."""
        self.fallback.close()
        self.dispatcher.forget()
