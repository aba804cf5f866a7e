"""Every pair of values of every two lossless live knobs, on the tiny model, in a cache so small that it preempts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.models import LoadedModel, load_model
from engine.reconfigure import reconfigure
from engine.sampling.params import SamplingParams
from tests.core.toggles import VALUES, live_lossless_knobs, pairwise_rows
from tests.support import engine_with_blocks

ROWS = pairwise_rows()
OUTPUT_TOKENS = 16
STEM = [10, 11, 12, 13] * 4
PROMPTS = [[*STEM[: 3 * i], *range(60 + i, 64 + i)] for i in range(6)] + [STEM + [7] * 9, [5]]


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> LoadedModel:
    return load_model(str(tiny_llama), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def expected(tiny_llama: Path) -> list[list[int]]:
    """Greedy output of transformers for each prompt alone."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    outputs = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        generated = reference.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=OUTPUT_TOKENS, min_new_tokens=OUTPUT_TOKENS,
            do_sample=False, pad_token_id=0, eos_token_id=256,
        )  # fmt: skip
        outputs.append(generated[0, len(prompt) :].tolist())
    return outputs


def generate(model: LoadedModel, knobs: dict[str, Any], then: dict[str, Any]) -> list[list[int]]:
    """Two waves of all prompts under ``knobs``; ``then`` comes into force in the middle of the first."""
    engine = engine_with_blocks(model, 24, block_size=4, max_num_seqs=16, max_num_batched_tokens=512)
    reconfigure(engine, knobs)
    results: dict[str, list[int]] = {}
    for wave in range(2):
        for index, prompt in enumerate(PROMPTS):
            params = SamplingParams(max_tokens=OUTPUT_TOKENS, min_tokens=OUTPUT_TOKENS, ignore_eos=False)
            engine.add_request(f"{wave}.{index}", prompt, params)
        steps = 0
        while engine.has_unfinished():
            for output in engine.step():
                if output.finished:
                    results[output.request_id] = output.token_ids
            engine.check_invariants()
            steps += 1
            if wave == 0 and steps == 9:
                reconfigure(engine, then)
    assert engine.config.difference(engine.config.with_changes(then)) == {}
    return [results[f"{wave}.{index}"] for wave in range(2) for index in range(len(PROMPTS))]


@pytest.mark.parametrize("index", range(len(ROWS)))
def test_every_pair_of_lossless_toggles_gives_the_tokens_of_transformers(
    model: LoadedModel, expected: list[list[int]], index: int
):
    """The row's knobs first, the next row's in mid-flight: their differences are toggled under running requests."""
    assert generate(model, ROWS[index], ROWS[(index + 1) % len(ROWS)]) == expected * 2


def test_every_lossless_live_knob_is_in_the_pairwise_cross():
    assert live_lossless_knobs() <= VALUES.keys()


def test_rows_contain_every_pair_of_values():
    names = list(VALUES)
    for position, first in enumerate(names):
        for second in names[position + 1 :]:
            met = {(row[first], row[second]) for row in ROWS}
            assert met == {(x, y) for x in VALUES[first] for y in VALUES[second]}
