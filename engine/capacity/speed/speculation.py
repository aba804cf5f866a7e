"""What speculative decoding is worth: the published formula, the right one, and the one for a real machine.

Leviathan, Kalman, Matias 2023, arXiv:2211.17192. α: probability that a drafted token is accepted; k: drafted tokens a
round; c: time of drafting one token over the time of one target pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

MAX_DRAFT_LENGTH = 16


def expected_tokens(acceptance: float, draft_length: int) -> float:
    """Tokens a round yields on average, the bonus token included: (1 - α^(k+1)) / (1 - α).

    >>> round(expected_tokens(0.8, 4), 2), expected_tokens(1.0, 4), expected_tokens(0.0, 4)
    (3.36, 5.0, 1.0)
    """
    if acceptance >= 1.0:
        return draft_length + 1.0
    return float((1.0 - acceptance ** (draft_length + 1)) / (1.0 - acceptance))


def ideal_speedup(acceptance: float, draft_length: int, draft_cost: float) -> float:
    """Over plain decoding, if verifying k + 1 tokens takes as long as one: E / (k · c + 1) (theorem 3.8).

    >>> round(ideal_speedup(0.8, 4, 0.1), 2), round(ideal_speedup(0.2, 4, 0.1), 2)
    (2.4, 0.89)
    """
    return expected_tokens(acceptance, draft_length) / (draft_length * draft_cost + 1.0)


def published_speedup(acceptance: float, draft_length: int, draft_cost: float) -> float:
    """The commonly published T_t / (T_d · α · k + T_t · (1 - α · k)), which is wrong: α · k is a count, not a share;
    rejected drafts are paid for too; and a round costs one whole target pass and yields a bonus token.

    >>> round(published_speedup(0.8, 4, 0.1), 2), round(published_speedup(0.2, 4, 0.1), 2)
    (-0.53, 3.57)
    """
    accepted = acceptance * draft_length
    below = draft_cost * accepted + (1.0 - accepted)
    return float("inf") if below == 0 else 1.0 / below


def real_speedup(
    tokens: float, draft_length: int, draft_cost: float, verify_cost: float, overhead: float = 0.0
) -> float:
    """On a real machine: τ / (k · c + v + o), v = time of verifying over time of a plain step at the same batch.

    >>> round(real_speedup(expected_tokens(0.8, 4), 4, 0.1, 1.0), 2)  # v = 1, no overhead: the ideal
    2.4
    """
    return tokens / (draft_length * draft_cost + verify_cost + overhead)


@dataclasses.dataclass(frozen=True, slots=True)
class DraftChoice:
    """A draft length and what it is worth; length 0 is no speculation."""

    draft_length: int
    tokens: float
    speedup: float


def best_draft_length(
    acceptance: float, draft_cost: float, verify_cost: Callable[[int], float], longest: int = MAX_DRAFT_LENGTH
) -> DraftChoice:
    """The draft length of the largest speed-up.

    Args:
        verify_cost: of a draft length k, time of a step with k + 1 tokens a sequence over one with 1.

    >>> best_draft_length(0.8, 0.1, lambda k: 1.0).draft_length, best_draft_length(0.2, 0.3, lambda k: 1.0).draft_length
    (6, 0)
    """
    best = DraftChoice(0, 1.0, 1.0)
    for length in range(1, longest + 1):
        tokens = expected_tokens(acceptance, length)
        speedup = real_speedup(tokens, length, draft_cost, verify_cost(length))
        if speedup > best.speedup:
            best = DraftChoice(length, tokens, speedup)
    return best
