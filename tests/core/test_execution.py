"""Execution modes on tiny models: what the compiled path computes, how it is prepared, cancelled, and how it fails."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import EngineConfig
from engine.core import Engine
from engine.errors import ConfigError
from engine.execution import compiler, preparation
from engine.execution.base import TokenRange
from engine.execution.blueprint import draw
from engine.execution.compiled import CompiledMode
from engine.execution.packages import packages_dir
from engine.models import LoadedModel, load_model
from engine.reconfigure import reconfigure
from engine.sampling.params import SamplingParams
from engine.status import path_of, take_status
from tests.family_cases import FAMILIES, save_random_model
from tests.support import transformers_greedy, wait_until_prepared

pytestmark = pytest.mark.slow  # the compiler of torch takes seconds a shape

OUTPUT_TOKENS = 24
PROMPTS = [[(7 * row + 3 * place) % 200 + 5 for place in range(length)] for row, length in enumerate((1, 3, 9, 30, 55))]
PROMPTS.append([20, 21, 22, 23] * 8)  # n-grams to speculate on


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> LoadedModel:
    return load_model(str(tiny_llama), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def expected(tiny_llama: Path) -> list[list[int]]:
    """What transformers generates for each prompt alone."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    return transformers_greedy(reference, PROMPTS, OUTPUT_TOKENS)


def make_engine(model: LoadedModel, **knobs: Any) -> Engine:
    base = {"block_size": 4, "max_num_seqs": 8, "memory_limit_gib": 0.25, "token_budget": 24, "execution": "eager"}
    return Engine(model, EngineConfig.from_mapping({**base, **knobs}))


def compiled_engine(model: LoadedModel, **knobs: Any) -> Engine:
    engine = wait_until_prepared(make_engine(model, execution="compiled", **knobs))
    assert take_status(engine).execution["failed"] == []
    return engine


def generate(
    engine: Engine, prompts: Sequence[list[int]], toggles: Mapping[int, Mapping[str, Any]] | None = None
) -> list[list[int]]:
    """Greedy outputs; prompts join one step after the other, ``toggles[n]`` is applied before step n."""
    results: dict[int, list[int]] = {}
    for step in range(1000):
        if step < len(prompts):
            engine.add_request(str(step), prompts[step], SamplingParams(max_tokens=OUTPUT_TOKENS))
        if toggles and step in toggles:
            reconfigure(engine, toggles[step])
            wait_until_prepared(engine)
        for output in engine.step():
            if output.finished:
                results[int(output.request_id)] = output.token_ids
        engine.check_invariants()
        if step >= len(prompts) and not engine.has_unfinished():
            return [results[index] for index in range(len(prompts))]
    raise AssertionError("the requests never finished")


def modes(engine: Engine) -> list[str]:
    return [step.execution for step in engine.steps.since(0)]


def events(engine: Engine) -> list[str]:
    return [event.summary for event in engine.events.since(0) if event.kind == "execution"]


# -- what is computed --------------------------------------------------------------------------------------


@pytest.mark.parametrize("speculation", ["off", "ngram"])
@pytest.mark.parametrize("attention", ["sdpa", "reference"])
def test_compiled_output_is_token_identical_to_transformers_and_to_eager(
    model: LoadedModel, expected: list[list[int]], attention: str, speculation: str
):
    engine = compiled_engine(model, attention=attention, speculation=speculation)
    assert generate(engine, PROMPTS) == expected  # the budget of 24 tokens cuts the long prompts into chunks
    assert set(modes(engine)) == {"compiled"}
    sizes = {s.prefill_tokens + s.decode_tokens + s.draft_tokens for s in engine.steps.since(0)}
    assert min(sizes) == 1
    assert max(sizes) == 24
    eager = make_engine(model, attention=attention, speculation=speculation)
    assert generate(eager, PROMPTS) == expected
    assert set(modes(eager)) == {"eager"}


