"""The benchmark of what Python costs a step, on a model so small that it only shows that it runs."""

from __future__ import annotations

from pathlib import Path

from engine.models import load_model
from tests.benchmarks.overhead import StubDecoder, measure


def test_every_part_of_a_step_is_timed_and_sampling_apart_from_commit(tiny_llama: Path):
    model = load_model(str(tiny_llama), dtype="float32", device="cpu")
    model.decoder = StubDecoder(model.decoder, 64)  # type: ignore[assignment]
    parts = measure(model, batch=3, steps=8, prompt_tokens=6, knobs={"memory_limit_gib": 0.5})
    assert parts.keys() == {"schedule", "prepare", "commit", "sample"}
    assert all(value > 0 for value in parts.values())
    assert parts["sample"] < 1e5  # microseconds
