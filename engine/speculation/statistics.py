"""How good the drafts are."""

from __future__ import annotations

from itertools import accumulate
from typing import Any


class DraftStatistics:
    """Counts of verified drafts by length and by how many of their tokens were accepted.

    Args:
        longest: the most tokens a draft can have.
    """

    def __init__(self, longest: int) -> None:
        self._of_length = [0] * (longest + 1)
        self._with_accepted = [0] * (longest + 1)

    def observe(self, proposed: int, accepted: int) -> None:
        """Take over one verified draft of at least one token."""
        self._of_length[proposed] += 1
        self._with_accepted[accepted] += 1

    @property
    def drafts(self) -> int:
        """How many drafts were verified."""
        return sum(self._of_length)

    def to_dict(self) -> dict[str, Any]:
        """JSON form.

        Returns:
            ``drafts``; ``draft_tokens`` and ``accepted_tokens``; ``mean_accepted_length``: tokens a verification
            yields, the bonus or correction counted (None before the first); ``proposed_per_position`` and
            ``accepted_per_position``: how often a draft had a token at position 0, 1, … and how often it was right,
            up to the longest draft so far.
        """
        longest = max((length for length, count in enumerate(self._of_length) if count), default=0)
        proposed = _at_least(self._of_length)[1 : longest + 1]
        accepted = _at_least(self._with_accepted)[1 : longest + 1]
        return {
            "drafts": self.drafts,
            "draft_tokens": sum(proposed),
            "accepted_tokens": sum(accepted),
            "mean_accepted_length": 1 + sum(accepted) / self.drafts if self.drafts else None,
            "proposed_per_position": proposed,
            "accepted_per_position": accepted,
        }


def _at_least(counts: list[int]) -> list[int]:
    """Entry i of the result: how many had a value of i or more."""
    return list(accumulate(reversed(counts)))[::-1]
