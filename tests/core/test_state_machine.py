"""Anything in any order, and every token still right.

Hypothesis adds and cancels requests, steps, toggles every lossless live knob, moves the limits, swaps the weights and
the format of the cache, and resets the cache of an engine whose KV cache is so small that requests are preempted. After
every rule the invariants are recomputed from scratch; at the end every request that was not cancelled has finished, and
one whose whole life saw nothing but lossless changes has exactly the tokens of the model run alone.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from engine.core import Engine
from engine.models import LoadedModel, load_model
from engine.outputs import RequestOutput
from engine.reconfigure import reconfigure
from engine.sampling.params import SamplingParams
from engine.status import take_status
from tests.core.toggles import LOSSLESS
from tests.support import engine_with_blocks

BLOCKS, BLOCK_SIZE, MAX_RUNNING, MAX_BATCHED_TOKENS = 14, 4, 6, 512
STEMS = [[10, 11, 12, 13, 10, 11, 12, 13, 10, 11], [10, 11, 12, 13, 10, 99, 7], [200, 201, 200, 201, 200, 201]]
STEPS_TO_FINISH = 2000


class Reference:
    """What the model generates for a prompt alone, without cache, batch or engine."""

    def __init__(self, model: LoadedModel, engine: Engine) -> None:
        self._engine = engine
        self.model = model
        self.generate = functools.cache(self._generate)

    def _generate(self, prompt: tuple[int, ...], count: int) -> list[int]:
        tokens = list(prompt)
        while len(tokens) < len(prompt) + count:
            tokens.append(int(self._engine.prompt_logits(tokens)[-1].argmax()))
        return tokens[len(prompt) :]


class EngineMachine(RuleBasedStateMachine):
    """See the module. The model is shared by all runs: each begins with its own weights in place."""

    model: LoadedModel
    reference: Reference
    seen: dict[str, int]

    @initialize(speculates=st.booleans())
    def start(self, speculates: bool) -> None:
        if self.model.weights_format() != "model":
            self.model.commit_weights(self.model.prepare_weights("model", 32))
        self.engine = engine_with_blocks(
            self.model, BLOCKS, block_size=BLOCK_SIZE, max_num_seqs=MAX_RUNNING,
            max_num_batched_tokens=MAX_BATCHED_TOKENS,
        )  # fmt: skip
        if speculates:
            self.speculate()
        self.wanted: dict[str, tuple[tuple[int, ...], int]] = {}
        self.lossy: set[str] = set()  # requests in flight while weights or cache were others, or swapped
        self.finished: dict[str, RequestOutput] = {}
        self.received: dict[str, list[int]] = {}
        self.count = 0

    @rule(
        stem=st.sampled_from(STEMS),
        kept=st.integers(0, 10),
        tails=st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=6), min_size=1, max_size=4),
        count=st.integers(1, 30),
        priority=st.integers(0, 2),
    )
    def add(self, stem: list[int], kept: int, tails: list[list[int]], count: int, priority: int) -> None:
        for tail in tails:  # several at once, so that there is a batch and the cache runs out
            self.submit((*stem[:kept], *tail), count, priority)

    @rule(stem=st.sampled_from(STEMS), written=st.integers(20, 28), count=st.integers(8, 16))
    def add_its_own_text(self, stem: list[int], written: int, count: int) -> None:
        """The model goes on with what it wrote itself, and soon in circles: drafts are right then."""
        prompt = tuple(stem)
        self.submit((*prompt, *self.reference.generate(prompt, written)), count, 0)

    def submit(self, prompt: tuple[int, ...], count: int, priority: int) -> None:
        self.count += 1
        name = f"r{self.count}"
        self.engine.add_request(name, prompt, SamplingParams(max_tokens=count, ignore_eos=True), priority)
        self.wanted[name] = (prompt, count)
        self.received[name] = []
        if (self.engine.config.weights, self.engine.config.kv_dtype) != ("model", "model"):
            self.lossy.add(name)

    @precondition(lambda self: self.in_flight())
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.in_flight())))
        output = self.engine.abort(name)
        assert output is not None
        assert output.finish_reason == "abort"
        assert output.token_ids == self.received[name]
        del self.wanted[name]

    @rule()
    def step(self) -> None:
        for output in self.engine.step():
            self.receive(output)

    @rule(count=st.integers(2, 12))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()
            self.engine.check_invariants()

    @rule(change=st.sampled_from(LOSSLESS))
    def toggle(self, change: dict[str, Any]) -> None:
        reconfigure(self.engine, change)

    @rule()
    def speculate(self) -> None:
        """With drafts of a fixed length: whether adaptive ones pay depends on the clock of a busy machine."""
        reconfigure(self.engine, {"speculation": "ngram", "ngram_min": 1, "draft_control": "fixed"})

    @rule(running=st.integers(1, MAX_RUNNING), budget=st.integers(1, 64))
    def move_the_limits(self, running: int, budget: int) -> None:
        reconfigure(self.engine, {"max_running": running, "token_budget": budget})

    @rule(weights=st.sampled_from(["model", "int8", "int4", "w4a8"]), really=st.integers(0, 3))
    def swap_weights(self, weights: str, really: int) -> None:
        if really and weights != "model":
            return  # seldom, or hardly a request would live long enough to be compared
        if reconfigure(self.engine, {"weights": weights}).changed:
            self.lossy |= self.in_flight()

    @rule(kv_dtype=st.sampled_from(["model", "fp8", "int8", "int4"]), really=st.integers(0, 3))
    def swap_the_cache(self, kv_dtype: str, really: int) -> None:
        if really and kv_dtype != "model":
            return  # a quantized cache has so many blocks that nobody is preempted
        if reconfigure(self.engine, {"kv_dtype": kv_dtype}).changed:
            self.lossy |= self.in_flight()

    @rule()
    def reset_prefix_cache(self) -> None:
        self.engine.reset_prefix_cache()
        assert take_status(self.engine).blocks.count("c") == 0

    @invariant()
    def nothing_is_inconsistent(self) -> None:
        self.engine.check_invariants()
        for name in self.in_flight():
            request = self.engine.streams[name].request
            assert request.output_token_ids == self.received[name], "a token was lost or invented"

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(STEPS_TO_FINISH):
            if not self.engine.has_unfinished():
                break
            self.step()
            self.engine.check_invariants()
        assert not self.engine.has_unfinished(), "a request is stuck"
        pool = self.engine.scheduler.pool
        assert pool.num_free == pool.num_blocks, "a block was not given back"
        assert pool.num_blocks == BLOCKS or self.engine.config.kv_dtype != "model", "a block was lost in a swap"
        for name in ("preemptions", "prefix_hit_tokens", "accepted_tokens"):
            self.seen[name] += self.engine.totals[name]
        for name, (prompt, count) in self.wanted.items():
            output = self.finished[name]
            assert output.finish_reason == "length"
            assert len(output.token_ids) == count
            if name not in self.lossy:
                note(f"{name}: {prompt}")
                assert output.token_ids == self.reference.generate(prompt, count), f"{name} has other tokens"
                self.seen["compared"] += 1

    def in_flight(self) -> set[str]:
        return self.wanted.keys() - self.finished.keys()

    def receive(self, output: RequestOutput) -> None:
        self.received[output.request_id] += output.new_token_ids
        assert output.token_ids == self.received[output.request_id]
        if output.finished:
            assert output.request_id not in self.finished
            self.finished[output.request_id] = output


@pytest.mark.slow
def test_any_sequence_of_requests_cancellations_toggles_and_swaps_keeps_every_token_right(tiny_llama: Path):
    model = load_model(str(tiny_llama), dtype="float32", device="cpu")
    scoring = load_model(str(tiny_llama), dtype="float32", device="cpu")  # its weights are never swapped
    seen = dict.fromkeys(("preemptions", "prefix_hit_tokens", "accepted_tokens", "compared"), 0)

    class Machine(EngineMachine):
        pass

    Machine.model, Machine.seen = model, seen
    Machine.reference = Reference(scoring, engine_with_blocks(scoring, 32, block_size=16, attention="reference"))
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Machine,
        settings=settings(
            max_examples=80, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
    floors = {
        "preemptions": 25,
        "prefix_hit_tokens": 25,
        "compared": 25,
        "accepted_tokens": 1,
    }  # random models seldom repeat
    assert all(seen[name] >= floor for name, floor in floors.items()), f"the machine shows too little: {seen}"
