"""The feed asks the worker for what is new, and for the telemetry only where somebody looks at it."""

from __future__ import annotations

import pytest

from pages.background.feed import Feed


@pytest.fixture
def asked(client):
    """Which of the worker's routes were asked, in order; the worker numbers its newest step and event."""
    calls: list[str] = []
    for name in ("status", "series", "telemetry"):
        setattr(client, name, counted(client, name, calls))
    return calls


def counted(client, name, calls):
    answer = getattr(client, name)

    def call(**arguments):
        calls.append(name)
        document = answer(**arguments)
        if name == "status":
            when = client.events[-1].time_unix_s if client.events else None
            newest = {"last_step": len(client.steps) - 1, "last_event": len(client.events) - 1}
            document["worker"] |= newest | {"last_event_unix_s": when}
        return document

    return call


def test_an_idle_engine_is_asked_for_its_status_alone(client, asked):
    feed = Feed(lambda: client)
    client.add_step()
    client.patch_config({"prefix_cache": False})
    feed.read(max_age_s=0.0, samples=False)
    assert asked == ["status", "series"]
    asked.clear()
    feed.read(max_age_s=0.0, samples=False)
    assert asked == ["status"]


@pytest.mark.parametrize("happens", ["a step", "an event"])
def test_what_is_new_is_read_at_once(client, asked, happens):
    feed = Feed(lambda: client)
    feed.read(max_age_s=0.0)
    before = feed.latest()
    if happens == "a step":
        client.add_step()
    else:
        client.patch_config({"prefix_cache": False})
    after = feed.read(max_age_s=0.0)
    assert (len(after.steps) - len(before.steps), len(after.events) - len(before.events)) == (
        (1, 0) if happens == "a step" else (0, 1)
    )


def test_another_engine_of_the_same_numbers_is_noticed(client, asked):
    feed = Feed(lambda: client)
    client.patch_config({"prefix_cache": False})
    feed.read(max_age_s=0.0)
    client.events.clear()
    client.patch_config({"prefix_cache": True})  # the first event of another engine, as the previous's was
    assert [event.detail["changed"] for event in feed.read(max_age_s=0.0).events] == [
        {"prefix_cache": [True, False]},
        {"prefix_cache": [False, True]},
    ]


def test_telemetry_that_nobody_asked_for_is_there_when_somebody_does(client, asked):
    client.samples = [{"index": 0}, {"index": 1}]
    feed = Feed(lambda: client)
    assert feed.read(max_age_s=0.0, samples=False).samples == ()
    assert "telemetry" not in asked
    assert [sample["index"] for sample in feed.read(max_age_s=0.0).samples] == [0, 1]


def test_a_young_reading_without_telemetry_is_not_enough_for_whoever_asks_for_it(client, asked):
    client.samples = [{"index": 0}]
    feed = Feed(lambda: client)
    assert feed.read(max_age_s=0.0, samples=False).samples == ()
    assert feed.read(max_age_s=60.0, patience_s=5.0).samples
