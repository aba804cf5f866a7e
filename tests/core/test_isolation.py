"""Faults of one request end that request: what it raises, wherever it raises, costs no other a token.

Faults are planted into a running engine for chosen requests or steps: in the forward pass, the scheduler, the copies of
blocks, the sampler, the logits, the detokenizer, the prefix index, the proposer. A request without one must have the
tokens that it has alone in an engine without any.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from engine import isolation
from engine.batching.request import Request
from engine.core import Engine
from engine.models import LoadedModel, load_model
from engine.outputs import RequestOutput
from engine.sampling.params import SamplingParams
from tests.support import engine_with_blocks

PROMPTS = [[10, 11, 12, 13, 10, 11, 12, 13, 10, 11], [10, 11, 12, 13, 10, 99, 7], [200, 201] * 3, [5], [65, 66, 67] * 5]
COUNT = 10


class PlantedError(RuntimeError):
    """What a planted fault raises."""


class Saboteur:
    """Plants faults into an engine. ``guilty[where]`` are the ids of the requests for which that place raises.

    Places: "forward", "drafts" (a forward pass with drafts of theirs), "schedule", "copy", "sample", "nan", "publish",
    "propose"; "append" and "take" of the detokenizer, which see only tokens, are planted request by request.
    """

    PLACES = ("forward", "schedule", "copy", "sample", "nan", "publish", "append", "take")
    HARMLESS = ("propose", "drafts")

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.guilty: dict[str, set[str]] = {place: set() for place in (*self.PLACES, *self.HARMLESS)}
        self.failing_runs = 0  # so many forward passes fail, whoever is in them
        self.raised: set[str] = set()  # places that did
        runner, scheduler, cache = engine.runner, engine.scheduler, engine.cache
        self._wrap(runner, "run", self._run)
        self._wrap(scheduler, "schedule", self._schedule)
        self._wrap(scheduler, "publish_computed", self._publish)
        self._wrap(cache, "copy_blocks", self._copy)
        sample = functools.partial(self._sample, engine.kernels.sample)
        engine.kernels = dataclasses.replace(engine.kernels, sample=sample)
        if engine.drafting.proposer is not None:
            self._wrap(engine.drafting.proposer, "propose", self._propose)

    def plant(self, place: str, request_id: str) -> None:
        self.guilty[place].add(request_id)
        if place in ("append", "take"):
            detokenizer = self.engine.streams[request_id].detokenizer

            def fail(*arguments: Any, **named: Any) -> Any:
                self._raise(place)

            setattr(detokenizer, place, fail)

    def _wrap(self, owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
        setattr(owner, name, functools.partial(wrapper, getattr(owner, name)))

    def _raise(self, place: str) -> None:
        self.raised.add(place)
        raise PlantedError(f"planted in {place}")

    def _check(self, place: str, requests: list[Request]) -> None:
        if self.guilty[place] & {request.request_id for request in requests}:
            self._raise(place)

    def _run(self, run: Any, rows: Any, attention: Any) -> torch.Tensor:
        if self.failing_runs:
            self.failing_runs -= 1
            self._raise("forward")
        self._check("forward", [row.request for row in rows])
        self._check("drafts", [row.request for row in rows if row.num_drafts])
        logits: torch.Tensor = run(rows, attention).clone()
        place = 0
        for row in rows:
            end = place + (row.num_drafts + 1) * row.samples
            if row.samples and row.request.request_id in self.guilty["nan"]:
                logits[place:end, 3] = torch.nan
                self.raised.add("nan")
            place = end
        return logits

    def _schedule(self, schedule: Any, config: Any) -> Any:
        result = schedule(config)  # it raises when all is half changed already
        self._check("schedule", [*self.engine.scheduler.running, *self.engine.scheduler.waiting])
        return result

    def _publish(self, publish: Any, request: Request) -> None:
        self._check("publish", [request])
        publish(request)

    def _copy(self, copy_blocks: Any, copies: Any) -> None:
        for copy in copies:
            self._check("copy", [r for r in self.engine.scheduler.running if copy.destination in r.block_ids])
        copy_blocks(copies)

    def _sample(self, sample: Any, logits: Any, rows: Any) -> Any:
        owners = {id(request.params): request for request in self.engine.requests}
        self._check("sample", [owners[id(row.params)] for row in rows if id(row.params) in owners])
        return sample(logits, rows)

    def _propose(self, propose: Any, request: Request, count: int) -> Any:
        self._check("propose", [request])
        return propose(request, count)


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> LoadedModel:
    return load_model(str(tiny_llama), dtype="float32", device="cpu")


def make_engine(model: LoadedModel, **knobs: Any) -> Engine:
    base = {"block_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 256}
    return engine_with_blocks(model, 40, **{**base, **knobs})


def params_of(index: int, **more: Any) -> SamplingParams:
    """Greedy and sampled requests, with and without penalties, log-probabilities and stop strings."""
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 0.9, "seed": index, "top_p": 0.9, "logprobs": 2},
        {"repetition_penalty": 1.2, "min_tokens": 3},
        {"temperature": 1.2, "seed": index, "top_k": 20, "stop": ("no such text",)},
    ]
    return SamplingParams(**{"max_tokens": COUNT, "ignore_eos": True, **kinds[index % len(kinds)], **more})


def drain(engine: Engine, outputs: dict[str, RequestOutput] | None = None) -> dict[str, RequestOutput]:
    finished = {} if outputs is None else outputs
    steps = 0
    while engine.has_unfinished():
        for output in engine.step():
            if output.finished:
                finished[output.request_id] = output
        engine.check_invariants()
        steps += 1
        assert steps < 500, "a request is stuck"
    return finished


@pytest.fixture(scope="module")
def alone(model: LoadedModel) -> Callable[[int], list[int]]:
    """The tokens of request i, alone in an engine without faults."""
    engine = make_engine(model)

    @functools.cache
    def tokens(index: int) -> list[int]:
        engine.add_request("r", PROMPTS[index % len(PROMPTS)], params_of(index))
        return drain(engine)["r"].token_ids

    return tokens


def started(model: LoadedModel, count: int = 5, steps: int = 3, **knobs: Any) -> tuple[Engine, Saboteur]:
    """An engine in the middle of ``count`` requests."""
    engine = make_engine(model, **knobs)
    saboteur = Saboteur(engine)
    for index in range(count):
        engine.add_request(str(index), PROMPTS[index % len(PROMPTS)], params_of(index))
    for _ in range(steps):
        engine.step()
    return engine, saboteur


@pytest.mark.parametrize("place", [place for place in Saboteur.PLACES if place not in ("copy", "publish")])
@pytest.mark.parametrize("victim", [0, 3])
def test_one_bad_row_ends_alone_and_all_others_get_their_token_in_the_same_step(model, alone, place: str, victim: int):
    engine, saboteur = started(model)
    before = {request.request_id: request.num_output_tokens for request in engine.requests}
    saboteur.plant(place, str(victim))
    outputs = {output.request_id: output for output in engine.step()}
    engine.check_invariants()
    assert saboteur.raised == {place}
    assert outputs.keys() == before.keys()
    bad = outputs.pop(str(victim))
    assert (bad.finished, bad.finish_reason) == (True, "error")
    assert ("planted in" if place != "nan" else "computed NaN") in str(bad.error)
    assert bad.token_ids == alone(victim)[: before[str(victim)]]
    for name, output in outputs.items():
        assert len(output.token_ids) == before[name] + 1
        assert output.logprobs is None or len(output.logprobs) == 1
    for name, output in drain(engine).items():
        assert (output.finish_reason, output.token_ids) == ("length", alone(int(name)))
    assert engine.fruitless_steps == 0
    events = [event for event in engine.events if event.kind == "error"]
    assert events, "it is not in the event log"


def test_two_bad_rows_of_different_kinds_end_and_the_rest_goes_on(model, alone):
    engine, saboteur = started(model, 7)
    saboteur.plant("forward", "1")
    saboteur.plant("sample", "4")
    saboteur.plant("append", "6")
    finished = drain(engine)
    assert {name for name, output in finished.items() if output.finish_reason == "error"} == {"1", "4", "6"}
    assert all(finished[name].token_ids == alone(int(name)) for name in "0235")


def test_prompt_that_cannot_be_published_or_copied_ends_alone(model, alone):
    engine, saboteur = started(model, 1, steps=30)  # its prefix is known now
    engine.add_request("1", PROMPTS[1], params_of(1))
    saboteur.plant("copy", "1")
    engine.add_request("4", PROMPTS[4], params_of(4))
    saboteur.plant("publish", "4")
    engine.add_request("2", PROMPTS[2], params_of(2))
    finished = drain(engine)
    assert saboteur.raised == {"copy", "publish"}
    assert finished["1"].finish_reason == finished["4"].finish_reason == "error"
    assert finished["4"].prompt_token_ids == PROMPTS[4]
    assert finished["4"].token_ids == alone(4)[: len(finished["4"].token_ids)]
    assert finished["2"].token_ids == alone(2)


def test_step_that_fails_once_is_computed_again_and_nobody_ends(model, alone):
    engine, saboteur = started(model)
    saboteur.failing_runs = 2  # as a whole, and its first half
    assert all(output.finish_reason == "length" for output in drain(engine).values())
    assert saboteur.raised == {"forward"}


@pytest.mark.parametrize("problem", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError("no room")], ids=repr)
def test_step_too_large_for_the_memory_is_computed_in_parts(model, alone, problem, monkeypatch: pytest.MonkeyPatch):
    engine, _ = started(model, steps=0)
    run, released = engine.runner.run, []
    monkeypatch.setattr(isolation, "release_memory", lambda: released.append(None))

    def small(rows: Any, attention: Any) -> torch.Tensor:
        if len(rows) > 2:
            raise problem
        return run(rows, attention)

    engine.runner.run = small  # type: ignore[method-assign]
    finished = drain(engine)
    assert released
    assert all(output.token_ids == alone(int(name)) for name, output in finished.items())


@pytest.mark.parametrize("place", Saboteur.HARMLESS)
def test_failing_drafts_are_switched_off_and_end_nobody(model, alone, place: str):
    engine, saboteur = started(model, steps=0, speculation="ngram", ngram_min=1)
    for name in "0234":
        saboteur.plant(place, name)
    finished = drain(engine)
    assert place in saboteur.raised
    assert all(output.token_ids == alone(int(name)) for name, output in finished.items())
    assert not engine.drafting.stopped


def test_statistics_of_drafts_that_fail_end_nobody(model, alone, monkeypatch: pytest.MonkeyPatch):
    engine, _ = started(model, steps=0, speculation="ngram", ngram_min=1, draft_control="adaptive")

    def fail(*arguments: Any) -> Any:
        raise PlantedError("no statistics")

    for name in ("should_draft", "observe_draft", "observe_step", "forget"):
        monkeypatch.setattr(engine.drafting.control, name, fail)
    monkeypatch.setattr(engine.drafting.statistics, "observe", fail)
    assert all(output.token_ids == alone(int(name)) for name, output in drain(engine).items())


def test_nan_behind_a_rejected_draft_harms_nobody_and_at_a_token_ends_it_where_it_would_without_drafts(model, alone):
    """Logits of positions behind a wrong guess are of a text that is not the request's."""
    ends = {}
    for speculation in ("off", "ngram"):
        engine, _ = started(model, steps=0, speculation=speculation, ngram_min=1)
        run = engine.runner.run

        def poisoned(rows: Any, attention: Any, run: Any = run) -> torch.Tensor:
            logits: torch.Tensor = run(rows, attention).clone()
            place = 0
            for row in rows:
                if row.samples:
                    known = row.request.num_output_tokens
                    if row.request.request_id == "2" and known <= 7 <= known + row.num_drafts:
                        logits[place + 7 - known] = torch.nan  # its eighth token
                    place += row.num_drafts + 1
            return logits

        engine.runner.run = poisoned  # type: ignore[method-assign]
        finished = drain(engine)
        assert all(finished[name].token_ids == alone(int(name)) for name in "0134")
        ends[speculation] = finished["2"].token_ids, finished["2"].text, finished["2"].error
    assert ends["off"] == ends["ngram"]
    assert ends["off"][0] == alone(2)[:7]
    assert "computed NaN" in str(ends["off"][2])


