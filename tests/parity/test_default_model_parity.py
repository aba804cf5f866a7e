"""The contract of correctness on the real model: greedy float32 output is token-identical to transformers.

Every combination of the lossless toggles, alone and in a batch, also when toggled in the middle of a generation.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import pytest

from engine.config import EngineConfig, Tier, knobs
from engine.core import Engine
from engine.reconfigure import reconfigure
from engine.sampling.params import SamplingParams
from tests.core.toggles import pairwise_rows
from tests.support import engine_with_blocks, transformers_greedy, wait_until_prepared

pytestmark = pytest.mark.model

OUTPUT_TOKENS = 20

# The token budget of the tests is 48, so the long prompts are computed in several chunks.
PARAGRAPH = (
    "The harbour town had grown around its lighthouse, and every evening the keeper climbed the stairs to light the "
    "lamp. Ships from the north brought timber, ships from the south brought salt and oranges. "
)
PROMPTS = [
    "Hello",
    "The capital of France is",
    "1, 2, 3, 4, 5, 6,",
    "Once upon a time",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "import numpy as np\n\nclass Matrix:\n    def __init__(self, rows, columns):\n",
    "SELECT name, COUNT(*) FROM users WHERE",
    '{"name": "Ada", "born": 1815, "fields": ["mathematics",',
    "Grüße aus Köln! Das Wetter ist heute",
    "今日は天気が",
    "Привет, как",
    "🙂🙃 emoji and text 🚀",
    "a a a a a a a a a a a a a a",
    "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>system\nYou answer in one word.<|im_end|>\n<|im_start|>user\nColour of the sky?<|im_end|>\n"
    "<|im_start|>assistant\n",
    "Translate to French: cheese ->",
    "    \n\n\t",
    PARAGRAPH,
    PARAGRAPH * 3,
    PARAGRAPH * 6 + "In the end, the keeper",
]


@pytest.fixture(scope="module")
def prompts(default_model_float32: Any) -> list[list[int]]:
    tokenizer = default_model_float32.tokenizer
    encoded = [tokenizer(text, add_special_tokens=False).input_ids for text in PROMPTS]
    encoded[0] = encoded[0][:1]
    assert len(encoded) == 20
    assert min(map(len, encoded)) == 1
    assert max(map(len, encoded)) > 150
    return encoded


@pytest.fixture(scope="module")
def expected(hf_default_model: Any, prompts: list[list[int]]) -> list[list[int]]:
    """What transformers generates for each prompt alone."""
    return transformers_greedy(hf_default_model, prompts, OUTPUT_TOKENS)


def engine_for(model: Any, knob_values: Mapping[str, Any]) -> Engine:
    base = {
        "token_budget": 48,
        "memory_limit_gib": 1.5,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 512,
        "max_model_len": 1024,
    }
    return wait_until_prepared(Engine(model, EngineConfig.from_mapping({**base, **knob_values})))


def generate(
    engine: Engine,
    prompts: list[list[int]],
    *,
    at_once: int,
    toggle: Mapping[str, Any] | None = None,
    output_tokens: int = OUTPUT_TOKENS,
) -> list[list[int]]:
    """Generate ``at_once`` prompts at a time; apply ``toggle`` when half of the tokens of the first batch are out."""
    results: dict[int, list[int]] = {}
    pending = list(enumerate(prompts))
    produced = 0
    while pending or engine.has_unfinished():
        while pending and len(engine.scheduler.running) + engine.scheduler.num_waiting < at_once:
            index, prompt = pending.pop(0)
            engine.add_request(str(index), prompt, SamplingParams(max_tokens=output_tokens))
        for output in engine.step():
            produced += len(output.new_token_ids)
            if output.finished:
                results[int(output.request_id)] = output.token_ids
        engine.check_invariants()
        if toggle is not None and produced > at_once * output_tokens // 2:
            reconfigure(engine, toggle)
            wait_until_prepared(engine)
            toggle = None
    assert toggle is None, "the toggle was never reached"
    return [results[index] for index in range(len(prompts))]


@pytest.mark.parametrize("at_once", [1, 16])
@pytest.mark.parametrize("speculation", ["off", "ngram"])
@pytest.mark.parametrize("batching", ["static", "continuous"])
def test_greedy_output_is_token_identical_to_transformers(
    default_model_float32: Any,
    prompts: list[list[int]],
    expected: list[list[int]],
    batching: str,
    speculation: str,
    at_once: int,
):
    engine = engine_for(default_model_float32, {"batching": batching, "speculation": speculation})
    assert generate(engine, prompts, at_once=at_once) == expected


TOGGLES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"batching": "static"}, {"batching": "continuous"}),
    ({"batching": "continuous"}, {"batching": "static"}),
    ({"max_running": 16}, {"max_running": 2}),
    ({"max_waiting": 1024}, {"max_waiting": 0}),
    ({"token_budget": 512}, {"token_budget": 5}),
    ({"chunked_prefill": True}, {"chunked_prefill": False}),
    ({"preemption": True}, {"preemption": False}),
    ({"prefix_cache": True}, {"prefix_cache": False}),
    ({"prefix_cache": False}, {"prefix_cache": True}),
    ({"speculation": "off"}, {"speculation": "ngram"}),
    ({"speculation": "ngram"}, {"speculation": "off"}),
    ({"speculation": "ngram"}, {"draft_length": 9}),
    ({"speculation": "ngram"}, {"ngram_max": 6, "ngram_min": 1}),
    ({"speculation": "ngram"}, {"ngram_min": 1}),
    ({"speculation": "ngram"}, {"draft_control": "adaptive"}),
    ({"execution": "eager"}, {"execution": "compiled"}),
    ({"execution": "compiled", "speculation": "ngram"}, {"execution": "eager"}),
    ({"attention": "auto"}, {"attention": "reference"}),
    ({"attention": "reference"}, {"attention": "sdpa"}),
    ({"sampling": "auto"}, {"sampling": "torch"}),
]


@pytest.mark.parametrize(("before", "after"), TOGGLES, ids=[f"{b}->{a}".replace("'", "") for b, a in TOGGLES])
def test_toggle_in_the_middle_of_a_generation_changes_no_token(
    default_model_float32: Any,
    prompts: list[list[int]],
    expected: list[list[int]],
    before: dict[str, Any],
    after: dict[str, Any],
):
    engine = engine_for(default_model_float32, before)
    assert generate(engine, prompts, at_once=16, toggle=after) == expected
    if "execution" in after:
        assert {step.execution for step in engine.steps.since(0)} == {"eager", "compiled"}


PAIRWISE = pairwise_rows()


@pytest.mark.parametrize("index", range(len(PAIRWISE)))
def test_every_pair_of_lossless_toggles_changes_no_token(
    default_model_float32: Any, prompts: list[list[int]], expected: list[list[int]], index: int
):
    """A covering array of all lossless live knobs; in mid-flight the next row's settings take over."""
    chosen = [2, 4, 12, 14]  # counting, code, a repetition, a chat
    engine = engine_for(default_model_float32, PAIRWISE[index])
    then = PAIRWISE[(index + 1) % len(PAIRWISE)]
    outputs = generate(engine, [prompts[i] for i in chosen], at_once=len(chosen), toggle=then, output_tokens=8)
    assert outputs == [expected[i][:8] for i in chosen]


def test_every_lossless_live_knob_is_among_the_toggles():
    toggled = set(itertools.chain.from_iterable(after for _, after in TOGGLES))
    live = {knob.name for knob in knobs() if knob.tier == Tier.LIVE and knob.lossless}
    one_choice_only = {knob.name for knob in knobs() if knob.kind == "choice" and len(knob.choices) == 1}
    assert live - one_choice_only <= toggled


def test_preemption_in_a_small_cache_changes_no_token(
    default_model_float32: Any, prompts: list[list[int]], expected: list[list[int]]
):
    engine = engine_with_blocks(default_model_float32, 24, max_num_seqs=16, token_budget=48, prefix_cache=False)
    assert generate(engine, prompts, at_once=16) == expected
    assert engine.totals["preemptions"] > 0
