"""Lossless verification of drafts.

The target model computes a distribution p_i at every draft position in one pass:

    known text | d_0   d_1   d_2          drafts
           s_0   s_1   s_2   s_3          tokens sampled from p_0 … p_3, each given the drafts before it

A proposer without a distribution of its own (n-gram lookup) puts all its mass on d_i. The rejection sampler of
Leviathan et al. 2023 (algorithm 1) then accepts d_i with probability p_i(d_i) and otherwise draws from p_i without
d_i. Drawing s_i from p_i and accepting if s_i = d_i is the same thing: P(s_i = d_i) = p_i(d_i), and given that they
differ, s_i is distributed as p_i without d_i. A token of probability 0 is never drawn, so it is never accepted.

Because every draw is keyed by the request's seed and the position, the output with speculation is not only equal in
distribution but token by token equal to the output without it, greedy or sampled.
"""

from __future__ import annotations

from collections.abc import Sequence


def accept_drafts(sampled: Sequence[int], drafts: Sequence[int]) -> list[int]:
    """The tokens one verification yields: accepted drafts, then the correction or the bonus token.

    Args:
        sampled: s_0 … s_k, one more than there are drafts.
        drafts: d_0 … d_{k-1}.

    Returns:
        Between 1 and k + 1 tokens; ``len(result) - 1`` drafts were accepted.

    >>> accept_drafts([5, 6, 9, 1], [5, 6, 7])
    [5, 6, 9]
    >>> accept_drafts([5, 6, 7, 8], [5, 6, 7])
    [5, 6, 7, 8]
    """
    if len(sampled) != len(drafts) + 1:
        raise ValueError(f"{len(drafts)} drafts need {len(drafts) + 1} sampled tokens, got {len(sampled)}")
    accepted = 0
    while accepted < len(drafts) and sampled[accepted] == drafts[accepted]:
        accepted += 1
    return list(sampled[: accepted + 1])
