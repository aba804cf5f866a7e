"""What a setting costs in quality, measured on the tiny random model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.benchmarks.quality import measure, stored_as


@pytest.mark.slow
def test_quality_is_that_of_exactly_the_combination_and_the_reference_loses_nothing(tiny_llama: Path):
    shared = {"device": "cpu", "memory_limit_gib": 0.25, "max_model_len": 256}
    w4a8 = {"weights": "w4a8", "dtype": "float32"}
    with torch.inference_mode():
        found = measure(str(tiny_llama), shared, [w4a8, w4a8 | {"head_weights": "int8"}, {"dtype": "bfloat16"}])
    reference = found["dtype=float32"]
    assert (reference.kl_mean, reference.same_top_percent) == (0.0, 100.0)
    assert next(iter(found)) == "dtype=float32"
    alone, with_head = found["weights=w4a8, dtype=float32"], found["weights=w4a8, head_weights=int8, dtype=float32"]
    assert alone.kl_mean > 0
    assert with_head.kl_mean != alone.kl_mean
    assert 0 < found["dtype=bfloat16"].kl_mean < alone.kl_mean


@pytest.mark.model
def test_how_the_reference_is_stored_is_read_from_its_file(default_gguf: Path):
    assert stored_as(default_gguf) == "Q4_1 (token_embd: Q8_0)"
