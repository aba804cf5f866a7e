"""The batch sampler: each parameter does what it says, and a row's draw does not depend on its neighbours."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import RequestError
from engine.sampling.params import LIMITS, NO_TOKEN, SamplingParams, SamplingRow
from engine.sampling.torch_sampler import sample

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
        ("logprobs", True),
        ("stop", ("",)),
        ("stop", "abc"),
        ("stop", (3,)),
        ("stop", ("a",) * 1000),
        pytest.param("stop", ("a" * 1_000_000,), id="long stop"),
        ("stop_token_ids", (True,)),
        ("stop_token_ids", tuple(range(100_000))),
        ("top_k", 9223372036854775808),
        pytest.param("top_k", 10**5000, id="top_k of 5,000 digits"),
        ("top_k", 3.0),
        ("top_k", True),
        ("max_tokens", 2**63),
        ("max_tokens", None),
        ("min_tokens", -1),
        ("seed", 2**64),
        ("seed", -(2**63) - 1),
        ("seed", 0.5),
        ("temperature", math.inf),
        ("temperature", 10**400),
        ("temperature", "hot"),
        ("top_p", -0.0),
        ("top_p", math.nan),
        ("min_p", -math.inf),
        ("repetition_penalty", 5e-324),
        ("repetition_penalty", math.inf),
        ("ignore_eos", 1),
    ],
)
def test_parameter_out_of_range_is_refused_by_name(field: str, value: object):
    with pytest.raises(RequestError) as problem:
        SamplingParams(**{field: value})  # type: ignore[arg-type]
    assert problem.value.field == field
    assert problem.value.remedy
    assert len(str(problem.value)) < 300


def test_every_number_of_a_request_has_bounds():
    numbers = {field.name for field in dataclasses.fields(SamplingParams)} - {"stop", "stop_token_ids", "ignore_eos"}
    assert numbers | {"priority"} == LIMITS.keys()
    for bounds in LIMITS.values():
        assert math.isfinite(bounds.minimum)
        assert math.isfinite(bounds.maximum)


def test_numbers_are_taken_over_as_plain_ones():
    params = SamplingParams(temperature=-0.0, top_k=np.int64(5), top_p=1, seed=np.int64(7), stop=["a"])  # type: ignore[arg-type]
    assert (params.temperature, params.top_k, params.top_p, params.seed, params.stop) == (0.0, 5, 1.0, 7, ("a",))
    assert math.copysign(1.0, params.temperature) == 1.0
    assert {type(params.top_k), type(params.seed)} == {int}
    assert type(params.top_p) is float


@settings(max_examples=60, deadline=None)
@given(
    params=st.fixed_dictionaries(
        {
            "temperature": st.floats(0.0, 100.0),
            "top_k": st.integers(-1, 2**63 - 1) | st.integers(-1, 20),
            "top_p": st.floats(0.0, 1.0, exclude_min=True),
            "min_p": st.floats(0.0, 1.0),
            "repetition_penalty": st.floats(1e-6, 100.0),
            "seed": st.integers(-(2**63), 2**64 - 1),
        }
    ),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
)
def test_any_parameters_within_the_bounds_choose_a_likely_token(params: dict[str, float], scale: float):
    """Not one that is all but impossible: where divisions overflow a sampler is prone to the vocabulary's last."""
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(1)) * scale
    logits[0, -3:] = -torch.inf
    chosen = sample(logits, [row(history=(1, 2), **{**params, "seed": 1})])[0][0]
    assert 0 <= chosen < 37
    if params["temperature"] < 1e-5 and params["repetition_penalty"] == 1.0:
        assert chosen == int(logits.argmax())


@pytest.mark.parametrize("temperature", [1e-38, 5e-324, 1e-300, 9e-6])
def test_temperature_that_a_logit_cannot_be_divided_by_is_greedy(temperature: float):
    logits = torch.tensor([[1.0, 30.0, -2.0, 5.0]])
    assert SamplingParams(temperature=temperature).greedy
    assert [sample(logits, [row(position=i, temperature=temperature, top_p=0.9)])[0] for i in range(20)] == [[1]] * 20


FILTERS = [{"top_p": 0.97}, {"top_k": 30}, {"top_k": 300}, {"top_k": 30, "top_p": 0.97, "min_p": 0.001}]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(filters=st.sampled_from(FILTERS), seed=st.integers(0, 10_000), vocab=st.sampled_from([50, 700]))
def test_neighbours_in_rank_that_change_places_are_drawn_all_the_same(filters, seed: int, vocab: int):
    logits = torch.randn(12, vocab, generator=torch.Generator().manual_seed(seed)) * 3
    order = logits.argsort(dim=-1, descending=True)
    pairs = [(order[:, first, None], order[:, first + 1, None]) for first in range(0, 6, 2)]
    for one, other in pairs:
        logits.scatter_(-1, other, logits.gather(-1, one) - 1e-6)
    swapped = logits.clone()
    for one, other in pairs:
        swapped.scatter_(-1, one, logits.gather(-1, other))
        swapped.scatter_(-1, other, logits.gather(-1, one))
    rows = [row(position=i, seed=seed, temperature=3.0, **filters) for i in range(12)]
    assert sample(logits, rows)[0] == sample(swapped, rows)[0]


@pytest.mark.parametrize("filters", [{"top_k": 3}, {"top_k": 300}, {"top_p": 0.6}], ids=str)
def test_of_equals_at_the_cut_the_lowest_ids_are_kept(filters):
    logits = torch.full((400,), -8.0)
    logits[40] = 1.0
    logits[[7, 9, 21, 33]] = 0.5
    kept = (draws(logits, count=300, **filters) > 0).nonzero()[:, 0].tolist()
    if filters == {"top_k": 300}:
        assert max(kept) < 301
    else:
        assert kept == [7, 9, 40]


def test_a_row_may_keep_more_equals_than_its_neighbour_and_both_the_lowest_ids():
    logits = torch.zeros(60, 30)
    logits[:, 29] = 1.0
    rows = [row(position=i, top_k=2 + i % 2 * 3) for i in range(60)]
    chosen = sample(logits, rows)[0]
    assert set(chosen[::2]) == {0, 29}
    assert set(chosen[1::2]) == {0, 1, 2, 3, 29}


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, {"top_k": 5}, {"top_p": 0.9}], ids=str)
@pytest.mark.parametrize("unfit", [math.nan, math.inf, -math.inf])
def test_a_row_that_leaves_no_token_to_choose_gives_none_and_its_neighbours_theirs(params, unfit: float):
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    rows = [row(position=i, logprobs=2, **params) for i in range(3)]
    expected = sample(logits, rows)[0]
    logits[1, 7 if unfit != -math.inf else slice(None)] = unfit
    assert sample(logits, rows)[0] == [expected[0], NO_TOKEN, expected[2]]


def test_the_log_probability_of_what_is_impossible_is_a_number_that_json_has():
    entry = sample(torch.tensor([[0.0, -math.inf, -math.inf]]), [row(temperature=0.0, logprobs=3)])[1][0]
    assert entry is not None
    assert list(entry.top.values()) == [0.0, -9999.0, -9999.0]
