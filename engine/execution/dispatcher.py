"""The only truth about what a mode has prepared: for every step it says which shape runs, or why none does."""

from __future__ import annotations

from collections.abc import Sequence

from engine.execution.base import Decision, Execution, PreparedShape, TokenRange


class Dispatcher:
    """The shapes that are ready and those that failed, for one state of the weights; asked once a step."""

    def __init__(self) -> None:
        self._shapes: list[PreparedShape] = []
        self._failed: list[tuple[TokenRange, str]] = []

    def decide(self, num_tokens: int, otherwise: Execution) -> Decision:
        """What runs a step of ``num_tokens`` tokens: the shape prepared for it, else ``otherwise`` and why."""
        for shape in self._shapes:
            if num_tokens in shape.tokens:
                return Decision(shape, f"prepared for {shape.tokens} tokens")
        return Decision(otherwise, self._missing_reason(num_tokens))

    def _missing_reason(self, num_tokens: int) -> str:
        for tokens, error in self._failed:
            if num_tokens in tokens:
                return f"preparing {tokens} tokens failed: {error}"
        return f"{num_tokens} tokens are not prepared"

    def add(self, shape: PreparedShape) -> None:
        """A shape is ready."""
        self._shapes.append(shape)

    def fail(self, tokens: TokenRange, error: str) -> None:
        """A shape could not be prepared."""
        self._failed.append((tokens, error))

    def forget(self) -> None:
        """Drop everything."""
        self._shapes, self._failed = [], []

    def prepared(self) -> Sequence[TokenRange]:
        """Token counts that are ready, ascending."""
        return sorted((shape.tokens for shape in self._shapes), key=lambda tokens: tokens.low)

    def failed(self) -> Sequence[tuple[TokenRange, str]]:
        """Token counts that failed, and why."""
        return tuple(self._failed)
