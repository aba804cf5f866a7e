"""The pure parts of the live charts and of the block map."""

from __future__ import annotations

import math

import pytest

from engine.outputs import EngineEvent
from pages.background.feed import Feed
from pages.live.block_map import aggregate, blocks_per_cell, svg
from pages.live.series import bin_steps, event_marks
from tests.pages.engine_fakes import FakeClient


@pytest.fixture
def steps():
    client = FakeClient()
    for index in range(100):
        client.add_step(1000.0 + index * 0.1)
    return client.steps


def test_bins_keep_every_token(steps):
    table = bin_steps(steps, end_unix_s=1009.95, window_s=10.0, bins=20)
    assert len(table) == 20
    total = table["output_tokens_s"].sum() * 0.5
    assert total == pytest.approx(sum(step.output_tokens for step in steps))


def test_steps_outside_of_the_window_are_left_out(steps):
    table = bin_steps(steps, end_unix_s=1009.95, window_s=1.0, bins=2)
    inside = [step for step in steps if step.time_unix_s > 1008.95]
    assert table["output_tokens_s"].sum() * 0.5 == pytest.approx(sum(step.output_tokens for step in inside))


def test_an_idle_bin_has_no_step_time_but_keeps_the_requests(steps):
    table = bin_steps(steps, end_unix_s=1020.0, window_s=20.0, bins=20)
    assert math.isnan(table["step_mean_ms"].iloc[-1])
    assert table["output_tokens_s"].iloc[-1] == 0
    assert table["running"].iloc[-1] == steps[-1].num_running


def test_no_steps_give_an_empty_but_drawable_table():
    table = bin_steps([], end_unix_s=0.0, window_s=60.0, bins=10)
    assert len(table) == 10
    assert table["acceptance"].isna().all()


def test_a_toggle_is_marked_with_its_new_value():
    event = EngineEvent(0, 95.0, "reconfigure", "weights: model → int4", {"changed": {"weights": ["model", "int4"]}})
    marks = event_marks([event], end_unix_s=100.0, window_s=60.0)
    assert marks.iloc[0]["t"] == -5.0
    assert marks.iloc[0]["label"] == "weights int4"
    assert event_marks([event], end_unix_s=100.0, window_s=4.0).empty


@pytest.mark.parametrize("num_blocks", [1, 1536, 1537, 80_000])
def test_the_block_map_counts_every_block_once(num_blocks):
    blocks = "u" * (num_blocks // 3) + "." * (num_blocks - num_blocks // 3)
    per_cell = blocks_per_cell(num_blocks)
    cells = aggregate(blocks, per_cell)
    assert len(cells) <= 1536
    sizes = [min(per_cell, num_blocks - index * per_cell) for index in range(len(cells))]
    assert sum(cell.fill * size for cell, size in zip(cells, sizes, strict=True)) == pytest.approx(num_blocks // 3)
    assert svg(blocks).count("<path") <= 13


def test_a_cell_shows_the_state_of_most_of_its_busy_blocks():
    assert aggregate("uuus....", 8)[0].state == "u"
    assert aggregate("........", 8)[0].state == "."


def test_the_feed_survives_a_worker_that_starts_over():
    client = FakeClient()
    for _ in range(5):
        client.add_step()
    feed = Feed(lambda: client)
    assert len(feed.read(0.0).steps) == 5
    client.alive = False
    broken = feed.read(0.0)
    assert broken.engine is None
    assert broken.error
    client.alive, client.steps = True, client.steps[:2]
    feed.read(0.0)
    for _ in range(3):
        client.add_step()
    steps = feed.read(0.0).steps
    assert steps[-1].index == 4
    assert feed.read(0.0).error is None
