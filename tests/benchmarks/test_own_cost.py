"""The arithmetic of what an open tab costs."""

from __future__ import annotations

from tests.benchmarks.own_cost import Cost, Reading, report, spent


def test_threads_that_have_ended_count_too():
    assert spent(Reading(1.0, {1: 1.0}), Reading(3.0, {1: 1.5})) == 2.0


def test_while_a_run_is_on_only_the_threads_that_compute_are_left_out():
    before = Reading(0.0, {1: 0.0, 2: 0.0, 3: 0.0})
    after = Reading(20.0, {1: 9.0, 2: 9.0, 3: 0.5})  # and 1.5 of threads that have ended
    assert spent(before, after, busy=True) == 2.0
    assert spent(before, after) == 20.0


def test_a_missed_bar_is_said():
    lines = report([Cost("idle: Live", 30.0, 1.5, 0.6), Cost("burst-32 is on: Live", 20.0, 1.5, 0.6)]).splitlines()
    assert lines[1].endswith("missed")
    assert not lines[2].endswith("missed")
