"""Perplexity, KL divergence and same-top-token, against numbers worked out by hand."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import WorkloadError
from engine.measure import measure_quality
from engine.measure.quality import (
    QualityAccumulator,
    is_lossy,
    kl_divergence,
    perplexity_of,
    reference_changes,
    token_nll,
    windows,
)


def test_perplexity_and_its_standard_error_follow_the_definition():
    nll = torch.tensor([math.log(2), math.log(8)])
    perplexity, error = perplexity_of(nll)
    assert perplexity == pytest.approx(4.0)
    deviation = math.log(4) / math.sqrt(2)  # of {ln 2, ln 8}, sample deviation
    assert error == pytest.approx(4.0 * deviation / math.sqrt(2), rel=1e-6)


def test_nll_of_a_uniform_model_is_the_logarithm_of_the_vocabulary():
    assert token_nll(torch.zeros(3, 50), torch.tensor([0, 7, 49])).tolist() == pytest.approx([math.log(50)] * 3)


def test_kl_divergence_of_two_known_distributions():
    p, q = torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([[0.25, 0.75], [0.9, 0.1]])
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert kl_divergence(p.log(), q.log()).tolist() == pytest.approx([expected, 0.0], abs=1e-6)
    # a token that the reference excludes costs nothing
    assert kl_divergence(torch.tensor([[0.0, -math.inf]]), torch.zeros(1, 2)).item() == pytest.approx(math.log(2))


@settings(deadline=None)  # a shared machine pauses now and then
@given(st.integers(0, 10_000), st.integers(2, 40))
def test_kl_divergence_is_never_negative_and_zero_only_for_itself(seed, vocabulary):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, vocabulary, generator=generator) * 5
    other = logits + torch.randn(4, vocabulary, generator=generator)
    assert kl_divergence(logits, logits).max() == 0
    assert kl_divergence(logits, other).min() >= 0
    # adding a constant to all logits changes no distribution
    assert kl_divergence(logits, logits + 3.0).max() < 1e-4


@settings(deadline=None)  # a shared machine pauses now and then
@given(st.integers(2, 300), st.integers(2, 64), st.data())
def test_every_token_but_the_first_is_scored_exactly_once_with_its_context(num_tokens, window, data):
    stride = data.draw(st.integers(1, window - 1))
    scored = []
    for position, item in enumerate(windows(num_tokens, window, stride)):
        assert 0 <= item.start < item.first_scored <= item.end <= num_tokens
        assert item.end - item.start <= window
        if position:
            assert item.first_scored - item.start >= min(window - stride, item.first_scored)
        scored += range(item.first_scored, item.end)
    assert scored == list(range(1, num_tokens))


@pytest.mark.parametrize(("tokens", "window", "stride", "field"), [(1, 8, 4, "window"), (9, 8, 8, "stride")])
def test_windows_that_score_nothing_or_leave_gaps_are_refused(tokens, window, stride, field):
    with pytest.raises(WorkloadError) as caught:
        list(windows(tokens, window, stride))
    assert caught.value.field == field


def test_same_top_counts_positions_with_the_same_most_likely_token():
    reference = torch.eye(4)
    measured = torch.eye(4)
    measured[3] = torch.tensor([1.0, 0.0, 0.0, 0.5])
    accumulator = QualityAccumulator()
    accumulator.add(measured[:2], reference[:2], torch.tensor([0, 1]))
    accumulator.add(measured[2:], reference[2:], torch.tensor([2, 3]))
    result = accumulator.stats({"weights": "int4"}, {})
    assert result.tokens == 4
    assert result.same_top_percent == 75.0
    assert result.same_top_percent_se == pytest.approx(100 * math.sqrt(0.75 * 0.25 / 4))
    assert result.kl_max > result.kl_p99 > result.kl_median == 0.0


def test_only_settings_that_can_change_tokens_are_lossy():
    assert is_lossy({"weights": "int8"})
    assert not is_lossy({"weights": "model", "batching": "static", "speculation": "ngram", "group_size": "32"})
    assert reference_changes()["weights"] == "model"
    assert "model" not in reference_changes()  # the knob that names the checkpoint


def test_quality_of_two_settings_is_measured_beside_the_unquantized_model(scripted_loop):
    loop = scripted_loop()
    loop.reconfigure({"weights": "int8"})
    done: list[float] = []
    result = measure_quality(
        loop, {"weights": "int8"}, {"weights": "int4"}, max_tokens=100, window=32, stride=16, progress=done.append
    )
    assert result.lossy
    assert result.reference.kl_max == 0.0
    assert result.reference.same_top_percent == 100.0
    assert 0 < result.a.kl_mean < result.b.kl_mean
    assert result.b.same_top_percent < 100.0
    assert (result.a.tokens, result.window, result.stride) == (99, 32, 16)
    assert (result.a.path, result.b.path) == ({"weights": "int8"}, {"weights": "int4"})
    assert done == sorted(done)
    assert done[-1] == 1.0
    assert loop.engine.config.weights == "int8"  # as before


def test_text_done_in_parts_gives_the_same_figures(scripted_loop, monkeypatch):
    whole = measure_quality(scripted_loop(), {}, {"weights": "int4"}, max_tokens=100, window=32, stride=16)
    monkeypatch.setattr("engine.measure.quality.REFERENCE_BYTES", 253 * 4 * 20)
    assert measure_quality(scripted_loop(), {}, {"weights": "int4"}, max_tokens=100, window=32, stride=16) == whole


def test_settings_that_are_lossless_are_not_run_twice(scripted_loop):
    loop = scripted_loop()
    result = measure_quality(loop, {"batching": "static"}, {}, max_tokens=40, window=32, stride=16)
    assert not result.lossy
    assert result.b.kl_max == 0.0
    assert result.a.perplexity == result.reference.perplexity
    assert not any(changes.get("batching") == "static" for changes in loop.engine.history)


def test_measuring_quality_can_be_cancelled_and_restores_the_knobs(scripted_loop):
    loop = scripted_loop()
    cancel = threading.Event()
    cancel.set()
    assert measure_quality(loop, {}, {"weights": "int4"}, max_tokens=100, window=32, stride=16, cancel=cancel) is None
    assert loop.engine.config.weights == "model"
