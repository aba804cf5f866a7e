"""What the modes of execution share: a step's tensors, what runs over them, and the decision which one does."""

from __future__ import annotations

import abc
import dataclasses

import torch

from engine.attention.base import AttentionBackend, AttentionBatch


@dataclasses.dataclass(frozen=True, slots=True)
class TokenRange:
    """Token counts, both ends included, that one prepared shape serves."""

    low: int
    high: int

    def __contains__(self, num_tokens: int) -> bool:
        return self.low <= num_tokens <= self.high

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}–{self.high}"

    def label(self) -> str:
        """For progress: ``"2–64 tokens"``."""
        return f"{self} token{'s' * (self.high > 1)}"


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """The data of one forward pass. Set by the runner.

    Attributes:
        token_ids, positions: int64 [T], the ragged batch laid end to end.
        batch: its layout for attention.
        backend: what attends.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    batch: AttentionBatch
    backend: AttentionBackend

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.token_ids.shape[0]

    @property
    def pure_decode(self) -> bool:
        """Every sequence computes exactly one token."""
        return self.num_tokens == len(self.batch.query_lens)


class Execution(abc.ABC):
    """One way to run the decoder over a step.

    Attributes:
        name: of the mode, for status and record.
    """

    name: str

    @abc.abstractmethod
    def forward(self, step: Step) -> torch.Tensor:
        """Hidden states [T, hidden_size] of the step's tokens, final norm applied; the cache is written."""


class PreparedShape(Execution):
    """An :class:`Execution` made for certain numbers of tokens.

    Attributes:
        tokens: those numbers.
    """

    tokens: TokenRange


@dataclasses.dataclass(frozen=True, slots=True)
class Decision:
    """What runs a step.

    Attributes:
        execution: what runs it.
        reason: why this one.
    """

    execution: Execution
    reason: str

    @property
    def mode(self) -> str:
        """``"eager"``, ``"native"``, ``"fused"``, ``"compiled"``, ``"graphs"`` or a registered one."""
        return self.execution.name


@dataclasses.dataclass(frozen=True, slots=True)
class Progress:
    """How far a preparation is.

    Attributes:
        done, total: pieces of work, the failed ones among them.
        current: the piece at work or next, e.g. ``"2–64 tokens"``; may be empty.
    """

    done: int
    total: int
    current: str