def test_compiled_and_eager_toggled_in_mid_flight_change_no_token(model: LoadedModel, expected: list[list[int]]):
    engine = make_engine(model)
    toggles = {4: {"execution": "compiled"}, 9: {"execution": "eager"}, 12: {"execution": "compiled"}}
    assert generate(engine, PROMPTS, toggles) == expected
    used = modes(engine)
    assert set(used[:4] + used[9:12]) == {"eager"}
    assert set(used[4:9] + used[12:]) == {"compiled"}


def test_weights_swapped_while_compiled_run_by_their_own_programs_and_come_back(
    tiny_llama: Path, expected: list[list[int]]
):
    model = load_model(str(tiny_llama), dtype="float32", device="cpu")
    eager = make_engine(model, weights="int8")
    lossy = generate(eager, PROMPTS)
    assert lossy != expected
    reconfigure(eager, {"weights": "model"})
    engine = compiled_engine(model)
    reconfigure(engine, {"weights": "int8"})
    wait_until_prepared(engine)
    assert generate(engine, PROMPTS) == lossy
    reconfigure(engine, {"weights": "model"})
    wait_until_prepared(engine)
    assert generate(engine, PROMPTS) == expected
    assert set(modes(engine)) == {"compiled"}


def test_weights_swapped_behind_the_engines_back_never_run_by_the_old_program(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
):
    """Two engines share a model; one swaps its weights. The other one notices by itself."""
    model = load_model(str(tiny_llama), dtype="float32", device="cpu")
    first, second = compiled_engine(model), make_engine(model)
    reconfigure(second, {"weights": "int8"})
    with monkeypatch.context() as patch:
        patch.setattr(CompiledMode, "poll", lambda mode: None)  # however quickly the new program is found on disk
        assert generate(first, PROMPTS) == generate(second, PROMPTS)
    assert set(modes(first)) == {"eager"}, "nothing was prepared for the new weights yet"
    wait_until_prepared(first)
    assert "int8" in first.executor._prepared_for
    assert generate(first, PROMPTS) == generate(second, PROMPTS)
    assert modes(first)[-1] == "compiled"
    first.close()


def test_compiled_steps_write_the_same_slots_as_eager_and_no_other(model: LoadedModel):
    """Bit by bit where nothing may be written, to rounding where something is."""
    caches = {}
    for execution in ("eager", "compiled"):
        engine = wait_until_prepared(make_engine(model, execution=execution, attention="sdpa"))
        for tensor in (*engine.cache.keys, *engine.cache.values):
            tensor.fill_(12345.0)
        generate(engine, PROMPTS)
        caches[execution] = torch.stack([*engine.cache.keys, *engine.cache.values])
    untouched = caches["eager"] == 12345.0
    assert 0.2 < untouched.float().mean() < 1.0
    assert torch.equal(untouched, caches["compiled"] == 12345.0)
    torch.testing.assert_close(caches["compiled"], caches["eager"], rtol=1e-3, atol=1e-3)


def test_two_engines_in_one_process_do_not_mix(model: LoadedModel, expected: list[list[int]], tmp_path: Path):
    other = compiled_engine(model, block_size=8, attention="reference", max_num_seqs=4)
    engine = compiled_engine(model)
    for index, prompt in enumerate(PROMPTS):
        for one in (engine, other):
            one.add_request(str(index), prompt, SamplingParams(max_tokens=OUTPUT_TOKENS))
    results: dict[str, dict[str, list[int]]] = {"engine": {}, "other": {}}
    while engine.has_unfinished() or other.has_unfinished():
        for name, one in (("engine", engine), ("other", other)):
            results[name] |= {output.request_id: output.token_ids for output in one.step()}
    for name in results:
        assert [results[name][str(index)] for index in range(len(PROMPTS))] == expected
    assert set(modes(engine) + modes(other)) == {"compiled"}


