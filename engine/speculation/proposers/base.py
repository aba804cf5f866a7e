"""What a proposer is. It guesses; :mod:`engine.speculation.verification` decides, so no guess can change a token."""

from __future__ import annotations

import abc
from typing import ClassVar, Self

from engine.batching.request import Request
from engine.config import EngineConfig


class Proposer(abc.ABC):
    """Guesses how a request goes on. May keep state per request, dropped by :meth:`forget`.

    Attributes:
        knobs: names of the knobs that :meth:`from_config` reads: when one changes, a new proposer is made.
    """

    knobs: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def from_config(cls, config: EngineConfig) -> Self:
        """The proposer as the knobs ask for it; a proposer without parameters needs no form of its own."""
        return cls()

    @abc.abstractmethod
    def propose(self, request: Request, count: int) -> list[int]:
        """Up to ``count`` tokens that might follow ``request.token_ids``; none if there is no good guess."""

    @abc.abstractmethod
    def forget(self, request_id: str) -> None:
        """The request is done."""
