"""Native execution, one call for all layers: the same numbers as eager, when it takes over and when it steps back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import EngineConfig
from engine.core import Engine
from engine.errors import ConfigError
from engine.models import LoadedModel, load_model
from engine.reconfigure import reconfigure
from engine.sampling.params import SamplingParams
from engine.status import path_of, take_status
from kernels.cpu import build
from tests.family_cases import FALLBACKS, FAMILIES, random_prompt, save_random_model

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))

DENSE = [name for name in FAMILIES if "moe" not in name and "mixtral" not in name]


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> LoadedModel:
    return load_model(str(tiny_llama), dtype="float32", device="cpu")


def make_engine(model: LoadedModel, **knobs: Any) -> Engine:
    base = {"block_size": 4, "max_num_seqs": 8, "memory_limit_gib": 0.25, "token_budget": 24}
    return Engine(model, EngineConfig.from_mapping({**base, **knobs}))


def hidden_states(engine: Engine, prompts: list[list[int]], steps: int) -> list[torch.Tensor]:
    """The hidden states of every step's forward pass."""
    seen: list[torch.Tensor] = []
    forward = engine.executor.forward

    def watched(step: Any) -> torch.Tensor:
        seen.append(forward(step))
        return seen[-1]

    engine.executor.forward = watched  # type: ignore[method-assign]
    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), prompt, SamplingParams(max_tokens=steps + 1, ignore_eos=True))
    for _ in range(steps):
        engine.step()
        engine.check_invariants()
    return seen


