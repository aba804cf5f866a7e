"""Allocations that fail: at a swap of weights and at a load, at several points of each."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import parts, sizing
from engine.config import EngineConfig
from engine.core import Engine
from engine.errors import CapacityError
from engine.layers.linear import Linear
from engine.models import load_model, weight_reader, weight_swap
from engine.models.weight_making import CheckpointRows
from engine.outputs import RequestOutput
from engine.reconfigure import reconfigure
from engine.sampling.params import SamplingParams
from engine.server.host import EngineHost
from engine.worker.loop import EngineLoop

FAILURES = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    MemoryError("Unable to allocate 2.00 GiB for an array"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: 2 bytes"),
]
KNOBS = {"block_size": 4, "max_num_seqs": 8, "memory_limit_gib": 0.25, "dtype": "float32", "device": "cpu"}
PROMPT = [72, 101, 108, 108, 111]


def failing_at(call: int, function: Callable[..., Any], problem: Exception) -> Callable[..., Any]:
    """``function`` that raises at its ``call``-th call, counted from 1, and works again after it."""
    calls = 0

    def wrapper(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise problem
        return function(*arguments, **named)

    return wrapper


def make_engine(folder: Path, **knobs: Any) -> Engine:
    config = EngineConfig.from_mapping({**KNOBS, "model": str(folder), **knobs})
    return Engine(load_model(str(folder), dtype="float32", device="cpu"), config)


def finish(engine: Engine) -> RequestOutput:
    while True:
        for output in engine.step():
            if output.finished:
                return output
        engine.check_invariants()


@pytest.fixture
def expected(tiny_llama: Path) -> list[int]:
    engine = make_engine(tiny_llama)
    engine.add_request("r", PROMPT, SamplingParams(max_tokens=30, ignore_eos=True))
    return finish(engine).token_ids


# Where a swap can run out: making the first or a later layer's weights, or putting them in place.
SWAP_POINTS: list[tuple[Any, str, int]] = [(weight_swap, "make_weight", 1), (weight_swap, "make_weight", 6)]
SWAP_POINTS += [(Linear, "swap", 1), (Linear, "swap", 5)]


@pytest.mark.parametrize("problem", FAILURES, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize(("owner", "name", "call"), SWAP_POINTS)
def test_swap_that_runs_out_of_memory_is_explained_and_requests_go_on_with_the_old_weights(
    tiny_llama: Path,
    expected: list[int],
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    call: int,
    problem: Exception,
):
    engine = make_engine(tiny_llama)
    engine.add_request("r", PROMPT, SamplingParams(max_tokens=30, ignore_eos=True))
    for _ in range(5):
        engine.step()
    before = engine.config, engine.model.weights_format(), engine.model.weights_path()
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing_at(call, getattr(owner, name), problem))
        with pytest.raises(CapacityError, match=r"GiB next to the current 0\.\d+ GiB") as refusal:
            reconfigure(engine, {"weights": "int8", "batching": "static"})
    assert refusal.value.field == "weights"
    assert refusal.value.remedy
    assert (engine.config, engine.model.weights_format(), engine.model.weights_path()) == before
    assert finish(engine).token_ids == expected
    assert reconfigure(engine, {"weights": "int8"}).tier == "swap"  # and with memory it works


def test_error_that_is_not_about_memory_passes_a_swap_unchanged(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch):
    engine = make_engine(tiny_llama)
    monkeypatch.setattr(Linear, "swap", failing_at(3, Linear.swap, RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        reconfigure(engine, {"weights": "int8"})
    assert engine.model.weights_format() == "model"
    assert engine.config.weights == "model"


def test_swap_that_runs_out_of_memory_in_a_served_engine_leaves_it_serving(
    tiny_llama: Path, expected: list[int], monkeypatch: pytest.MonkeyPatch
):
    loop = EngineLoop(make_engine(tiny_llama))
    loop.start()
    done = threading.Event()
    last: list[RequestOutput] = []

    def receive(output: RequestOutput) -> None:
        if output.finished:
            last.append(output)
            done.set()

    loop.submit(PROMPT, SamplingParams(max_tokens=30, ignore_eos=True), on_output=receive)
    monkeypatch.setattr(Linear, "swap", failing_at(4, Linear.swap, FAILURES[0]))
    with pytest.raises(CapacityError):
        loop.reconfigure({"weights": "int8"})
    assert done.wait(30)
    assert last[0].token_ids == expected
    assert loop.alive
    loop.stop()


def test_tensors_made_before_memory_ran_out_are_free_again(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch):
    made: list[weakref.ref[Any]] = []
    original = weight_swap.make_weight

    def remember(*arguments: Any) -> Any:
        if len(made) == 5:
            raise FAILURES[0]
        format = original(*arguments)
        made.append(weakref.ref(format))
        return format

    engine = make_engine(tiny_llama)
    monkeypatch.setattr(weight_swap, "make_weight", remember)
    with pytest.raises(CapacityError) as refusal:
        reconfigure(engine, {"weights": "int8"})
    gc.collect()
    assert refusal.value.message  # the error is still there, what it was about is not
    assert len(made) == 5
    assert all(reference() is None for reference in made)


# Where a load can run out: reading a tensor, quantizing, allocating the cache.
LOAD_POINTS = [(CheckpointRows, "read", 1, "model"), (CheckpointRows, "read", 9, "model")]
LOAD_POINTS += [(weight_reader, "make_weight", 3, "model"), (parts, "KVCache", 1, "memory_limit_gib")]


@pytest.mark.parametrize("problem", FAILURES, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize(("owner", "name", "call", "field"), LOAD_POINTS)
def test_load_that_runs_out_of_memory_names_what_did_not_fit(
    tiny_llama: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    call: int,
    field: str,
    problem: Exception,
):
    monkeypatch.setattr(owner, name, failing_at(call, getattr(owner, name), problem))
    config = EngineConfig.from_mapping({**KNOBS, "model": str(tiny_llama), "weights": "int8"})
    with pytest.raises(CapacityError, match="GiB") as refusal:
        Engine.load(config)
    assert refusal.value.field == field
    assert refusal.value.remedy


@pytest.mark.parametrize(("owner", "name", "call", "field"), LOAD_POINTS)
def test_load_that_runs_out_of_memory_brings_the_former_model_back(
    tiny_llama: Path,
    expected: list[int],
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    call: int,
    field: str,
):
    host = EngineHost()
    config = EngineConfig.from_mapping({**KNOBS, "model": str(tiny_llama), "batching": "static"})
    host.load(config)
    wait_until(lambda: host.state().phase == "ready")
    monkeypatch.setattr(owner, name, failing_at(call, getattr(owner, name), FAILURES[2]))
    host.load(config.with_changes({"weights": "int8"}))
    wait_until(lambda: host.state().error is not None and host.state().phase == "ready")
    error = host.state().error
    assert error is not None
    assert error["field"] == field
    assert "GiB" in str(error["message"])
    assert host.loop.engine.config == config
    finished: list[RequestOutput] = []
    done = threading.Event()

    def receive(output: RequestOutput) -> None:
        if output.finished:
            finished.append(output)
            done.set()

    host.loop.submit(PROMPT, SamplingParams(max_tokens=30, ignore_eos=True), on_output=receive)
    assert done.wait(30)
    assert finished[0].token_ids == expected
    assert host.close()


def wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end, "not so within 30 s"
        time.sleep(0.01)


def test_only_failed_allocations_count_as_out_of_memory():
    assert all(sizing.is_out_of_memory(problem) for problem in FAILURES)
    assert not sizing.is_out_of_memory(RuntimeError("shape mismatch"))
    assert not sizing.is_out_of_memory(ValueError("DefaultCPUAllocator: can't allocate memory"))
