"""The engine's thread: many callers, failures, shutting down."""

from __future__ import annotations

import contextlib
import math
import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.core import Engine
from engine.errors import ConfigError, EngineDeadError, QueueFullError, RequestError
from engine.models import load_model
from engine.outputs import ReconfigureResult, RequestOutput
from engine.reconfigure import reconfigure
from engine.sampling.params import SamplingParams
from engine.worker.loop import EngineLoop, _Action
from tests.support import engine_with_blocks


@pytest.fixture
def loop(tiny_llama: Path) -> Iterator[EngineLoop]:
    model = load_model(str(tiny_llama), dtype="float32", device="cpu")
    config = EngineConfig.from_mapping({"block_size": 4, "max_num_seqs": 8, "memory_limit_gib": 0.25})
    loop = EngineLoop(Engine(model, config))
    loop.start()
    yield loop
    loop.stop()


def submit(loop: EngineLoop, prompt: list[int], **params: Any) -> queue.Queue[RequestOutput]:
    outputs: queue.Queue[RequestOutput] = queue.Queue()
    loop.submit(prompt, SamplingParams(**{"max_tokens": 8, "ignore_eos": True, **params}), on_output=outputs.put)
    return outputs


def last_of(outputs: queue.Queue[RequestOutput]) -> RequestOutput:
    while True:
        output = outputs.get(timeout=30)
        if output.finished:
            return output


def test_many_threads_submit_and_toggle_at_once(loop: EngineLoop):
    expected = {i: last_of(submit(loop, [i, i + 1])).token_ids for i in range(20)}
    results: dict[int, list[int]] = {}

    def client(index: int) -> None:
        results[index] = last_of(submit(loop, [index, index + 1])).token_ids

    threads = [threading.Thread(target=client, args=(i,)) for i in range(20)]
    for thread in threads:
        thread.start()
    for toggle in ({"batching": "static"}, {"speculation": "ngram"}, {"batching": "continuous"}, {"token_budget": 9}):
        loop.reconfigure(toggle)
    for thread in threads:
        thread.join(30)
    assert results == expected


@pytest.mark.parametrize("priority", [0.5, True, 2**40, math.nan])
def test_priority_that_is_no_number_of_32_bits_is_refused_by_name(loop: EngineLoop, priority: Any):
    with pytest.raises(RequestError, match="priority"):
        loop.submit([1], SamplingParams(), on_output=lambda output: None, priority=priority)


@pytest.mark.parametrize("token", [True, 1.0, -1, 257, 10**5000, "a"], ids=lambda token: type(token).__name__)
def test_token_id_that_is_none_is_refused(loop: EngineLoop, token: Any):
    with pytest.raises(RequestError, match="not in the vocabulary"):
        loop.submit([1, token], SamplingParams(), on_output=lambda output: None)


def test_malformed_request_is_refused_in_the_callers_thread(loop: EngineLoop):
    with pytest.raises(RequestError):
        loop.submit([], SamplingParams(), on_output=lambda output: None)


def test_duplicate_id_is_refused_and_the_first_goes_on(loop: EngineLoop):
    outputs: queue.Queue[RequestOutput] = queue.Queue()
    params = SamplingParams(max_tokens=200, ignore_eos=True)
    loop.submit([1, 2], params, on_output=outputs.put, request_id="x")
    with pytest.raises(RequestError, match="in flight"):
        loop.submit([1, 2], params, on_output=outputs.put, request_id="x")
    assert last_of(outputs).finish_reason == "length"


def test_abort_answers_the_client(loop: EngineLoop):
    outputs: queue.Queue[RequestOutput] = queue.Queue()
    params = SamplingParams(max_tokens=400, ignore_eos=True)
    identifier = loop.submit([1, 2], params, on_output=outputs.put)
    outputs.get(timeout=30)
    loop.abort(identifier)
    assert last_of(outputs).finish_reason == "abort"


