"""What the modes of execution share: a step's tensors, the interface of a prepared shape, the dispatcher's answer."""

from __future__ import annotations

import abc
import dataclasses

import torch

from engine.attention.operator import AttendContext


@dataclasses.dataclass(frozen=True, slots=True)
class TokenRange:
    """Token counts, both ends included, that one prepared shape serves."""

    low: int
    high: int

    def __contains__(self, num_tokens: int) -> bool:
        return self.low <= num_tokens <= self.high

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}–{self.high}"

    def words(self) -> str:
        """For progress: ``"2–64 tokens"``."""
        return f"{self} token{'s' * (self.high > 1)}"


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """The tensors of one forward pass. Set by the runner.

    Attributes:
        token_ids, positions: int64 [T], the ragged batch laid end to end.
        context: how its attention reaches the cache.
        pure_decode: every sequence computes exactly one token.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    context: AttendContext
    pure_decode: bool

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.token_ids.shape[0]


class Execution(abc.ABC):
    """One way to run the decoder over a step."""

    mode: str

    @abc.abstractmethod
    def forward(self, step: Step) -> torch.Tensor:
        """Hidden states [T, hidden_size] of the step's tokens, final norm applied; the cache is written."""


class PreparedShape(Execution):
    """An :class:`Execution` made for certain numbers of tokens.

    Attributes:
        tokens: those numbers.
        decode_only: it serves pure decode batches only.
    """

    tokens: TokenRange
    decode_only: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """What the dispatcher says about one step.

    Attributes:
        mode: ``"eager"``, ``"native"``, ``"fused"``, ``"compiled"`` or ``"graphs"``.
        shape: the prepared shape to run, None for eager.
        reason: why this one.
    """

    mode: str
    shape: PreparedShape | None
    reason: str
