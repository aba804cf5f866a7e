"""Draft length and the switch that turns drafting off, on a machine whose costs are made up."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest

from engine.speculation.draft_control import PROBE_EVERY_AT_MOST, WARM_UP, DraftControl, Mean
from engine.speculation.statistics import DraftStatistics


def drive(
    control: DraftControl,
    steps: int,
    *,
    batch: int,
    step_s: Callable[[int], float],
    acceptance: float,
    longest: int = 4,
    generator: random.Random | None = None,
) -> list[int]:
    """Decode ``steps`` steps; draft tokens of each.

    Args:
        step_s: seconds of a step by the number of tokens it computes.
        acceptance: probability that a draft token is right, given that those before it are.
    """
    generator = generator or random.Random(0)
    history = []
    for _ in range(steps):
        drafts = [0] * batch
        if control.should_draft(batch):
            drafts = [control.length(str(i), longest) for i in range(batch)]
        output = 0
        for index, length in enumerate(drafts):
            accepted = 0
            while accepted < length and generator.random() < acceptance:
                accepted += 1
            if length:
                control.observe_draft(str(index), accepted)
            output += accepted + 1
        control.observe_step(batch, sum(drafts), output, step_s(batch + sum(drafts)))
        history.append(sum(drafts))
    return history


def share_that_drafts(history: list[int]) -> float:
    return sum(count > 0 for count in history) / len(history)


def memory_bound(tokens: int) -> float:
    return 0.010 + 0.0001 * tokens


def compute_bound(tokens: int) -> float:
    return 0.002 + 0.001 * tokens


def test_drafting_goes_on_where_extra_tokens_cost_little_and_are_accepted():
    history = drive(DraftControl(), 300, batch=1, step_s=memory_bound, acceptance=0.8)
    assert share_that_drafts(history[20:]) > 0.9


def test_drafting_switches_itself_off_where_it_does_not_pay_and_only_probes():
    history = drive(DraftControl(), 3000, batch=32, step_s=compute_bound, acceptance=0.3)
    assert share_that_drafts(history[:20]) > 0, "it was never tried"
    assert share_that_drafts(history[100:]) < 0.02


def test_the_same_text_drafts_alone_and_not_in_a_large_batch():
    control = DraftControl()
    costs = lambda tokens: max(0.010, 0.0008 * tokens)  # noqa: E731  flat until the machine is busy
    alone = drive(control, 300, batch=1, step_s=costs, acceptance=0.6)
    crowd = drive(control, 300, batch=32, step_s=costs, acceptance=0.6)
    again = drive(control, 300, batch=1, step_s=costs, acceptance=0.6)
    assert share_that_drafts(alone[50:]) > 0.9
    assert share_that_drafts(crowd[50:]) < 0.1
    assert share_that_drafts(again) > 0.9


def test_text_that_becomes_predictable_is_noticed_by_a_probe():
    control = DraftControl()
    drive(control, 400, batch=4, step_s=memory_bound, acceptance=0.0)
    history = drive(control, 1500, batch=4, step_s=memory_bound, acceptance=0.95)
    assert share_that_drafts(history[-300:]) > 0.9


def test_machine_on_which_drafts_become_dear_is_noticed():
    control = DraftControl()
    drive(control, 200, batch=4, step_s=memory_bound, acceptance=0.7)
    history = drive(control, 600, batch=4, step_s=lambda tokens: 0.01 * tokens, acceptance=0.7)
    assert share_that_drafts(history[-200:]) < 0.1


def test_useless_probes_become_rare():
    history = drive(DraftControl(), 5000, batch=1, step_s=compute_bound, acceptance=0.0)
    probes = [index for index, count in enumerate(history) if count]
    gaps = [b - a for a, b in itertools.pairwise(probes)]
    assert gaps[-1] == PROBE_EVERY_AT_MOST
    assert len(probes) < 25


def test_draft_is_one_token_longer_than_what_was_accepted_lately():
    control = DraftControl()
    assert control.length("r", 8) == 8
    for _ in range(40):
        control.observe_draft("r", 2)
    assert control.length("r", 8) == 3
    for _ in range(40):
        control.observe_draft("r", 0)
    assert control.length("r", 8) == 1
    assert control.length("other", 8) == 8, "each request has a mean of its own"
    control.forget("r")
    assert control.length("r", 8) == 8


def test_steps_in_which_nothing_could_be_proposed_count_as_plain_ones():
    control = DraftControl()
    for _ in range(WARM_UP):
        control.observe_step(2, 0, 2, 0.01)
    assert control.should_draft(2)
    control.observe_step(2, 0, 2, 0.01)
    assert control.to_dict()["2"]["plain_ms"] == pytest.approx(10.0)
    assert control.should_draft(2), "drafting has still not been tried"


def test_mean_starts_as_a_plain_mean_and_then_follows():
    mean = Mean()
    for value in (1.0, 3.0):
        mean.observe(value)
    assert mean.value == 2.0
    for _ in range(100):
        mean.observe(7.0)
    assert mean.value == pytest.approx(7.0)


def test_statistics_count_each_position_of_the_drafts():
    statistics = DraftStatistics(16)
    assert statistics.to_dict()["mean_accepted_length"] is None
    for proposed, accepted in ((3, 2), (1, 1), (3, 0)):
        statistics.observe(proposed, accepted)
    assert statistics.to_dict() == {
        "drafts": 3,
        "draft_tokens": 7,
        "accepted_tokens": 3,
        "mean_accepted_length": 2.0,
        "proposed_per_position": [3, 2, 2],
        "accepted_per_position": [2, 1, 0],
    }
