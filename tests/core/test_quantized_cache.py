"""A KV cache in 8 or 4 bits: what it changes, what it must not, and the swap of it under requests in flight."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import parts
from engine.config import EngineConfig
from engine.core import Engine
from engine.errors import CapacityError, ConfigError
from engine.layers.linear import Linear
from engine.models import LoadedModel, load_model
from engine.outputs import RequestOutput
from engine.reconfigure import reconfigure
from engine.sampling.params import SamplingParams
from engine.status import path_of
from kernels.cpu import build
from tests.core.test_out_of_memory import FAILURES, failing_at
from tests.family_cases import random_prompt
from tests.support import engine_with_blocks

QUANTIZED = ["fp8", "int8", "int4"]
needs_compiler = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> LoadedModel:
    return load_model(str(tiny_llama), dtype="float32", device="cpu")


def make_engine(model: LoadedModel, **knobs: Any) -> Engine:
    base = {"block_size": 4, "max_num_seqs": 8, "memory_limit_gib": 0.25}
    return Engine(model, EngineConfig.from_mapping({**base, **knobs}))


def add(engine: Engine, prompt: list[int], count: int, name: str = "r") -> None:
    engine.add_request(name, prompt, SamplingParams(max_tokens=count, ignore_eos=True))


def finish(engine: Engine) -> dict[str, RequestOutput]:
    finished = {}
    while engine.has_unfinished():
        for output in engine.step():
            if output.finished:
                finished[output.request_id] = output
        engine.check_invariants()
    return finished


def hidden_states(engine: Engine, prompts: list[list[int]], steps: int) -> list[torch.Tensor]:
    """What the layers give in each step, with the same tokens going in whatever comes out."""
    seen: list[torch.Tensor] = []
    forward = engine.executor.forward

    def watched(step: Any) -> torch.Tensor:
        seen.append(forward(step))
        return seen[-1]

    engine.executor.forward = watched  # type: ignore[method-assign]
    for index, prompt in enumerate(prompts):
        add(engine, prompt, 1, str(index))
    for _ in range(steps):
        engine.step()
    return seen


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm())


# -- what is computed -------------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kv_dtype", QUANTIZED)
def test_native_execution_computes_what_eager_computes_over_the_same_format(
    tiny_llama: Path, kv_dtype: str, dtype: str
):
    model = load_model(str(tiny_llama), dtype=dtype, device="cpu")
    prompts = [random_prompt(length, seed=length) for length in (100, 3, 41)]
    ways = [{"execution": "native"}, {"execution": "eager", "attention": "reference"}]
    native, eager = (
        hidden_states(make_engine(model, kv_dtype=kv_dtype, token_budget=24, **way), prompts, 6) for way in ways
    )
    # Eager rounds to bfloat16 everywhere, and the last digit of a key decides to which of the format's values it goes.
    bound = 1e-3 if dtype == "float32" else {"fp8": 0.2, "int8": 0.1, "int4": 0.35}[kv_dtype]
    assert all(distance(ours, theirs) < bound for ours, theirs in zip(native, eager, strict=True))


@pytest.mark.parametrize("attention", ["auto", "sdpa", "reference"])
@pytest.mark.parametrize("kv_dtype", QUANTIZED)
def test_a_token_sees_the_same_cache_whether_its_prompt_came_at_once_in_chunks_or_was_known(
    model: LoadedModel, kv_dtype: str, attention: str
):
    """Fresh keys and values are read as they are stored, never as they were computed."""
    prompt = random_prompt(97, seed=5)
    knobs = {"kv_dtype": kv_dtype, "attention": attention, "execution": "auto" if attention == "auto" else "eager"}
    whole = hidden_states(make_engine(model, **knobs), [prompt], 1)[-1][-1]
    chunks = hidden_states(make_engine(model, **knobs, token_budget=10), [prompt], 10)[-1][-1]
    engine = make_engine(model, **knobs)
    add(engine, prompt, 1)
    finish(engine)
    known = hidden_states(engine, [prompt], 1)[-1]
    assert known.shape[0] < 4, "the second time all but the last tokens are known"
    step = {"fp8": 1 / 16, "int8": 1 / 254, "int4": 1 / 30}[kv_dtype]
    for other in (chunks, known[-1]):
        assert distance(other, whole) < 0.1 * step, "more than a stray rounding"


@pytest.mark.parametrize(("kv_dtype", "least", "most"), [("int8", 1e-5, 5e-3), ("fp8", 5e-3, 0.1), ("int4", 0.1, 0.6)])
def test_quantization_moves_the_distribution_and_less_with_more_bits(
    model: LoadedModel, kv_dtype: str, least: float, most: float
):
    text = random_prompt(120, seed=3)
    exact = make_engine(model).prompt_logits(text).log_softmax(-1)
    ours = make_engine(model, kv_dtype=kv_dtype).prompt_logits(text).log_softmax(-1)
    divergence = float((exact.exp() * (exact - ours)).sum(-1).mean())
    assert least < divergence < most


# -- the swap -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_dtype", QUANTIZED)
def test_a_request_in_flight_goes_on_as_if_its_text_had_come_to_an_engine_of_that_format(
    model: LoadedModel, kv_dtype: str
):
    engine = make_engine(model)
    prompt = random_prompt(30, seed=1)
    add(engine, prompt, 40)
    for _ in range(12):
        engine.step()
    written = list(engine.streams["r"].request.output_token_ids)
    result = reconfigure(engine, {"kv_dtype": kv_dtype})
    assert result.tier == "swap"
    assert any("1 running requests are computed again" in note for note in result.notes)
    output = finish(engine)["r"]
    assert len(output.token_ids) == 40
    assert output.token_ids[: len(written)] == written
    assert output.num_preemptions == 1
    fresh = make_engine(model, kv_dtype=kv_dtype)
    add(fresh, prompt + written, 40 - len(written))
    assert output.token_ids[len(written) :] == finish(fresh)["r"].token_ids


def test_the_same_memory_holds_more_tokens_and_gives_them_back(model: LoadedModel):
    engine = engine_with_blocks(model, 24, block_size=4, max_num_seqs=16)
    before, bytes_before = engine.envelope, engine.cache.nbytes
    reconfigure(engine, {"kv_dtype": "int8"})
    assert engine.envelope.num_blocks == engine.scheduler.pool.num_blocks
    assert engine.envelope.num_blocks > 3 * before.num_blocks  # of float32, less the scales
    assert engine.envelope.max_model_len > before.max_model_len
    assert engine.cache.nbytes <= bytes_before * 1.05
    add(engine, random_prompt(150), 20)  # would not have fitted
    assert len(finish(engine)["r"].token_ids) == 20
    reconfigure(engine, {"kv_dtype": "model"})
    assert engine.envelope == before
    assert engine.cache.nbytes == bytes_before


def test_prefixes_known_in_one_format_are_not_taken_for_those_of_another(model: LoadedModel):
    engine = make_engine(model)
    prompt = random_prompt(40, seed=2)
    add(engine, prompt, 2)
    finish(engine)
    reconfigure(engine, {"kv_dtype": "int8"})
    assert engine.scheduler.pool.num_cached == 0
    add(engine, prompt, 2)
    assert finish(engine)["r"].num_cached_tokens == 0
    add(engine, prompt, 2)
    assert finish(engine)["r"].num_cached_tokens > 30


def test_a_format_under_which_a_request_in_flight_could_not_finish_is_refused_and_nothing_changes(model: LoadedModel):
    engine = engine_with_blocks(model, 24, block_size=4, max_num_seqs=16, kv_dtype="model")
    reconfigure(engine, {"kv_dtype": "int8"})
    add(engine, random_prompt(80), 60)
    for _ in range(3):
        engine.step()
    before = engine.config, engine.envelope, engine.totals["preemptions"]
    with pytest.raises(CapacityError, match="may grow to 140 tokens") as refusal:
        reconfigure(engine, {"kv_dtype": "model", "batching": "static"})
    assert refusal.value.field == "kv_dtype"
    assert refusal.value.remedy
    assert (engine.config, engine.envelope, engine.totals["preemptions"]) == before
    assert len(finish(engine)["r"].token_ids) == 60


def refuse_quantized(make: Any, problem: Exception, **shape: Any) -> Any:
    if shape["format"].name != "model":
        raise problem
    return make(**shape)


def test_an_swap_that_finds_memory_at_the_second_try_goes_through(model: LoadedModel, monkeypatch: pytest.MonkeyPatch):
    engine = make_engine(model)
    add(engine, random_prompt(20), 8)
    engine.step()
    monkeypatch.setattr(parts, "KVCache", failing_at(1, parts.KVCache, FAILURES[0]))
    reconfigure(engine, {"kv_dtype": "int8"})
    assert engine.cache.format.name == "int8"
    assert len(finish(engine)["r"].token_ids) == 8


@pytest.mark.parametrize("problem", FAILURES, ids=lambda p: type(p).__name__)
def test_an_swap_that_runs_out_of_memory_brings_the_former_format_back(
    model: LoadedModel, problem: Exception, monkeypatch: pytest.MonkeyPatch
):
    prompt = random_prompt(20, seed=7)
    engine = make_engine(model)
    add(engine, prompt, 30)
    expected = finish(engine)["r"].token_ids
    add(engine, prompt, 30)
    for _ in range(5):
        engine.step()
    before = engine.config, engine.envelope
    with monkeypatch.context() as patch:
        patch.setattr(parts, "KVCache", lambda make=parts.KVCache, **shape: refuse_quantized(make, problem, **shape))
        with pytest.raises(CapacityError, match="GiB of KV cache") as refusal:
            reconfigure(engine, {"kv_dtype": "int8", "batching": "static"})
    assert refusal.value.remedy
    assert (engine.config, engine.envelope) == before
    assert path_of(engine)["kv_cache"] == "float32"
    assert finish(engine)["r"].token_ids == expected
    assert reconfigure(engine, {"kv_dtype": "int8"}).tier == "swap"  # and with memory it works


def test_weights_that_cannot_be_swapped_with_it_take_the_cache_back_too(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
):
    model = load_model(str(tiny_llama), dtype="float32", device="cpu")
    prompt = random_prompt(20, seed=7)
    engine = make_engine(model)
    add(engine, prompt, 30)
    expected = finish(engine)["r"].token_ids
    add(engine, prompt, 30)
    for _ in range(5):
        engine.step()
    before = engine.config, engine.envelope
    with monkeypatch.context() as patch:
        patch.setattr(Linear, "swap", failing_at(4, Linear.swap, FAILURES[0]))
        with pytest.raises(CapacityError, match="weights") as refusal:
            reconfigure(engine, {"kv_dtype": "int8", "weights": "int8"})
    assert refusal.value.field == "weights"
    assert (engine.config, engine.envelope, engine.model.weights_format()) == (*before, "model")
    assert engine.cache.format.name == "model"
    assert finish(engine)["r"].token_ids == expected
    assert set(reconfigure(engine, {"kv_dtype": "int8", "weights": "int8"}).changed) == {"kv_dtype", "weights"}
    add(engine, prompt, 5)
    assert len(finish(engine)["r"].token_ids) == 5


def test_the_old_cache_is_gone_before_the_new_one_is_made(model: LoadedModel, monkeypatch: pytest.MonkeyPatch):
    engine = make_engine(model)
    add(engine, random_prompt(20), 8)
    engine.step()
    old = weakref.ref(engine.cache)
    make = parts.KVCache
    alive: list[bool] = []

    def watched(**shape: Any) -> Any:
        alive.append(old() is not None)
        return make(**shape)

    monkeypatch.setattr(parts, "KVCache", watched)
    reconfigure(engine, {"kv_dtype": "fp8"})
    assert alive == [False]
    assert len(finish(engine)["r"].token_ids) == 8


@pytest.mark.parametrize("batching", ["continuous", "static"])
def test_swaps_again_and_again_lose_no_request_and_no_block(model: LoadedModel, batching: str):
    engine = engine_with_blocks(model, 40, block_size=4, max_num_seqs=16, batching=batching)
    for index in range(10):
        add(engine, random_prompt(3 + 5 * index, seed=index), 20, str(index))
    formats = ["int8", "model", "int4", "fp8", "model"]
    finished: dict[str, RequestOutput] = {}
    turn = 0
    while engine.has_unfinished():
        for output in engine.step():
            if output.finished:
                finished[output.request_id] = output
        turn += 1
        if turn % 7 == 0 and turn < 100:
            reconfigure(engine, {"kv_dtype": formats[turn // 7 % len(formats)]})
        engine.check_invariants()
    assert sorted(len(output.token_ids) for output in finished.values()) == [20] * 10
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_blocks


def test_a_format_that_packs_more_dimensions_than_divide_a_head_is_refused_by_name(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
):
    engine = make_engine(model)
    monkeypatch.setattr(engine.model.decoder, "head_dim", 15)
    with pytest.raises(ConfigError, match="15") as refusal:
        reconfigure(engine, {"kv_dtype": "int4"})
    assert refusal.value.field == "kv_dtype"
    assert engine.config.kv_dtype == "model"
