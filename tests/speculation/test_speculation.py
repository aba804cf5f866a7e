"""Drafting and verification without a model."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.batching.request import Request
from engine.config import EngineConfig
from engine.outputs import RequestTimes
from engine.sampling.params import SamplingParams
from engine.speculation.proposers.ngram import NgramProposer
from engine.speculation.proposers.table import make_proposer, needs_new_proposer
from engine.speculation.verification import accept_drafts


def request_with(tokens: list[int], name: str = "r") -> Request:
    return Request(name, tokens, len(tokens), SamplingParams(max_tokens=100), 0, RequestTimes(0.0), 0)


def propose(tokens: list[int], count: int = 4, shortest: int = 2, longest: int = 4) -> list[int]:
    return NgramProposer(shortest, longest).propose(request_with(tokens), count)


def test_proposes_what_followed_the_longest_earlier_match():
    # "2 3" was followed by 9 and, more lately, by 8; but "1 2 3" only by 9: the longer match wins
    assert propose([1, 2, 3, 9, 5, 2, 3, 8, 1, 2, 3], count=2) == [9, 5]


def test_of_equally_long_matches_the_latest_counts():
    assert propose([2, 3, 7, 2, 3, 8, 0, 2, 3], count=1) == [8]


def test_no_match_of_the_shortest_length_proposes_nothing():
    assert propose([1, 2, 3, 4, 5, 1]) == []
    assert propose([1, 2, 3, 4, 5, 1], shortest=1) == [2, 3, 4, 5]


def test_match_at_the_very_end_continues_the_period():
    assert propose([5, 6, 5, 6, 5, 6], count=5) == [5, 6, 5, 6, 5]


def test_text_of_one_token_proposes_nothing():
    assert propose([1]) == []


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 3), st.integers(0, 3))
def test_index_grown_token_by_token_agrees_with_a_search_from_scratch(tokens: list[int], shortest: int, more: int):
    proposer = NgramProposer(shortest, shortest + more)
    request = request_with(tokens[:1])
    for token in [None, *tokens[1:]]:
        if token is not None:
            request.token_ids.append(token)
        assert proposer.propose(request, 3) == search_from_scratch(request.token_ids, shortest, shortest + more, 3)


def search_from_scratch(tokens: list[int], shortest: int, longest: int, count: int) -> list[int]:
    for length in range(min(longest, len(tokens) - 1), shortest - 1, -1):
        for end in range(len(tokens) - 1, length - 1, -1):
            if tokens[end - length : end] == tokens[-length:]:
                text = list(tokens)
                for position in range(end, end + count):
                    text.append(text[position])
                return text[len(tokens) :]
    return []


def test_requests_do_not_share_an_index_and_are_forgotten():
    proposer = NgramProposer(1, 2)
    assert proposer.propose(request_with([1, 2, 1], "a"), 1) == [2]
    assert proposer.propose(request_with([3, 4], "b"), 1) == []
    proposer.forget("a")
    assert proposer.propose(request_with([1, 9], "a"), 1) == []


@given(st.lists(st.integers(0, 2), max_size=6), st.data())
def test_accepted_tokens_are_what_sampling_one_by_one_would_have_given(drafts: list[int], data: st.DataObject):
    sampled = data.draw(st.lists(st.integers(0, 2), min_size=len(drafts) + 1, max_size=len(drafts) + 1))
    tokens = accept_drafts(sampled, drafts)
    # position i of `sampled` is only valid if all drafts before it were right
    expected = [sampled[0]]
    for draft, following in itertools.zip_longest(drafts, sampled[1:]):
        if expected[-1] != draft:
            break
        expected.append(following)
    assert tokens == expected


def test_draft_and_sample_counts_must_agree():
    with pytest.raises(ValueError, match="need"):
        accept_drafts([1, 2], [1, 2])


def test_acceptance_of_a_point_mass_draft_keeps_the_target_distribution():
    """Frequency of the emitted token equals the target's, whatever was drafted (Leviathan et al. 2023)."""
    generator = random.Random(0)
    target = [0.5, 0.3, 0.2, 0.0]
    for draft in range(4):
        counts = [0] * 4
        for _ in range(20000):
            sampled = generator.choices(range(4), target, k=2)
            counts[accept_drafts(sampled, [draft])[0]] += 1
        assert counts[3] == 0
        assert all(abs(count / 20000 - p) < 0.02 for count, p in zip(counts, target, strict=True))


def test_a_new_proposer_is_made_only_for_the_knobs_that_it_reads():
    ngram, off = EngineConfig(speculation="ngram", ngram_min=1, ngram_max=3), EngineConfig(speculation="off")
    proposer = make_proposer(ngram)
    assert isinstance(proposer, NgramProposer)
    assert (proposer.shortest, proposer.longest) == (1, 3)
    assert make_proposer(off) is None
    assert [needs_new_proposer(ngram, {name}) for name in ("speculation", "ngram_max", "draft_length")] == [
        True,
        True,
        False,
    ]
    assert [needs_new_proposer(off, {name}) for name in ("speculation", "ngram_max")] == [True, False]
