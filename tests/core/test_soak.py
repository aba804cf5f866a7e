"""300 requests with random arrivals, lengths, cancellations and toggles in a cache so small that preemption happens."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.models import load_model
from engine.outputs import RequestOutput
from engine.reconfigure import reconfigure
from engine.sampling.params import SamplingParams
from tests.support import engine_with_blocks

REQUESTS = 300
TOGGLES: list[dict[str, Any]] = [
    {"batching": "static"},
    {"batching": "continuous"},
    {"speculation": "ngram", "draft_length": 3, "ngram_min": 1},
    {"speculation": "off"},
    {"prefix_cache": True},
    {"prefix_cache": False},
    {"token_budget": 7},
    {"token_budget": 64},
    {"max_running": 3},
    {"max_running": 16},
    {"chunked_prefill": False},
    {"chunked_prefill": True},
    {"preemption": False},
    {"preemption": True},
    {"attention": "reference"},
    {"attention": "sdpa"},
]


def make_requests(generator: random.Random) -> list[tuple[list[int], int]]:
    """Prompts that share beginnings and repeat themselves, so that prefix cache and speculation have work."""
    stems = [[generator.randrange(256) for _ in range(40)] for _ in range(4)]
    requests = []
    for _ in range(REQUESTS):
        stem = generator.choice(stems)[: generator.randrange(0, 40)]
        tail = [generator.randrange(256) for _ in range(generator.randrange(1, 30))]
        requests.append((stem + tail, generator.randrange(1, 25)))
    return requests


@pytest.fixture(scope="module")
def expected_of(tiny_llama: Path) -> Any:
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()

    def generate(prompt: list[int], count: int) -> list[int]:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        output = reference.generate(
            ids, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0, eos_token_id=256
        )
        return output[0, len(prompt) :].tolist()

    return generate


def test_every_uncancelled_request_finishes_with_the_right_tokens(tiny_llama: Path, expected_of: Any):
    generator = random.Random(7)
    model = load_model(str(tiny_llama), dtype="float32", device="cpu")
    engine = engine_with_blocks(model, 40, block_size=4, max_num_seqs=16)  # about three requests' worth
    requests = make_requests(generator)
    waiting = list(range(REQUESTS))
    in_flight: set[int] = set()
    finished: dict[int, RequestOutput] = {}
    cancelled: set[int] = set()
    toggles = 0
    while waiting or engine.has_unfinished():
        if waiting and generator.random() < 0.5:
            for index in [waiting.pop(0) for _ in range(min(len(waiting), generator.randrange(1, 4)))]:
                prompt, count = requests[index]
                engine.add_request(
                    str(index), prompt, SamplingParams(max_tokens=count), priority=generator.randrange(2)
                )
                in_flight.add(index)
        if in_flight and generator.random() < 0.03:
            victim = generator.choice(sorted(in_flight))
            assert engine.abort(str(victim)) is not None
            in_flight.discard(victim)
            cancelled.add(victim)
        if generator.random() < 0.1:
            reconfigure(engine, generator.choice(TOGGLES))
            toggles += 1
        for output in engine.step():
            if output.finished:
                finished[int(output.request_id)] = output
                in_flight.discard(int(output.request_id))
        engine.check_invariants()
    assert engine.totals["preemptions"] > 10
    assert engine.totals["prefix_hit_tokens"] > 100
    assert engine.totals["accepted_tokens"] > 10
    assert len(cancelled) > 5
    assert toggles > 30
    assert len(finished) + len(cancelled) == REQUESTS
    assert engine.scheduler.pool.num_free == 40
    wrong = [i for i, output in finished.items() if output.token_ids != expected_of(*requests[i])]
    assert wrong == []
