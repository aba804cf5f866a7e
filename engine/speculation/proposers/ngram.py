"""Prompt lookup: the text itself is the draft model."""

from __future__ import annotations

from typing import ClassVar

from engine.batching.request import Request
from engine.config import EngineConfig
from engine.speculation.proposers.base import Proposer


class NgramProposer(Proposer):
    """Prompt lookup: what followed the last few tokens when they occurred before in the same text.

    The longest suffix of at most ``longest`` and at least ``shortest`` tokens that occurred earlier decides, its latest
    occurrence first. (Saxena 2023, prompt lookup decoding; Yang et al. 2023, LLMA.)

    Cost: for each length a table of "where did this n-gram last end" grows with the text. A new token adds one entry a
    length and a proposal looks up at most one a length, so a step takes O(longest) table operations on keys of at most
    ``longest`` tokens, whatever the length of the text, and a whole request is linear in its tokens. A suffix automaton
    would find matches of any length in amortized constant time, for a dictionary of transitions for each token of the
    text; the knob's bound of 16 tokens makes that unnecessary.
    """

    knobs: ClassVar[tuple[str, ...]] = ("ngram_min", "ngram_max")

    def __init__(self, shortest: int, longest: int) -> None:
        self.shortest = shortest
        self.longest = longest
        self._indices: dict[str, _NgramIndex] = {}

    @classmethod
    def from_config(cls, config: EngineConfig) -> NgramProposer:
        """See :class:`Proposer`."""
        return cls(config.ngram_min, config.ngram_max)

    def propose(self, request: Request, count: int) -> list[int]:
        """See :class:`Proposer`. Where the match runs into the end of the text, the guess repeats the period."""
        index = self._indices.setdefault(request.request_id, _NgramIndex(self.shortest, self.longest))
        tokens = request.token_ids
        index.extend(tokens)
        follow = index.find(tokens)
        if follow is None:
            return []
        draft: list[int] = []
        for position in range(follow, follow + count):
            draft.append(tokens[position] if position < len(tokens) else draft[position - len(tokens)])
        return draft

    def forget(self, request_id: str) -> None:
        """See :class:`Proposer`."""
        self._indices.pop(request_id, None)


class _NgramIndex:
    """For every n-gram of a growing text, the position after its latest occurrence before the text's end."""

    def __init__(self, shortest: int, longest: int) -> None:
        self._lengths = range(longest, shortest - 1, -1)
        self._follow: dict[tuple[int, ...], int] = {}
        self._indexed = 0  # n-grams ending before this position are in the table

    def extend(self, tokens: list[int]) -> None:
        """Index every n-gram that ends before the last token."""
        for end in range(self._indexed + 1, len(tokens)):
            for length in self._lengths:
                if length <= end:
                    self._follow[tuple(tokens[end - length : end])] = end
        self._indexed = max(self._indexed, len(tokens) - 1)

    def find(self, tokens: list[int]) -> int | None:
        """Where the text went on after the latest earlier occurrence of its longest known suffix."""
        for length in self._lengths:
            if length < len(tokens):
                follow = self._follow.get(tuple(tokens[-length:]))
                if follow is not None:
                    return follow
        return None