@pytest.mark.parametrize("name", DENSE)
def test_every_step_computes_what_eager_computes(name: str, tmp_path: Path, tiny_llama: Path):
    """Chunks of prompts, mixed steps, decode of one to five tokens; past windows and past one tile of the cache."""
    folder = save_random_model(FAMILIES[name], tmp_path, tiny_llama)
    model = load_model(str(folder), dtype="float32", device="cpu")
    odd = [name for name, linear, _ in model.decoder.linears() if linear.format.shape[0] % build.native().panel]
    if odd:  # panels are wider where vectors are
        with pytest.raises(ConfigError, match="outputs, which are no multiple of"):
            make_engine(model, execution="native")
        pytest.skip(f"{odd[0]} does not fill the panels of this processor")
    prompts = [random_prompt(length, seed=length) for length in (150, 3, 1, 40, 17)]
    native = hidden_states(make_engine(model, execution="native"), prompts, 16)
    eager = hidden_states(make_engine(model, execution="eager"), prompts, 16)
    for ours, theirs in zip(native, eager, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("weights", ["int8", "int4", "w4a8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantized_weights_and_bfloat16_give_what_eager_gives(tiny_llama: Path, weights: str, dtype: str):
    model = load_model(str(tiny_llama), dtype=dtype, device="cpu")
    prompts = [random_prompt(100, seed=1)]  # in chunks of 24: what goes in does not depend on what came out
    knobs = {"weights": weights, "head_weights": "int8"}
    native = hidden_states(make_engine(model, execution="native", **knobs), prompts, 4)
    eager = hidden_states(make_engine(model, execution="eager", **knobs), prompts, 4)
    # The last digit of an activation decides how it is rounded to 16 bits; eager rounds to bfloat16 everywhere.
    # So it does for 8 bits, which a sum in another order may put on the other side of a half.
    bound = {"float32": 5e-3 if weights == "w4a8" else 3e-4, "bfloat16": 0.1}[dtype]
    for ours, theirs in zip(native, eager, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours.float() - theirs.float()).norm() < bound * theirs.float().norm()


def test_the_number_of_threads_changes_results_by_rounding_only(model: LoadedModel):
    prompts = [random_prompt(length, seed=length) for length in (300, 2, 30)]
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(hidden_states(make_engine(model, prefix_cache=False), prompts, 20))
    finally:
        torch.set_num_threads(before)
    # With more threads, long contexts are cut into parts whose sums are merged: the same up to that rounding.
    for other in results[1:]:
        for ours, theirs in zip(results[0], other, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_auto_follows_every_change_of_weights_and_attention(model: LoadedModel):
    engine = make_engine(model)
    prompt = random_prompt(9)
    engine.add_request("a", prompt, SamplingParams(max_tokens=60, ignore_eos=True))

    def mode() -> str:
        engine.step()
        ran = engine.steps.since(0)[-1].execution
        assert path_of(engine)["execution"] == ran
        return ran

    assert mode() == "native"
    reconfigure(engine, {"attention": "sdpa"})
    assert mode() == "eager"
    assert "attention=native" in take_status(engine).execution["reason"]
    reconfigure(engine, {"attention": "auto"})
    assert mode() == "native"
    reconfigure(engine, {"linear": "torch"})
    assert mode() == "eager"
    assert "linear=native" in take_status(engine).execution["reason"]
    reconfigure(engine, {"linear": "auto", "weights": "int4"})
    assert mode() == "native"
    assert take_status(engine).execution["failed"] == []
    reconfigure(engine, {"execution": "eager"})
    assert mode() == "eager"


def test_weights_that_another_engine_repacks_are_served_eagerly_with_the_reason(tiny_llama: Path):
    model = load_model(str(tiny_llama), dtype="float32", device="cpu")
    engine, other = make_engine(model, execution="native"), make_engine(model)
    prompt = random_prompt(9)
    expected = outputs([make_engine(model)], [prompt])
    reconfigure(other, {"linear": "torch"})
    assert outputs([engine], [prompt]) == expected
    assert {step.execution for step in engine.steps.since(0)} == {"eager"}
    status = take_status(engine).execution
    assert status["asked"] == "native"
    assert status["failed"][0]["error"] == "native execution is unavailable: it needs linear=native, not torch."
    assert path_of(engine)["execution"] == "eager"
    reconfigure(other, {"linear": "native"})
    assert outputs([engine], [prompt]) == expected
    assert engine.steps[-1].execution == "native"


def test_two_engines_on_one_model_do_not_mix_their_caches(model: LoadedModel):
    prompts = [random_prompt(20, seed=1), random_prompt(31, seed=2)]
    alone = [outputs([make_engine(model)], [prompt])[0] for prompt in prompts]
    assert outputs([make_engine(model), make_engine(model)], prompts) == alone


def outputs(engines: list[Engine], prompts: list[list[int]]) -> list[list[int]]:
    """Each engine generates for its own prompt, in turns."""
    results: list[list[int]] = [[] for _ in engines]
    for engine, prompt in zip(engines, prompts, strict=True):
        engine.add_request("a", prompt, SamplingParams(max_tokens=12, ignore_eos=True))
    while any(engine.has_unfinished() for engine in engines):
        for index, engine in enumerate(engines):
            for output in engine.step():
                results[index] = output.token_ids
    return results


@pytest.mark.parametrize(
    ("name", "knobs", "said"),
    [
        ("mixtral", {}, "mixture"),
        ("opt", {}, "fallback"),
        ("llama", {"attention": "sdpa"}, "attention=native"),
        ("llama", {"linear": "torch"}, "linear=native"),
    ],
)
def test_native_is_refused_where_it_cannot_run_with_reason_and_remedy(
    name: str, knobs: dict[str, Any], said: str, tmp_path: Path, tiny_llama: Path
):
    folder = save_random_model((FAMILIES | FALLBACKS)[name], tmp_path, tiny_llama)
    model = load_model(str(folder), dtype="float32", device="cpu")
    with pytest.raises(ConfigError) as refused:
        make_engine(model, execution="native", **knobs)
    assert refused.value.field == "execution"
    assert said in refused.value.message
    assert "auto" in (refused.value.remedy or "")
    engine = make_engine(model, **knobs)
    assert path_of(engine)["execution"] == "eager"