@pytest.mark.parametrize("family", ["gemma3"])
def test_layers_that_differ_only_in_window_and_angles_share_a_program(family: str, tmp_path: Path, tiny_llama: Path):
    folder = save_random_model(FAMILIES[family], tmp_path, tiny_llama)
    model = load_model(str(folder), dtype="float32", device="cpu")
    blueprint = draw(model.decoder, model.device)  # type: ignore[arg-type]
    assert len(blueprint.kinds) == 1
    assert len(set(model.decoder.layer_windows)) == 2
    compiled = compiled_engine(model)
    assert generate(compiled, PROMPTS) == generate(make_engine(model), PROMPTS)
    assert set(modes(compiled)) == {"compiled"}


# -- preparation -------------------------------------------------------------------------------------------


@pytest.fixture
def slow_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Nothing on disk, and a compiler that waits until it is released."""
    import threading

    monkeypatch.setenv("HEADROOM_HOME", str(tmp_path))
    release, closed, entered = threading.Event(), threading.Event(), threading.Event()

    class Slow(compiler.CompilerProcess):
        def compile(self, wanted: TokenRange) -> None:
            entered.set()
            while not release.wait(0.01):
                if self._closed:
                    closed.set()
                    raise compiler.CompileError("cancelled")
            raise compiler.CompileError("released without a program")

    monkeypatch.setattr(preparation, "CompilerProcess", Slow)
    return release, closed, entered


def test_eager_serves_while_compiled_is_prepared_and_the_progress_is_told(
    model: LoadedModel, expected: list[list[int]], slow_compiler: Any
):
    engine = make_engine(model)
    began = time.monotonic()
    result = reconfigure(engine, {"execution": "compiled"})
    assert time.monotonic() - began < 1.0
    assert result.changed == {"execution": ("eager", "compiled")}
    assert generate(engine, PROMPTS) == expected
    assert set(modes(engine)) == {"eager"}
    status = take_status(engine).execution
    assert (status["preparing"]["done"], status["preparing"]["total"]) == (0, 2)
    assert status["preparing"]["current"] == "1 token"
    assert "not prepared" in status["reason"]
    assert path_of(engine)["execution"] == "eager; preparing compiled"
    engine.close()


def test_going_back_to_eager_cancels_the_preparation(model: LoadedModel, slow_compiler: Any):
    _, closed, entered = slow_compiler
    engine = make_engine(model, execution="compiled")
    assert entered.wait(30)
    reconfigure(engine, {"execution": "eager"})
    assert closed.wait(5)
    assert take_status(engine).execution["preparing"] is None
    assert events(engine) == ["preparation cancelled"]


def test_an_engine_that_is_dropped_ends_its_preparation(model: LoadedModel, slow_compiler: Any):
    _, closed, entered = slow_compiler
    engine = make_engine(model, execution="compiled")
    assert entered.wait(30)
    del engine
    import gc

    gc.collect()
    assert closed.wait(5)


def test_a_real_compiling_process_ends_with_its_engine(
    model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HEADROOM_HOME", str(tmp_path))
    engine = make_engine(model, execution="compiled")
    running = engine.executor.mode.preparation  # type: ignore[attr-defined]
    assert running is not None
    end = time.monotonic() + 30
    while running._compiler is None or running._compiler._process is None:
        assert time.monotonic() < end
        time.sleep(0.01)
    process = running._compiler._process
    assert process.poll() is None
    engine.close()
    assert process.poll() is not None
    running.join(5)
    assert not running.running
    assert list(packages_dir(draw(model.decoder, model.device), model.device).parent.glob("*/*.json")) == []


def test_a_failed_shape_stays_eager_with_the_reason_visible(
    model: LoadedModel, expected: list[list[int]], slow_compiler: Any
):
    release, _, _ = slow_compiler
    release.set()
    engine = wait_until_prepared(make_engine(model, execution="compiled"))
    assert generate(engine, PROMPTS) == expected
    assert set(modes(engine)) == {"eager"}
    status = take_status(engine).execution
    assert [failure["tokens"] for failure in status["failed"]] == ["1", "2–2048"]
    assert "released without a program" in status["reason"]
    assert "released without a program" in path_of(engine)["execution"]
    assert any("1 tokens stay eager" in summary for summary in events(engine))


def test_a_layer_that_cannot_be_traced_is_reported_by_the_real_compiler(tmp_path: Path, tiny_llama: Path):
    """A mixture asks the host which experts have tokens: no program can hold that."""
    folder = save_random_model(FAMILIES["mixtral"], tmp_path, tiny_llama)
    engine = make_engine(load_model(str(folder), dtype="float32", device="cpu"), execution="compiled")
    wait_until_prepared(engine)
    failed = take_status(engine).execution["failed"]
    assert [failure["tokens"] for failure in failed] == ["1", "2–2048"]
    assert all(failure["error"] for failure in failed)
    assert generate(engine, PROMPTS[:2])
    assert set(modes(engine)) == {"eager"}


def test_the_second_preparation_comes_from_disk(model: LoadedModel):
    compiled_engine(model)
    again = compiled_engine(model)
    assert [summary.split("(")[1].split(",")[0] for summary in events(again)] == ["from disk", "from disk"]
    assert all(event.detail["seconds"] < 5 for event in again.events.since(0) if event.kind == "execution")


@pytest.mark.parametrize("linear", ["torch", "native"])
@pytest.mark.parametrize("weights", ["model", "int8", "int4", "w4a8", "w8a8", "fp8"])
def test_all_layers_of_a_uniform_model_share_one_program_in_every_format(tiny_llama: Path, weights: str, linear: str):
    model = load_model(str(tiny_llama), dtype="float32", device="cpu")
    make_engine(model, weights=weights, linear=linear)
    assert len(draw(model.decoder, model.device).kinds) == 1  # type: ignore[arg-type]


def test_other_weights_of_the_same_shape_need_no_other_program(model: LoadedModel, tmp_path: Path):
    """The programs take weights as inputs: what is on disk holds none."""
    here = draw(model.decoder, model.device)
    there = dataclasses.replace(here, weights=tuple(tuple(t + 1 for t in layer) for layer in here.weights))
    assert packages_dir(there, model.device) == packages_dir(here, model.device)


# -- refusals ----------------------------------------------------------------------------------------------


def test_graphs_are_refused_on_a_cpu_with_the_remedy(model: LoadedModel):
    engine = make_engine(model)
    with pytest.raises(ConfigError) as refused:
        reconfigure(engine, {"execution": "graphs"})
    assert refused.value.field == "execution"
    assert "CUDA" in refused.value.message
    assert "compiled" in (refused.value.remedy or "")
    assert engine.config.execution == "eager"


def test_compiled_without_a_compiler_is_refused_with_the_remedy(model: LoadedModel, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    engine = make_engine(model)
    with pytest.raises(ConfigError) as refused:
        reconfigure(engine, {"execution": "compiled"})
    assert refused.value.field == "execution"
    assert "apt install g++" in (refused.value.remedy or "")
    with pytest.raises(ConfigError):
        make_engine(model, execution="compiled")


def test_compiled_is_refused_for_a_model_of_the_fallback(tmp_path: Path, tiny_llama: Path):
    from tests.family_cases import FALLBACKS

    folder = save_random_model(next(iter(FALLBACKS.values())), tmp_path, tiny_llama)
    model = load_model(str(folder), dtype="float32", device="cpu")
    with pytest.raises(ConfigError) as refused:
        make_engine(model, execution="compiled")
    assert refused.value.field == "execution"


def test_the_compiler_keeps_its_results_below_the_home(model: LoadedModel):
    compiled_engine(model)
    home = Path(os.environ.get("HEADROOM_HOME") or "~/.cache/headroom").expanduser()
    assert list((home / "cache" / "compiled").glob("*/1-1.json"))