def test_preparation_that_fails_leaves_eager_serving(model, alone, monkeypatch: pytest.MonkeyPatch):
    engine, _ = started(model, 2, steps=0)

    def fail() -> None:
        raise PlantedError("no compiler")

    monkeypatch.setattr(engine.executor, "poll", fail)
    assert all(output.token_ids == alone(int(name)) for name, output in drain(engine).items())
    assert any("eager serves" in event.summary for event in engine.events)


def test_lost_statistics_cost_no_token(model, alone, monkeypatch: pytest.MonkeyPatch):
    engine, _ = started(model, steps=0)

    def fail(*arguments: Any) -> None:
        raise PlantedError("no statistics")

    monkeypatch.setattr(engine._log, "record", fail)
    assert all(output.token_ids == alone(int(name)) for name, output in drain(engine).items())


def test_blocks_that_cannot_be_given_back_are_found_again(model, alone, monkeypatch: pytest.MonkeyPatch):
    engine, _ = started(model)
    finish = engine.scheduler.finish

    def fail(request: Request) -> None:
        monkeypatch.setattr(engine.scheduler, "finish", finish)
        raise PlantedError("half done")

    monkeypatch.setattr(engine.scheduler, "finish", fail)
    output = engine.abort("2")
    assert output is not None
    assert output.finish_reason == "abort"
    engine.check_invariants()
    assert all(output.token_ids == alone(int(name)) for name, output in drain(engine).items())
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_blocks