def test_bad_knob_leaves_the_engine_serving(loop: EngineLoop):
    with pytest.raises(ConfigError):
        loop.reconfigure({"weights": "int3"})
    assert last_of(submit(loop, [1, 2])).finish_reason == "length"


def test_failed_step_is_answered_and_the_engine_goes_on(loop: EngineLoop):
    def break_once(engine: Engine) -> None:
        runner_run = engine.runner.run

        def fail(*arguments: Any) -> Any:
            engine.runner.run = runner_run  # type: ignore[method-assign]
            raise RuntimeError("out of something")

        engine.runner.run = fail  # type: ignore[method-assign]

    loop.call(break_once)
    failed = last_of(submit(loop, [1, 2]))
    assert failed.finish_reason == "error"
    assert "out of something" in str(failed.error)
    assert last_of(submit(loop, [1, 2])).finish_reason == "length"
    assert loop.call(lambda engine: engine.scheduler.pool.num_free == engine.scheduler.pool.num_blocks)
    assert loop.events.since(0)[-1].kind == "error"


def test_engine_that_keeps_failing_dies_and_says_so(loop: EngineLoop):
    def fail(*arguments: Any) -> Any:
        raise RuntimeError("broken")

    loop.call(lambda engine: setattr(engine.runner, "run", fail))
    for _ in range(3):
        assert last_of(submit(loop, [1, 2])).finish_reason == "error"
    loop._thread.join(10)
    assert not loop.alive
    assert "broken" in str(loop.error)
    with pytest.raises(EngineDeadError):
        submit(loop, [1, 2])


def test_requests_that_fail_by_themselves_never_end_the_engine(loop: EngineLoop):
    """Ten steps in a row of which nothing can be computed: their requests are to blame, a step of its own shows it."""

    def sabotage(engine: Engine) -> None:
        run = engine.runner.run

        def fail(rows: Any, attention: Any) -> Any:
            if any(row.request.token_ids[0] == 13 for row in rows):
                raise RuntimeError("thirteen")
            return run(rows, attention)

        engine.runner.run = fail  # type: ignore[method-assign]

    loop.call(sabotage)
    for _ in range(10):
        assert "thirteen" in str(last_of(submit(loop, [13, 2])).error)
    assert last_of(submit(loop, [1, 2])).finish_reason == "length"
    loop.call(lambda engine: engine.check_invariants())


def test_step_that_raises_as_a_whole_is_tried_anew_and_costs_no_token(
    loop: EngineLoop, monkeypatch: pytest.MonkeyPatch
):
    expected = [last_of(submit(loop, [i, 2], max_tokens=30)).token_ids for i in range(4)]
    outputs = []
    with held(loop):
        outputs = [submit(loop, [i, 2], max_tokens=30) for i in range(4)]
        step, calls = loop.engine.step, 0

        def sometimes() -> list[RequestOutput]:
            nonlocal calls
            calls += 1
            if calls % 5 == 0:
                raise RuntimeError("now and then")
            return step()

        monkeypatch.setattr(loop.engine, "step", sometimes)
    assert [last_of(output).token_ids for output in outputs] == expected
    assert loop.alive


def test_engine_whose_steps_raise_as_a_whole_answers_its_requests_and_dies_in_the_end(
    loop: EngineLoop, monkeypatch: pytest.MonkeyPatch
):
    def fail() -> list[RequestOutput]:
        raise RuntimeError("nothing works")

    monkeypatch.setattr(loop.engine, "step", fail)
    for _ in range(3):
        assert "nothing works" in str(last_of(submit(loop, [1, 2])).error)
    loop._thread.join(10)
    assert "nothing works" in str(loop.error)


@contextlib.contextmanager
def held(loop: EngineLoop) -> Iterator[None]:
    """The stepping thread waits inside an action for as long as the block lasts."""
    entered, leave = threading.Event(), threading.Event()

    def wait() -> None:
        entered.set()
        leave.wait(30)

    loop._post(_Action(wait, lambda problem: None))
    assert entered.wait(30)
    try:
        yield
    finally:
        leave.set()


