"""Verification of drafts on the device, interpreted: ragged drafts, both rules, and the distribution that is kept."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.verification import (
    verify_reference,
    verify_stochastic_reference,
    verify_stochastic_triton,
    verify_triton,
)

pytestmark = pytest.mark.waiting


def starts_of(counts):
    return torch.tensor([0, *counts]).cumsum(0).to(torch.int32)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(counts=st.lists(st.integers(0, 5), min_size=1, max_size=5), vocab=st.integers(1, 3), seed=st.integers(0, 999))
def test_drafts_are_accepted_as_long_as_they_are_what_was_sampled(counts, vocab, seed):
    generator = torch.Generator().manual_seed(seed)
    total = sum(counts)
    sampled = torch.randint(0, vocab, (total + len(counts),), generator=generator)
    drafts = torch.randint(0, vocab, (total,), generator=generator)
    found = verify_triton(sampled, drafts, starts_of(counts), 5)
    for ours, theirs in zip(found, verify_reference(sampled, drafts, starts_of(counts), 5), strict=True):
        assert torch.equal(ours, theirs)


def test_nothing_is_accepted_behind_a_refusal_and_all_of_a_right_draft():
    sampled = torch.tensor([5, 9, 7, 8, 1, 2, 3, 4])  # 3 drafts and 3 drafts
    accepted, tokens = verify_triton(sampled, torch.tensor([5, 6, 7, 1, 2, 3]), starts_of([3, 3]), 4)
    assert accepted.tolist() == [1, 3]
    assert tokens.tolist() == [[5, 9, -1, -1, -1], [1, 2, 3, 4, -1]]


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    counts=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    vocab=st.sampled_from([3, 1025]),
    with_draft=st.booleans(),
    seed=st.integers(0, 999),
)
def test_rejection_sampling_agrees_with_the_reference(counts, vocab, with_draft, seed):
    generator = torch.Generator().manual_seed(seed)
    total = sum(counts)
    target = (torch.randn(total + len(counts), vocab, generator=generator) * 2).softmax(-1)
    draft = (torch.randn(total, vocab, generator=generator) * 2).softmax(-1) if with_draft else None
    drafts = torch.randint(0, vocab, (total,), generator=generator)
    seeds = torch.randint(-(2**62), 2**62, (len(counts),), generator=generator)
    asked = (target, draft, drafts, starts_of(counts), seeds, torch.arange(len(counts)) * 10, 4)
    for ours, theirs in zip(verify_stochastic_triton(*asked), verify_stochastic_reference(*asked), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("with_draft", [True, False])
def test_the_first_token_has_the_distribution_of_the_target_whatever_was_drafted(with_draft):
    count = 120
    target = torch.tensor([0.5, 0.3, 0.15, 0.05]).repeat(2 * count, 1)
    q = torch.tensor([0.1, 0.2, 0.3, 0.4])
    generator = torch.Generator().manual_seed(1)
    drafts = torch.multinomial(q, count, replacement=True, generator=generator)
    draft = q.repeat(count, 1) if with_draft else None
    seeds = torch.arange(count) * 7 + 1
    _, tokens = verify_stochastic_triton(
        target, draft, drafts, starts_of([1] * count), seeds, torch.zeros(count, dtype=torch.int64), 1
    )
    expected = target[0].double() * count
    squares = (torch.bincount(tokens[:, 0], minlength=4).double() - expected) ** 2 / expected
    assert squares.sum() < 16.3  # chi-square, 3 degrees of freedom, p = 0.001


def test_rows_that_do_not_fit_the_drafts_are_refused():
    with pytest.raises(ValueError, match="draft_token_ids has 2 drafts"):
        verify_triton(torch.zeros(3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), starts_of([1, 1]), 2)