class FaultMachine(RuleBasedStateMachine):
    """Requests come, faults are planted, steps are taken."""

    model: LoadedModel
    alone: Callable[[int], list[int]]
    seen: set[str]

    @initialize(speculation=st.sampled_from(["off", "ngram"]), blocks=st.sampled_from([14, 40]))
    def start(self, speculation: str, blocks: int) -> None:
        self.engine = engine_with_blocks(
            self.model, blocks, block_size=4, max_num_seqs=6, max_num_batched_tokens=512, speculation=speculation,
            ngram_min=1, token_budget=16,
        )  # fmt: skip
        self.saboteur = Saboteur(self.engine)
        self.index: dict[str, int] = {}
        self.received: dict[str, list[int]] = {}
        self.text: dict[str, str] = {}
        self.finished: dict[str, RequestOutput] = {}
        self.guilty: set[str] = set()

    @rule(indices=st.lists(st.integers(0, 19), min_size=1, max_size=4))
    def add(self, indices: list[int]) -> None:
        for index in indices:
            name = f"r{len(self.index)}"
            self.engine.add_request(name, PROMPTS[index % len(PROMPTS)], params_of(index))
            self.index[name], self.received[name] = index, []

    @precondition(lambda self: self.in_flight())
    @rule(data=st.data(), place=st.sampled_from([*Saboteur.PLACES, *Saboteur.HARMLESS]))
    def plant(self, data: st.DataObject, place: str) -> None:
        name = data.draw(st.sampled_from(sorted(self.in_flight())))
        self.saboteur.plant(place, name)
        if place not in Saboteur.HARMLESS:
            self.guilty.add(name)

    @rule(count=st.integers(1, 4))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.receive(self.engine.step())
            self.engine.check_invariants()

    @invariant()
    def nothing_is_inconsistent(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check_invariants()

    def receive(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            name = output.request_id
            assert name not in self.finished
            self.received[name] += output.new_token_ids
            assert output.token_ids == self.received[name]
            self.text[name] = self.text.get(name, "") + output.new_text
            assert output.text == self.text[name], "what was streamed is not what there is"
            if output.finished:
                self.finished[name] = output

    def in_flight(self) -> set[str]:
        return self.index.keys() - self.finished.keys()

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(500):
            if not self.engine.has_unfinished():
                break
            self.receive(self.engine.step())
            self.engine.check_invariants()
        assert not self.engine.has_unfinished()
        assert self.engine.scheduler.pool.num_free == self.engine.scheduler.pool.num_blocks
        self.seen |= self.saboteur.raised
        for name, index in self.index.items():
            output, expected = self.finished[name], self.alone(index)
            if output.finish_reason == "error":
                assert name in self.guilty, f"{name} is innocent: {output.error}"
                assert output.token_ids == expected[: len(output.token_ids)]
            else:
                assert output.token_ids == expected


def test_whatever_faults_are_planted_only_the_guilty_end_and_the_others_keep_every_token(model, alone):
    seen: set[str] = set()

    class Machine(FaultMachine):
        pass

    Machine.model, Machine.alone, Machine.seen = model, staticmethod(alone), seen
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Machine,
        settings=settings(
            max_examples=120, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
    assert len(seen) >= 6, f"the machine shows too little: {seen}"
