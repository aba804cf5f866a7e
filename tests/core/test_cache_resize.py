"""Lighter weights leave memory: the KV cache takes it when asked, and gives it back to heavier ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine import parts
from engine.config import EngineConfig
from engine.core import Engine
from engine.errors import CapacityError
from engine.models import LoadedModel, load_model
from engine.reconfigure import reconfigure, resize
from engine.sampling.params import SamplingParams
from engine.status import take_status
from tests.core.test_out_of_memory import failing_at
from tests.support import engine_with_blocks

PROMPT = [72, 101, 108, 108, 111]
BLOCKS = 40


@pytest.fixture
def model(tiny_llama: Path) -> LoadedModel:
    return load_model(str(tiny_llama), dtype="float32", device="cpu")


def make_engine(model: LoadedModel, **knobs: Any) -> Engine:
    """An engine whose cache is limited by memory, not by what its requests could ever use."""
    return engine_with_blocks(model, BLOCKS, block_size=4, max_num_seqs=64, **knobs)


def start(engine: Engine, max_tokens: int = 30) -> None:
    engine.add_request("r", PROMPT, SamplingParams(max_tokens=max_tokens, ignore_eos=True))
    for _ in range(5):
        engine.step()


def finish(engine: Engine) -> list[int]:
    while True:
        for output in engine.step():
            if output.finished:
                return output.token_ids
        engine.check_invariants()


def test_lighter_weights_offer_their_memory_and_say_how_much(model: LoadedModel):
    engine = make_engine(model)
    assert take_status(engine).resize is None
    freed = engine.model.weight_bytes()
    result = reconfigure(engine, {"weights": "int4", "group_size": "32"})
    freed -= engine.model.weight_bytes()
    offer = take_status(engine).resize
    assert offer is not None
    block = engine.cache.nbytes // BLOCKS
    assert abs(offer["gained_bytes"] - freed) <= block
    assert offer["num_blocks"] == BLOCKS + offer["gained_blocks"] == BLOCKS + offer["gained_bytes"] // block
    assert any(f"{offer['num_blocks']:,} blocks instead of {BLOCKS}" in note for note in result.notes)


def test_resized_cache_holds_what_was_offered_within_the_limit_and_requests_go_on(model: LoadedModel):
    engine = make_engine(model)
    reconfigure(engine, {"weights": "int4"})
    start(engine)
    expected = finish(engine)

    start(engine)
    offered = take_status(engine).resize
    result = resize(engine)
    assert offered is not None
    assert result.changed == {"num_blocks": (BLOCKS, offered["num_blocks"])}
    assert result.requests_in_flight == 1
    assert finish(engine) == expected
    status = take_status(engine)
    assert status.num_blocks == len(status.blocks) == offered["num_blocks"]
    assert status.memory.weights + status.memory.activations + status.memory.kv_cache <= status.memory.limit
    assert status.resize is None
    assert resize(engine).tier == "none"
    assert [event.kind for event in engine.events.since(0)].count("cache") == 1


def test_heavier_weights_take_the_memory_back_while_requests_run(model: LoadedModel):
    plain = make_engine(model)
    start(plain)
    expected = finish(plain)

    engine = make_engine(model)
    reconfigure(engine, {"weights": "int4"})
    resize(engine)
    reconfigure(engine, {"weights": "model"})
    assert engine.envelope.num_blocks == BLOCKS
    start(engine)
    assert finish(engine) == expected


def test_resize_that_runs_out_of_memory_leaves_the_cache_as_it_was(model: LoadedModel, monkeypatch: Any):
    engine = make_engine(model)
    reconfigure(engine, {"weights": "int4"})
    start(engine)
    with monkeypatch.context() as patch:
        once = failing_at(1, parts._allocate_cache, MemoryError("no memory"))
        patch.setattr(parts, "_allocate_cache", failing_at(2, once, MemoryError("nor after the collector")))
        with pytest.raises(CapacityError, match="memory ran out"):
            resize(engine)
    assert engine.envelope.num_blocks == BLOCKS
    engine.check_invariants()
    assert len(finish(engine)) == 30
    assert resize(engine).tier == "swap"


def test_weights_too_heavy_for_a_request_as_long_as_before_are_refused(model: LoadedModel):
    """Loaded in INT4, the cache took all that was left: the model's own weights would leave it too little."""
    Engine(model, EngineConfig.from_mapping({"weights": "int4", "memory_limit_gib": 0.25}))
    light = make_engine(model, weights="int4")
    assert light.envelope.max_model_len < light.model.max_position  # every block counts for the longest request
    with pytest.raises(CapacityError, match="a smaller cache would not hold a request") as refusal:
        reconfigure(light, {"weights": "model"})
    assert refusal.value.field == "weights"
