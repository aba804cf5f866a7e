"""Where every layer has a window, the cache keeps the window: what lies behind it serves other requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.core import Engine
from engine.models import LoadedModel, load_model
from engine.sampling.params import SamplingParams
from kernels.cpu import build
from tests.family_cases import FAMILIES, random_prompt, save_random_model
from tests.support import engine_with_blocks, transformers_greedy

needs_compiler = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))
PROMPTS = [random_prompt(length, seed=length) for length in (41, 57, 66, 70)]
COUNT = 40
NATIVE = pytest.param({"attention": "native"}, marks=needs_compiler, id="native")
EAGER = pytest.param({"attention": "native", "execution": "eager"}, marks=needs_compiler, id="native, eager")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any, tiny_llama: Path) -> Path:
    return save_random_model(FAMILIES["mistral, window"], tmp_path_factory.mktemp("window"), tiny_llama)


@pytest.fixture(scope="module")
def model(folder: Path) -> LoadedModel:
    return load_model(str(folder), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[int]]:
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    return transformers_greedy(reference, PROMPTS, COUNT)


def poison_free_blocks(engine: Engine) -> None:
    """Whoever still read a block that was given back would compute NaN, and no token of it would be right."""
    free = [index for index, letter in enumerate(engine.scheduler.pool.block_states()) if letter == "."]
    for tensor in (*engine.cache.keys, *engine.cache.values):
        tensor[free] = torch.nan


def generate(engine: Engine) -> list[list[int]]:
    for index, prompt in enumerate(PROMPTS):
        engine.add_request(str(index), prompt, SamplingParams(max_tokens=COUNT))
    results: dict[str, list[int]] = {}
    while engine.has_unfinished():
        for output in engine.step():
            results[output.request_id] = output.token_ids
        engine.check_invariants()
        poison_free_blocks(engine)
    return [results[str(index)] for index in range(len(PROMPTS))]


@pytest.mark.parametrize(
    "knobs",
    [
        NATIVE,
        EAGER,
        pytest.param({"attention": "sdpa"}, id="sdpa"),
        pytest.param({"attention": "reference"}, id="reference"),
        pytest.param({"attention": "sdpa", "speculation": "ngram", "ngram_min": 1}, id="drafts"),
        pytest.param({"attention": "sdpa", "chunked_prefill": False}, id="whole prompts"),
        pytest.param({"attention": "sdpa", "preemption": False}, id="no preemption"),
        pytest.param({"attention": "sdpa", "prefix_cache": False}, id="no prefix cache"),
    ],
)
def test_four_requests_share_a_cache_that_would_hold_one_and_a_half_without_windows(
    model: LoadedModel, expected: list[list[int]], knobs: dict[str, Any]
):
    budget = 128 if knobs.get("chunked_prefill") is False else 24
    blocks = {"block_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": budget, "token_budget": 24, **knobs}
    engine = engine_with_blocks(model, 42, **blocks)
    assert generate(engine) == expected
    if "preemption" not in knobs and budget == 24:
        assert engine.totals["preemptions"] == 0
        assert max(step.num_running for step in engine.steps.since(0)) == len(PROMPTS)


def test_a_layer_that_sees_all_keeps_all(tmp_path: Path, tiny_llama: Path):
    mixed = save_random_model(FAMILIES["qwen3, window"], tmp_path, tiny_llama)
    loaded = load_model(str(mixed), dtype="float32", device="cpu")
    engine = engine_with_blocks(loaded, 60, block_size=4, max_num_seqs=4, max_num_batched_tokens=64)
    assert engine.scheduler.window is None
    engine.add_request("r", PROMPTS[0], SamplingParams(max_tokens=20, ignore_eos=True))
    for _ in range(10):
        engine.step()
    assert engine.scheduler.pool.num_free == 60 - -(-(len(PROMPTS[0]) + 10) // 4)
