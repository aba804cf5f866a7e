"""The contract of correctness on the second real model, Gemma 3 270M: sliding windows, two rotary bases, a large
vocabulary. Greedy float32 output is token-identical to transformers, which reads the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GgufConfig

from engine.config import EngineConfig
from engine.core import Engine
from engine.models import LoadedModel, load_model
from engine.sampling.params import SamplingParams
from tests.core.toggles import pairwise_rows
from tests.gemma import fetch_gemma, without_vocabulary
from tests.support import transformers_greedy

pytestmark = pytest.mark.model

OUTPUT_TOKENS = 8
PARAGRAPH = "The keeper climbed the stairs every evening to light the lamp, and the ships from the north came home. "
TEXTS = ["The capital of France is", "def fibonacci(n):", PARAGRAPH * 26]
"""The last one is longer than the window of 512 tokens."""


@pytest.fixture(scope="module")
def gemma() -> LoadedModel:
    return load_model(str(fetch_gemma()), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def prompts(gemma: LoadedModel) -> list[list[int]]:
    encoded = [gemma.tokenizer(text).input_ids for text in TEXTS]
    assert len(encoded[-1]) > 512 + OUTPUT_TOKENS
    return encoded


@pytest.fixture(scope="module")
def reference(prompts: list[list[int]], tmp_path_factory: Any) -> tuple[list[list[int]], torch.Tensor]:
    """(what transformers generates for each prompt, its logits of the second one); the model is dropped again."""
    path = without_vocabulary(fetch_gemma(), tmp_path_factory.mktemp("gemma") / "weights.gguf")
    model = AutoModelForCausalLM.from_pretrained(
        str(path.parent),
        gguf_file=path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    ).eval()
    path.unlink()
    outputs = transformers_greedy(model, prompts, OUTPUT_TOKENS)
    with torch.inference_mode():
        return outputs, model(torch.tensor([prompts[1]])).logits[0]


def engine_for(model: LoadedModel, **knobs: Any) -> Engine:
    base = {"memory_limit_gib": 1.8, "max_num_seqs": 16, "max_num_batched_tokens": 256, "max_model_len": 1024}
    return Engine(model, EngineConfig.from_mapping({**base, **knobs}))


def test_gemma_has_the_shape_that_its_authors_publish(gemma: LoadedModel):
    assert gemma.num_parameters() == 268_098_176
    assert gemma.weight_bytes() == 4 * 268_098_176
    assert [index for index, window in enumerate(gemma.decoder.layer_windows) if window is None] == [5, 11, 17]


def test_gemma_logits_equal_transformers_in_float32(gemma: LoadedModel, prompts: Any, reference: Any):
    found = engine_for(gemma).prompt_logits(prompts[1])
    torch.testing.assert_close(found, reference[1], atol=5e-4, rtol=0)


def test_gemma_greedy_output_is_token_identical_to_transformers(gemma: LoadedModel, prompts: Any, reference: Any):
    engine = engine_for(gemma, token_budget=192)  # the long prompt is computed in chunks, beside the others
    assert generate(engine, prompts) == reference[0]


@pytest.mark.slow
@pytest.mark.parametrize("row", pairwise_rows(), ids=str)
def test_gemma_no_pair_of_lossless_toggles_changes_a_token(
    gemma: LoadedModel, prompts: Any, reference: Any, row: dict[str, Any]
):
    assert generate(engine_for(gemma, **row), prompts) == reference[0]


def generate(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), prompt, SamplingParams(max_tokens=OUTPUT_TOKENS))
    results: dict[str, list[int]] = {}
    while engine.has_unfinished():
        for output in engine.step():
            results[output.request_id] = output.token_ids
    engine.check_invariants()
    return [results[str(index)] for index in range(len(prompts))]


def test_gemma_to_int8_and_back_is_bit_identical(gemma: LoadedModel):
    before = {name: linear.format.dequantize() for name, linear, _ in gemma.decoder.linears()}
    gemma.commit_weights(gemma.prepare_weights("int8", 64))
    assert gemma.weight_bytes() < 4 * 268_098_176
    gemma.commit_weights(gemma.prepare_weights("model", 64))
    after = {name: linear.format.dequantize() for name, linear, _ in gemma.decoder.linears()}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
