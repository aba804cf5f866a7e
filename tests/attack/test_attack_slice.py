"""A slice of ``make attack``, some of every class with the same demands; all of it is ``python -m tests.attack``."""

from __future__ import annotations

import os

import pytest

from tests.attack.__main__ import CLASSES, HEALTH_LIMIT_MS, run
from tests.attack.http_attack import DEMANDED, judge
from tests.attack.http_cases import Case, cases
from tests.attack.outcome import Tally, markdown
from tests.attack.stream_attack import judge as judge_stream
from tests.attack.wire import Answer

SHARES = {"imports": 0.1, "streams": 0.1, "gguf": 0.05, "safetensors": 0.05, "configs": 0.05, "kill": 0.04, "http": 0.1}
MINUTES = 2.0
#: Of /health. Where processes share the suite another one's work stands between a question and its answer, and an
#: engine that stands still would show in seconds; `make attack` has the machine to itself and demands 250 ms.
LIMIT_MS = 4 * HEALTH_LIMIT_MS if "PYTEST_XDIST_WORKER" in os.environ else HEALTH_LIMIT_MS


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_nothing_an_outsider_sends_stops_the_engine(name: str):
    (tally,) = run([name], seed=1, minutes=MINUTES, share=SHARES[name])
    assert not tally.holds(LIMIT_MS), markdown([tally], LIMIT_MS) + "\n" + "\n".join(tally.examples)


def test_more_kinds_of_requests_are_tried_than_are_demanded_and_the_same_ones_for_a_seed(tmp_path):
    first, again, other = (cases(seed, 1, tmp_path) for seed in (0, 0, 1))
    assert len({case.kind for case in first}) == len(first) >= DEMANDED
    assert [case.parts for case in first] == [case.parts for case in again] != [case.parts for case in other]


def answer(status: int, body: bytes, **headers: str) -> Answer:
    return Answer(status, {"content-type": "application/json", **headers}, body, int(status > 0), True, 0.1)


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (answer(400, b'{"error":{"message":"no"}}'), "refused"),
        (answer(400, b"no"), "failed"),
        (answer(500, b'{"error":{"message":"no"}}'), "failed"),
        (answer(503, b'{"message":"later"}'), "refused"),
        (answer(200, b'{"x":1}'), "served"),
        (answer(200, b'{"x":NaN}'), "failed"),
        (answer(0, b""), "lost"),
    ],
)
def test_an_answer_is_judged_by_what_was_promised(found: Answer, verdict: str):
    assert judge(Case("x", ()), found)[0] == verdict


def test_what_must_be_refused_and_is_served_has_failed():
    assert judge(Case("x", (), expect="error"), answer(200, b"{}"))[0] == "failed"
    assert judge(Case("x", (), expect="end"), answer(0, b""))[0] == "refused"  # a clean close of what is no request


def test_a_stream_that_breaks_off_is_lost():
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
    assert judge_stream(head + b"data: {}\n\n", "whole")[0] == "lost"
    assert judge_stream(head + b"data: {}\n\ndata: [DONE]\n\n", "whole")[0] == "served"
    assert judge_stream(head + b'data: {"error":{"message":"shut down"}}\n\n', "slow")[0] == "served"
    assert judge_stream(b"", "whole")[0] == "lost"


def test_a_traceback_in_a_log_counts_and_is_named():
    tally = Tally("x", "requests", 0)
    tally.read_log(
        'INFO fine\nTraceback (most recent call last):\n  File "a.py", line 1, in f\nValueError: no\nINFO fine\n'
    )
    assert (tally.tracebacks, dict(tally.kinds)) == (1, {"traceback: ValueError: no": 1})
    assert tally.holds(250) == ["1 tracebacks"]


def test_a_class_holds_only_if_nothing_of_it_failed():
    tally = Tally("x", "requests", 2)
    tally.add("refused", "a")
    assert tally.holds(250) == ["1 of 2 tried"]
    tally.add("served", "b")
    tally.health_ms = 249.0
    assert tally.holds(250) == []
    tally.tracebacks, tally.health_ms = 1, 251.0
    tally.died("c", "the worker ended with -11")
    assert tally.holds(250) == ["1 failed", "1 engine deaths", "1 tracebacks", "/health took 251 ms"]
    assert "| x (requests) | 2 | 3 | 1 | 1 | 1 | 0 | 1 | 1 | 251 |" in markdown([tally], 250)