def test_request_that_a_change_of_the_cache_overtakes_is_told_so_and_the_engine_goes_on(tiny_llama: Path):
    """It was valid when it was submitted, and is not any more when its turn comes."""
    model = load_model(str(tiny_llama), dtype="float32", device="cpu")
    engine = engine_with_blocks(model, 40, block_size=4, max_num_seqs=8, max_num_batched_tokens=512)
    reconfigure(engine, {"kv_dtype": "int4"})
    loop = EngineLoop(engine)
    loop.start()
    room = engine.admission.room_for(2)
    outcome: list[ReconfigureResult] = []
    with held(loop):
        change = threading.Thread(target=lambda: outcome.append(loop.reconfigure({"kv_dtype": "model"})))
        change.start()
        while not loop._inbox:  # the change is in line before the request
            time.sleep(0.001)
        outputs = submit(loop, [1, 2], max_tokens=room)
    change.join(30)
    output = last_of(outputs)
    assert outcome[0].changed["kv_dtype"] == ("int4", "model")
    assert engine.admission.room_for(2) < room
    assert (output.finish_reason, output.token_ids) == ("error", [])
    assert isinstance(output.refusal, RequestError)
    assert output.refusal.field == "max_tokens"
    assert str(engine.admission.room_for(2)) in str(output.error)
    assert last_of(submit(loop, [1, 2])).finish_reason == "length"
    with pytest.raises(RequestError, match="output tokens"):  # the new envelope is what everybody sees
        submit(loop, [1, 2], max_tokens=room)
    loop.stop()


