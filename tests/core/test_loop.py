"""The engine's thread: many callers, failures, shutting down."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.core import Engine
from engine.errors import ConfigError, EngineDeadError, RequestError
from engine.loop import EngineLoop
from engine.models import load_model
from engine.outputs import RequestOutput
from engine.sampling import SamplingParams


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
        runner_run = engine._runner.run

        def fail(*arguments: Any) -> Any:
            engine._runner.run = runner_run  # type: ignore[method-assign]
            raise RuntimeError("out of something")

        engine._runner.run = fail  # type: ignore[method-assign]

    loop.call(break_once)
    failed = last_of(submit(loop, [1, 2]))
    assert failed.finish_reason == "error"
    assert "out of something" in str(failed.error)
    assert last_of(submit(loop, [1, 2])).finish_reason == "length"
    assert loop.call(lambda engine: engine.scheduler.pool.num_free == engine.scheduler.pool.num_blocks)
    assert loop.events_since(0)[-1].kind == "error"


def test_engine_that_keeps_failing_dies_and_says_so(loop: EngineLoop):
    def fail(*arguments: Any) -> Any:
        raise RuntimeError("broken")

    loop.call(lambda engine: setattr(engine._runner, "run", fail))
    for _ in range(3):
        assert last_of(submit(loop, [1, 2])).finish_reason == "error"
    loop._thread.join(10)
    assert not loop.alive
    assert "broken" in str(loop.error)
    with pytest.raises(EngineDeadError):
        submit(loop, [1, 2])


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

    loop.submit([1, 2], SamplingParams(max_tokens=4), on_output=explode)
    assert last_of(submit(loop, [3, 4])).finish_reason == "length"


def test_an_engine_without_requests_goes_on_preparing(loop: EngineLoop, monkeypatch: pytest.MonkeyPatch):
    executor, polled, done = loop.engine._executor, [], threading.Event()
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
    steps = loop.steps_since(0)
    assert [step.index for step in steps] == list(range(len(steps)))
    assert loop.steps_since(steps[-1].index) == steps[-1:]
