"""The contract of correctness for every family: greedy float32 output is token-identical to transformers.

Tiny random models, prompts longer than their windows, computed in chunks and in one batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.config import EngineConfig
from engine.core import Engine
from engine.models import LoadedModel, load_model
from engine.sampling.params import SamplingParams
from tests.core.toggles import pairwise_rows
from tests.family_cases import FALLBACKS, FAMILIES, SCALINGS, random_prompt, save_random_model
from tests.support import transformers_greedy

pytestmark = pytest.mark.slow

CASES = FAMILIES | {f"rope: {name}": config for name, config in SCALINGS.items()} | FALLBACKS
PROMPTS = [random_prompt(length, seed=length) for length in (1, 7, 33, 90, 150)]
OUTPUT_TOKENS = 24


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Waking a second thread would cost more than these models compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=CASES)
def case(request: Any, tmp_path_factory: Any, tiny_llama: Any) -> tuple[LoadedModel, Any]:
    """(the model in our engine, the same in transformers), float32."""
    folder = save_random_model(CASES[request.param], tmp_path_factory.mktemp("family"), tiny_llama)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    return load_model(str(folder), dtype="float32", device="cpu"), reference


@pytest.fixture(scope="module")
def expected(case: tuple[LoadedModel, Any]) -> list[list[int]]:
    return transformers_greedy(case[1], PROMPTS, OUTPUT_TOKENS)


def generate(model: LoadedModel, output_tokens: int = OUTPUT_TOKENS, **knobs: Any) -> list[list[int]]:
    config = {"memory_limit_gib": 0.2, "max_num_seqs": 16, "max_num_batched_tokens": 512, "block_size": 8, **knobs}
    engine = Engine(model, EngineConfig.from_mapping(config))
    for index, prompt in enumerate(PROMPTS):
        engine.add_request(str(index), prompt, SamplingParams(max_tokens=output_tokens))
    results: dict[str, list[int]] = {}
    while engine.has_unfinished():
        for output in engine.step():
            results[output.request_id] = output.token_ids
        engine.check_invariants()
    return [results[str(index)] for index in range(len(PROMPTS))]


def test_logits_of_every_position_equal_transformers(case):
    model, reference = case
    engine = Engine(model, EngineConfig.from_mapping({"memory_limit_gib": 0.2, "max_num_batched_tokens": 512}))
    with torch.inference_mode():
        expected = reference(torch.tensor([PROMPTS[-1]])).logits[0]
    torch.testing.assert_close(engine.prompt_logits(PROMPTS[-1]), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    "knobs",
    [
        {"token_budget": 512, "chunked_prefill": False},
        {"token_budget": 21},
        {"token_budget": 34, "execution": "eager"},
        {"token_budget": 48, "speculation": "ngram", "ngram_min": 1, "attention": "reference"},
    ],
    ids=["whole prompts", "chunked prefill", "eager", "chunks and drafts, reference attention"],
)
def test_greedy_output_is_token_identical_to_transformers(case, expected, knobs):
    assert generate(case[0], **knobs) == expected


def test_no_pair_of_lossless_toggles_changes_a_token(case, expected):
    """Every pair of values of every two knobs, in as few configurations as hold them all."""
    for row in pairwise_rows():
        assert generate(case[0], output_tokens=8, **row) == [tokens[:8] for tokens in expected], row