def test_nothing_posted_ends_the_thread(loop: EngineLoop, caplog: pytest.LogCaptureFixture):
    answered: list[BaseException] = []

    def explode() -> None:
        raise SystemExit("an action may raise anything")

    def explode_again(problem: BaseException) -> None:
        answered.append(problem)
        raise ValueError("and so may who hears of it")

    with held(loop):
        loop._post(_Action(explode, explode_again))
        loop.add_event("run", "an event", {})
    with pytest.raises(ZeroDivisionError):
        loop.call(lambda engine: 1 // 0)
    with pytest.raises(SystemExit):
        loop.call(lambda engine: explode())
    assert [type(problem) for problem in answered] == [SystemExit]
    assert "and so may who hears of it" in caplog.text
    assert last_of(submit(loop, [1, 2])).finish_reason == "length"


def test_what_is_still_in_the_inbox_when_the_engine_ends_is_answered(loop: EngineLoop, monkeypatch: pytest.MonkeyPatch):
    failures: list[BaseException] = []

    def ask() -> None:
        try:
            loop.call(lambda engine: None)
        except BaseException as problem:
            failures.append(problem)

    def die() -> bool:
        raise KeyboardInterrupt

    asking = threading.Thread(target=ask)
    with held(loop):
        outputs = submit(loop, [1, 2])
        asking.start()
        while len(loop._inbox) < 2:
            time.sleep(0.001)
        monkeypatch.setattr(loop.engine, "has_unfinished", die)
    output = last_of(outputs)
    asking.join(30)
    assert output.finish_reason == "error"
    assert isinstance(output.refusal, EngineDeadError)
    assert [type(problem) for problem in failures] == [EngineDeadError]
    assert not loop.alive


def test_fail_all_that_raises_leaves_nobody_without_an_answer(loop: EngineLoop, monkeypatch: pytest.MonkeyPatch):
    outputs = [submit(loop, [i, 2], max_tokens=400) for i in range(3)]
    for output in outputs:
        output.get(timeout=30)

    def fail_half(message: str) -> list[RequestOutput]:
        raise RuntimeError("in the middle")

    with held(loop):
        monkeypatch.setattr(loop.engine, "fail_all", fail_half)
        monkeypatch.setattr(loop.engine, "close", fail_half)
        stopping = threading.Thread(target=loop.stop)
        stopping.start()
        while not loop._stopping:
            time.sleep(0.001)
    stopping.join(30)
    assert all(last_of(output).finish_reason == "error" for output in outputs)
    assert not loop.running


def test_stopping_answers_requests_in_flight(loop: EngineLoop):
    outputs = submit(loop, [1, 2], max_tokens=400)
    outputs.get(timeout=30)
    loop.stop()
    assert last_of(outputs).finish_reason == "error"
    with pytest.raises(EngineDeadError):
        loop.reconfigure({"batching": "static"})


def test_clients_callback_that_raises_harms_nobody(loop: EngineLoop):
    def explode(output: RequestOutput) -> None:
        raise ValueError("client bug")

    finished: list[RequestOutput] = []

    def listen(output: RequestOutput) -> None:
        finished.append(output)
        raise ValueError("a listener's bug")

    loop.on_finished = listen
    loop.submit([1, 2], SamplingParams(max_tokens=400, ignore_eos=True), on_output=explode, request_id="deaf")
    assert last_of(submit(loop, [3, 4])).finish_reason == "length"
    deaf = next(output for output in finished if output.request_id == "deaf")
    assert deaf.finish_reason == "error"
    assert "could not be delivered: ValueError: client bug" in str(deaf.error)
    assert len(deaf.token_ids) < 400
    assert loop.call(lambda engine: engine.scheduler.pool.num_free == engine.scheduler.pool.num_blocks)


def test_more_requests_than_may_run_and_wait_are_refused_at_once(loop: EngineLoop):
    loop.reconfigure({"max_running": 2, "max_waiting": 3})
    with held(loop):
        outputs = [submit(loop, [i, 2], max_tokens=20) for i in range(5)]
        with pytest.raises(QueueFullError, match="5 requests are running or waiting") as refusal:
            submit(loop, [9, 9])
        assert refusal.value.field == "max_waiting"
    assert all(last_of(output).finish_reason == "length" for output in outputs)
    assert last_of(submit(loop, [9, 9])).finish_reason == "length"
    with held(loop):  # a limit that falls meanwhile is found when the request is to be queued
        loop._post(_Action(lambda: lower(loop), lambda problem: None))
        late = [submit(loop, [i, 2]) for i in range(3)]
    assert [type(last_of(output).refusal) for output in late] == [type(None), QueueFullError, QueueFullError]


def lower(loop: EngineLoop) -> None:
    reconfigure(loop.engine, {"max_running": 1, "max_waiting": 0})


def test_an_engine_without_requests_goes_on_preparing(loop: EngineLoop, monkeypatch: pytest.MonkeyPatch):
    executor, polled, done = loop.engine.executor, [], threading.Event()
    poll = executor.poll

    def piece() -> None:
        polled.append(None)
        poll()
        if len(polled) == 5:
            done.set()

    monkeypatch.setattr(executor, "poll", piece)
    monkeypatch.setattr(type(executor), "has_work", property(lambda self: self is executor and len(polled) < 5))
    answer = last_of(submit(loop, [1, 2], max_tokens=1))  # wakes it, as a change of mode does
    assert done.wait(30)
    assert answer.finish_reason == "length"
    loop.stop()
    assert len(polled) >= 5
    assert loop.error is None


def test_status_after_a_change_is_never_the_picture_from_before_it(loop: EngineLoop):
    for batching in ("static", "continuous", "static"):
        loop.status()
        loop.reconfigure({"batching": batching})
        assert loop.status(max_age_s=60).config["batching"] == batching


def test_status_is_consistent_and_steps_are_numbered(loop: EngineLoop):
    last_of(submit(loop, [1, 2, 3]))
    status = loop.status(max_age_s=0)
    assert status.running == status.waiting == 0
    assert status.totals["output_tokens"] == 8
    assert len(status.blocks) == status.num_blocks
    steps = loop.steps.since(0)
    assert [step.index for step in steps] == list(range(len(steps)))
    assert loop.steps.since(steps[-1].index) == steps[-1:]
