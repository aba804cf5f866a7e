"""Sampling on the device, interpreted: the host's random numbers, the host's candidates, the host's tokens."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.sampling.params import SamplingParams, SamplingRow
from engine.sampling.torch_sampler import sample
from engine.sampling.triton_sampler import sample_on_device
from kernels.language import tl, triton
from kernels.philox import draw_uniform, uniform
from kernels.sampling import SamplingTensors, sample_reference, sample_triton


@triton.jit
def _uniform_kernel(result_ptr, seeds_ptr, positions_ptr, WORD: tl.constexpr):
    row = tl.program_id(0)
    tl.store(result_ptr + row, draw_uniform(tl.load(seeds_ptr + row), tl.load(positions_ptr + row), WORD))


@pytest.mark.parametrize("word", [0, 1, 2, 3])
def test_the_uniform_numbers_are_those_of_numpy_bit_for_bit(word):
    seeds = [0, 1, 2**63 - 1, 2**63, 2**64 - 1, 1234567890123456789]
    positions = [0, 1, 7, 1000, 2**40, 3]
    result = torch.empty(len(seeds), dtype=torch.float64)
    signed = torch.from_numpy(np.array(seeds, dtype=np.uint64).view(np.int64))
    _uniform_kernel[(len(seeds),)](result, signed, torch.tensor(positions), WORD=word)
    assert result.tolist() == [uniform(seed, place, word) for seed, place in zip(seeds, positions, strict=True)]


def tensors_of(rows, seed=0):
    """Parameters of rows given as (temperature, top_k, top_p, min_p)."""
    columns = zip(*rows, strict=True)
    dtypes = (torch.float32, torch.int32, torch.float32, torch.float32)
    made = [torch.tensor(column, dtype=dtype) for column, dtype in zip(columns, dtypes, strict=True)]
    generator = torch.Generator().manual_seed(seed)
    seeds = torch.randint(-(2**62), 2**62, (len(rows),), generator=generator)
    return SamplingTensors(*made, seeds, torch.arange(len(rows)) * 3)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    vocab=st.sampled_from([1, 7, 1023, 1024, 1025, 1500]),
    rows=st.lists(
        st.tuples(
            st.sampled_from([0.0, 0.7, 1.0, 3.0]),
            st.sampled_from([0, 1, 3, 50, 2000]),
            st.sampled_from([1.0, 0.9, 0.3, 0.01]),
            st.sampled_from([0.0, 0.05, 0.5, 1.0]),
        ),
        min_size=1,
        max_size=4,
    ),
    ties=st.booleans(),
    candidates=st.sampled_from([1, 40, 1024]),
    seed=st.integers(0, 10_000),
)
def test_any_mix_of_filters_chooses_the_token_of_a_sort(vocab, rows, ties, candidates, seed):
    logits = torch.randn(len(rows), vocab, generator=torch.Generator().manual_seed(seed)) * 3
    if ties:
        logits = logits.round()
    asked = tensors_of(rows, seed)
    assert torch.equal(sample_triton(logits, asked, candidates=candidates), sample_reference(logits, asked))


@pytest.mark.parametrize("filters", [(0, 0.9), (30, 1.0), (30, 0.9)], ids=["top-p", "top-k", "both"])
def test_collected_candidates_and_the_whole_row_give_the_same_tokens(filters):
    rows = [(1.0, *filters, min_p) for min_p in (0.0, 0.02) for _ in range(12)]
    logits = (torch.randn(len(rows), 2500, generator=torch.Generator().manual_seed(1)) * 3).bfloat16().float()
    asked = tensors_of(rows)
    expected = sample_reference(logits, asked)
    assert expected.unique().numel() > 6
    assert torch.equal(sample_triton(logits, asked), expected)
    assert torch.equal(sample_triton(logits, asked, candidates=1), expected)


def test_a_row_with_exactly_as_many_candidates_as_there_is_room_for_and_one_with_too_many():
    logits = torch.zeros(2, 40)
    logits[0, 7:11] = 20.0  # four candidates; the other row is flat
    asked = tensors_of([(1.0, 0, 0.9, 0.0), (1.0, 0, 0.9, 0.0)])
    assert torch.equal(sample_triton(logits, asked, candidates=4), sample_reference(logits, asked))
    assert 7 <= int(sample_triton(logits, asked, candidates=4)[0]) < 11


def test_a_row_that_leaves_no_token_to_choose_gives_none_and_its_neighbours_theirs():
    filters = [(0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (1.0, 40, 0.9, 0.0)]
    unfit = [math.nan, math.inf, -math.inf, None]
    rows, spoils = zip(*itertools.product(filters, unfit), strict=True)
    logits = torch.randn(len(rows), 1100, generator=torch.Generator().manual_seed(0)) * 3
    asked = tensors_of(rows)
    expected = sample_reference(logits, asked).tolist()
    for row, spoil in enumerate(spoils):
        if spoil is not None:
            logits[row, 1050 if spoil != -math.inf else slice(None)] = spoil
    found = sample_triton(logits, asked).tolist()
    assert found == sample_reference(logits, asked).tolist()
    assert found == [token if spoil is None else -1 for token, spoil in zip(expected, spoils, strict=True)]


@pytest.mark.parametrize("candidates", [1, 1024], ids=["whole row", "collected"])
def test_neighbours_in_rank_that_change_places_are_drawn_all_the_same(candidates):
    rows = [(1.0, *filters, 0.001) for filters in ((0, 0.97), (30, 1.0), (30, 0.97)) for _ in range(4)]
    logits = torch.randn(12, 1000, generator=torch.Generator().manual_seed(2)) * 3
    order = logits.argsort(dim=-1, descending=True)
    pairs = [(order[:, first, None], order[:, first + 1, None]) for first in range(0, 12, 2)]
    for one, other in pairs:  # far from the cut; apart by a hair
        logits.scatter_(-1, other, logits.gather(-1, one) - 1e-6)
    swapped = logits.clone()
    for one, other in pairs:
        swapped.scatter_(-1, one, logits.gather(-1, other))
        swapped.scatter_(-1, other, logits.gather(-1, one))
    asked = tensors_of(rows, 5)
    before = sample_triton(logits, asked, candidates=candidates)
    assert before.unique().numel() > 6
    assert torch.equal(sample_triton(swapped, asked, candidates=candidates), before)
    assert torch.equal(sample_reference(swapped, asked), before)


@pytest.mark.parametrize("candidates", [1, 64], ids=["whole row", "collected"])
def test_of_equals_at_the_cut_the_lowest_ids_are_kept(candidates):
    logits = torch.full((24, 50), -4.0)
    logits[:, 40], logits[:, [7, 9, 21, 33]] = 1.0, 0.5
    asked = tensors_of([(1.0, 3, 1.0, 0.0)] * 12 + [(1.0, 0, 0.55, 0.0)] * 12, seed=1)
    for tokens in (sample_triton(logits, asked, candidates=candidates), sample_reference(logits, asked)):
        assert set(tokens[:12].tolist()) == set(tokens[12:].tolist()) == {7, 9, 40}


def test_a_row_chooses_the_same_alone_and_in_company():
    rows = [(0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.1), (0.8, 20, 0.9, 0.0), (1.5, 0, 0.5, 0.2)]
    logits, asked = torch.randn(4, 1100) * 2, tensors_of(rows)
    together = sample_triton(logits, asked)
    for index in range(len(rows)):
        one = {f.name: getattr(asked, f.name)[index : index + 1] for f in dataclasses.fields(asked)[:6]}
        assert sample_triton(logits[index : index + 1], SamplingTensors(**one)) == together[index]


def test_draws_follow_the_distribution():
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.1])
    count = 400
    asked = dataclasses.replace(tensors_of([(1.0, 0, 1.0, 0.0)] * count), positions=torch.arange(count))
    tokens = sample_triton(probabilities.log().repeat(count, 1), asked)
    expected = probabilities.double() * count
    squares = (torch.bincount(tokens, minlength=4).double() - expected) ** 2 / expected
    assert squares.sum() < 16.3  # chi-square, 3 degrees of freedom, p = 0.001


def test_repetition_penalty_and_forbidden_tokens_change_the_choice():
    logits = torch.tensor([[3.0, 2.9, -1.0, 1.0], [3.0, 2.9, -1.0, 1.0]])
    asked = tensors_of([(0.0, 0, 1.0, 0.0)] * 2)
    seen = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0]], dtype=torch.uint8)
    forbidden = torch.tensor([[0, 0, 0, 0], [1, 1, 0, 0]], dtype=torch.uint8)
    full = dataclasses.replace(asked, penalty=torch.tensor([2.0, 1.0]), seen=seen, forbidden=forbidden)
    assert sample_triton(logits, full).tolist() == sample_reference(logits, full).tolist() == [1, 3]
    assert sample_triton(logits, asked).tolist() == [0, 0]


def test_sixteen_bit_logits_are_taken():
    rows = [(0.0, 0, 1.0, 0.0), (0.9, 5, 0.9, 0.0)]
    logits = torch.randn(2, 300).half()
    assert torch.equal(sample_triton(logits, tensors_of(rows)), sample_reference(logits, tensors_of(rows)))


def test_parameters_of_another_number_of_rows_are_refused_by_name():
    asked = tensors_of([(1.0, 0, 1.0, 0.0)] * 2)
    with pytest.raises(ValueError, match="top_p must be"):
        sample_triton(torch.randn(2, 5), dataclasses.replace(asked, top_p=torch.ones(3)))
    with pytest.raises(ValueError, match="penalty and seen"):
        sample_triton(torch.randn(2, 5), dataclasses.replace(asked, penalty=torch.ones(2)))


# -- as the engine asks -----------------------------------------------------------------------------------------------


def requests(vocab):
    """Rows with every parameter that a client can set."""
    params = [
        SamplingParams(),
        SamplingParams(temperature=0.8, seed=3),
        SamplingParams(temperature=1.1, top_k=7, seed=4),
        SamplingParams(temperature=1.0, top_p=0.8, min_p=0.05, repetition_penalty=1.3, seed=5, logprobs=3),
        SamplingParams(temperature=0.0, repetition_penalty=2.0, logprobs=0),
    ]
    return [
        SamplingRow(item, item.seed or 0, 2 * index, [1, 2, 2, vocab - 1], (0,) if index % 2 else ())
        for index, item in enumerate(params)
    ]


def test_the_device_samples_what_the_host_samples():
    for seed in range(4):
        logits = torch.randn(5, 700, generator=torch.Generator().manual_seed(seed)) * 2
        tokens, logprobs = sample_on_device(logits, requests(700))
        expected_tokens, expected_logprobs = sample(logits, requests(700))
        assert tokens == expected_tokens
        assert [item is None for item in logprobs] == [item is None for item in expected_logprobs]
        for found, expected in zip(logprobs, expected_logprobs, strict=True):
            if found is not None:
                assert found.token_id == expected.token_id
                assert found.logprob == pytest.approx(expected.logprob, abs=1e-5)
                assert found.top.keys() == expected.top.keys()


@pytest.mark.parametrize("top_k", [60, 2**31, 2**32 + 1], ids=["vocabulary", "beyond 31 bits", "1 behind 32 bits"])
def test_more_tokens_than_there_are_keep_all(top_k):
    rows = [SamplingRow(SamplingParams(temperature=1.5, top_k=top_k), seed, 0, (), ()) for seed in range(3)]
    logits = torch.randn(3, 60, generator=torch.Generator().manual_seed(0))
    assert sample_on_device(logits, rows)[0] == sample(logits, rows)[0]


def test_no_rows_give_no_tokens():
    assert sample_on_device(torch.empty(0, 11), []) == ([], [])
