"""The protocol of an execution mode, and the mode that needs nothing but its kernels.

One file a mode, one row in :mod:`engine.execution.modes`. The executor makes a mode for the weights and the attention
backend of the moment, and another one when either changes: nothing that a mode holds outlives them.

    unsupported_reason ──> prepare ──> poll, poll, … ──> close
                                └──── decide, forward ────┘
"""

from __future__ import annotations

import abc
from collections.abc import Sequence

from engine.attention.base import AttentionBackend
from engine.execution.base import Decision, Execution, Progress, Step, TokenRange
from engine.execution.environment import ExecutionEnvironment, Kernels, Unsupported


class ExecutionMode(Execution):
    """A value of the knob ``execution``. All but :meth:`unsupported_reason` runs in the stepping thread.

    Attributes:
        name: the value.
        uses_attention: what it prepares depends on the attention backend.

    Args:
        environment: what it works on.
    """

    uses_attention: bool = False

    def __init__(self, environment: ExecutionEnvironment) -> None:
        self.environment = environment

    @classmethod
    @abc.abstractmethod
    def unsupported_reason(cls, environment: ExecutionEnvironment, kernels: Kernels) -> Unsupported | None:
        """Why it cannot run there, and what to do instead; None if it can. Only looks; any thread."""

    @abc.abstractmethod
    def prepare(self, attention: AttentionBackend) -> None:
        """Begin to get ready for the present weights and this backend. Returns at once."""

    def poll(self) -> None:
        """Between two steps: take over what has become ready, or do the next piece of work."""

    @property
    def has_work(self) -> bool:
        """True while :meth:`poll` does something itself, one piece a call."""
        return False

    @property
    def preparing(self) -> bool:
        """True while something is still to come."""
        return self.has_work

    def progress(self) -> Progress:
        """How far the preparation is."""
        return Progress(0, 0, "")

    @abc.abstractmethod
    def decide(self, step: Step) -> Decision:
        """What runs a step now, and why: this mode, one of its shapes, or another mode where it has nothing ready."""

    def prepared(self) -> Sequence[TokenRange]:
        """Token counts that are ready, ascending."""
        return ()

    def failed(self) -> Sequence[tuple[TokenRange, str]]:
        """Token counts that could not be prepared, and why."""
        return ()

    def path(self) -> str:
        """What runs, for the record."""
        return self.name

    def close(self) -> None:
        """Cancel what is being prepared and drop what is."""
