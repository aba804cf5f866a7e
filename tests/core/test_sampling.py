"""The batch sampler: each parameter does what it says, and a row's draw does not depend on its neighbours."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import RequestError
from engine.sampling import SamplingParams, SamplingRow, sample

VOCAB = 12


def row(position: int = 0, seed: int = 1, history: tuple[int, ...] = (), forbidden: tuple[int, ...] = (), **params):
    return SamplingRow(SamplingParams(**{"temperature": 1.0, **params}), seed, position, history, forbidden)


def draws(logits: torch.Tensor, count: int = 4000, **params) -> torch.Tensor:
    """Relative frequency of each token over many positions."""
    tokens, _ = sample(logits.expand(count, -1), [row(position=i, **params) for i in range(count)])
    return torch.bincount(torch.tensor(tokens), minlength=logits.shape[-1]) / count


def test_temperature_zero_takes_the_most_likely_token():
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    assert sample(logits, [row(temperature=0.0)])[0] == [1]


def test_draws_follow_the_tempered_distribution():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    for temperature in (0.5, 1.0, 2.0):
        expected = (logits / temperature).softmax(-1)
        assert torch.allclose(draws(logits, temperature=temperature), expected, atol=0.03)


def test_top_k_keeps_the_k_most_likely():
    logits = torch.arange(VOCAB).float() * 0.1
    frequencies = draws(logits, top_k=3)
    assert frequencies[: VOCAB - 3].sum() == 0
    assert (frequencies[VOCAB - 3 :] > 0).all()


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert (draws(logits, top_p=0.75) > 0).tolist() == [True, True, False, False]
    assert (draws(logits, top_p=0.5) > 0).tolist() == [True, False, False, False]


def test_min_p_drops_what_is_far_less_likely_than_the_best():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert (draws(logits, min_p=0.4) > 0).tolist() == [True, True, False, False]


def test_repetition_penalty_lowers_tokens_of_the_history_whatever_their_sign():
    logits = torch.tensor([[2.0, 1.5, -1.0, -1.2]])
    assert sample(logits, [row(temperature=0.0, repetition_penalty=2.0, history=(0,))])[0] == [1]
    only_negative = torch.tensor([[-1.0, -1.2]])
    assert sample(only_negative, [row(temperature=0.0, repetition_penalty=2.0, history=(0,))])[0] == [1]


def test_forbidden_tokens_are_never_chosen():
    logits = torch.tensor([[9.0, 1.0]])
    assert sample(logits, [row(temperature=0.0, forbidden=(0,))])[0] == [1]
    assert draws(logits[0], forbidden=(0,))[0] == 0


def test_token_of_probability_zero_is_never_drawn():
    logits = torch.tensor([-math.inf, 0.0, -math.inf])
    assert draws(logits)[1] == 1.0


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_draw_depends_on_seed_and_position_but_not_on_the_rest_of_the_batch(data: st.DataObject):
    params = st.fixed_dictionaries(
        {
            "temperature": st.sampled_from([0.0, 0.7, 1.0, 1.5]),
            "top_k": st.sampled_from([0, 3, 300]),
            "top_p": st.sampled_from([1.0, 0.8]),
            "min_p": st.sampled_from([0.0, 0.1]),
        }
    )
    rows = [row(position=i, seed=data.draw(st.integers(0, 99)), **data.draw(params)) for i in range(5)]
    logits = torch.randn(5, 400, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    together, _ = sample(logits, rows)
    alone = [sample(logits[i : i + 1], [rows[i]])[0][0] for i in range(5)]
    assert together == alone


def test_logprobs_are_of_the_raw_distribution_and_best_first():
    logits = torch.tensor([[1.0, 3.0, 2.0], [0.0, 0.0, 0.0]])
    tokens, logprobs = sample(logits, [row(temperature=0.0, logprobs=2), row(temperature=0.0)])
    entry = logprobs[0]
    assert entry is not None
    assert logprobs[1] is None
    assert entry.token_id == tokens[0] == 1
    assert list(entry.top) == [1, 2]
    assert entry.logprob == pytest.approx(float(logits[0].log_softmax(-1)[1]))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", -2),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
        ("logprobs", 99),
        ("stop", ("",)),
    ],
)
def test_parameter_out_of_range_is_refused_by_name(field: str, value: object):
    with pytest.raises(RequestError) as problem:
        SamplingParams(**{field: value})  # type: ignore[arg-type]
    assert problem.value.field == field
    assert problem.value.remedy
