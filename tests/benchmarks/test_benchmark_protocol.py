"""How the benchmark talks with a peer's process, and the clock that all engines share; no peer is needed."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.benchmarks.peers.protocol import (
    Order,
    OtherLoad,
    Request,
    Work,
    check_complete,
    drive,
    drive_static,
    order_from_json,
    shared_prefix,
    write,
)
from tests.benchmarks.run import call_peer

PYTHON = Path(sys.executable)
FAKE = "tests.benchmarks.fake_peer"


def make_requests(*outputs: int, gap_s: float = 0.0) -> list[Request]:
    return [Request(index, index * gap_s, [index + 1] * 8, count) for index, count in enumerate(outputs)]


def make_order(*works: Work, **options) -> Order:
    return Order("fake", "plain", options, "", "", 1, "cpu", list(works))


def test_an_order_survives_the_way_through_its_file(tmp_path):
    order = make_order(Work("a", True, make_requests(3, 1), make_requests(2), "static", {"batching": "static"}), x=1)
    write(order, tmp_path / "order.json")
    assert order_from_json((tmp_path / "order.json").read_text()) == order


def test_a_peer_reports_every_token_of_every_request_and_what_it_is():
    work = Work("a", False, make_requests(3, 1, 2), make_requests(1))
    report = call_peer(PYTHON, FAKE, make_order(work), 60)
    assert (report.error, report.versions, report.load_s is not None) == ("", {"fake": "1.0"}, True)
    (run,) = report.runs
    assert [len(timing.token_times_s) for timing in run.timings] == [3, 1, 2]
    assert run.path == {"weights_bytes": "1000", "warmed": "1"}
    assert all(timing.token_times_s == sorted(timing.token_times_s) for timing in run.timings)


def test_a_peer_that_cannot_load_says_why():
    report = call_peer(PYTHON, FAKE, make_order(Work("a", False, make_requests(1), []), die_at_load=True), 60)
    assert "lacks an instruction set" in report.error
    assert report.runs == []


def test_a_crash_keeps_the_workloads_that_were_done_and_names_the_end():
    works = [Work(name, False, make_requests(2), []) for name in ("a", "b8", "c")]
    report = call_peer(PYTHON, FAKE, make_order(*works, die_at="b8"), 60)
    assert [run.workload for run in report.runs] == ["a"]
    assert "its process ended: 3" in report.error


def test_what_a_peer_does_not_support_fails_alone_with_the_reason():
    works = [
        Work("a", False, make_requests(2), [], "static", {"batching": "static"}),
        Work("a", False, make_requests(2), []),
    ]
    report = call_peer(PYTHON, FAKE, make_order(*works), 60)
    assert [run.error for run in report.runs] == ["not supported: it has no knobs", ""]


def test_a_hanging_peer_is_given_up_and_ended():
    began = time.monotonic()
    report = call_peer(PYTHON, FAKE, make_order(Work("a", False, make_requests(1), []), hang_s=60), 1.0)
    assert "given up" in report.error
    assert time.monotonic() - began < 30


def test_a_peer_that_generates_too_few_tokens_is_an_error_and_not_a_fast_result():
    report = call_peer(PYTHON, FAKE, make_order(Work("a", False, make_requests(3), []), short=True), 60)
    assert "2 tokens of 3" in report.runs[0].error
    assert report.runs[0].timings == []


class Recorder:
    """A stepper whose steps take a fixed time and serve everything that is in flight."""

    def __init__(self, step_s: float = 0.0) -> None:
        self.step_s = step_s
        self.left: dict[int, int] = {}
        self.batches: list[list[int]] = []

    def add(self, request: Request) -> None:
        self.left[request.index] = request.output_tokens

    def step(self):
        time.sleep(self.step_s)
        self.batches.append(sorted(self.left))
        news = [(index, 1) for index in self.left]
        self.left = {index: count - 1 for index, count in self.left.items() if count > 1}
        return news

    def unfinished(self) -> bool:
        return bool(self.left)


def test_requests_that_arrive_at_once_are_in_the_first_step_together():
    engine = Recorder()
    drive(engine, make_requests(2, 2, 1))
    assert engine.batches == [[0, 1, 2], [0, 1]]


def test_the_clock_of_a_request_begins_at_its_arrival_even_while_a_step_runs():
    engine = Recorder(step_s=0.05)
    timings = drive(engine, make_requests(3, 1, gap_s=0.02))
    assert timings[1].arrival_s == 0.02
    assert timings[1].token_times_s[0] >= 0.1  # waited for the end of the first step, then took one
    assert engine.batches[0] == [0]


def test_one_by_one_means_that_no_request_waits_for_another():
    engine = Recorder(step_s=0.01)
    timings = drive(engine, make_requests(2, 2, 2), one_by_one=True)
    assert all(len(batch) == 1 for batch in engine.batches)
    assert timings[1].arrival_s >= timings[0].token_times_s[-1]


def test_a_static_batch_takes_what_has_arrived_and_counts_only_each_requests_own_tokens():
    batches = []

    def generate(batch):
        batches.append([request.index for request in batch])
        return [time.perf_counter() for _ in range(max(request.output_tokens for request in batch))]

    timings = drive_static(generate, make_requests(3, 1, 2), limit=2, one_by_one=False)
    assert batches == [[0, 1], [2]]
    assert [len(timing.token_times_s) for timing in timings] == [3, 1, 2]


def test_a_missing_token_is_noticed():
    requests = make_requests(2)
    timings = drive(Recorder(), requests)
    check_complete(timings, requests)
    timings[0].token_times_s.pop()
    with pytest.raises(RuntimeError, match="1 tokens of 2"):
        check_complete(timings, requests)


def test_only_a_prefix_that_is_meant_counts_as_shared():
    def work(prefix: int) -> Work:
        requests = [Request(index, 0.0, [7] * prefix + [index], 1) for index in range(3)]
        return Work("d", False, requests[1:], requests[:1])

    assert shared_prefix(work(100)) == [7] * 100
    assert shared_prefix(work(5)) == []


BURN = "import time\nend = time.process_time() + 0.5\nwhile time.process_time() < end: pass"
# Nobody's child: the time of a child that was waited for counts as its parent's own.
BURN_APART = (
    f"import os, pathlib, sys\nif os.fork(): os._exit(0)\nos.setsid()\n{BURN}\npathlib.Path(sys.argv[1]).touch()"
)


def test_work_of_another_session_is_seen_as_load_of_others(tmp_path):
    load, done = OtherLoad(), tmp_path / "done"
    subprocess.run([sys.executable, "-c", BURN_APART, str(done)], check=True)
    end = time.monotonic() + 30
    while not done.exists() and time.monotonic() < end:
        time.sleep(0.02)
    session = OtherLoad()
    others = (session.busy_s - load.busy_s) - (session.own_s - load.own_s)
    assert load.share() > 0
    assert others >= 0.4


def test_work_of_a_helper_process_counts_as_the_peers_own():
    load = OtherLoad()
    subprocess.run([sys.executable, "-c", BURN], check=True)
    assert OtherLoad().own_s - load.own_s >= 0.4
