"""Beside quality stands what it is measured against: the weights as the file stores them, whatever that is."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from engine.measure.driver import _attach_quality
from engine.measure.quality import QualityComparison, QualityStats, describe_reference
from tests.storage.run_examples import make_run


def _gguf(**elements):
    tensors = {
        f"{kind} {number}": SimpleNamespace(kind=SimpleNamespace(name=kind), shape=(1, count))
        for number, (kind, count) in enumerate(elements.items())
    }
    checkpoint = SimpleNamespace(source="gguf", config={}, file=SimpleNamespace(tensors=tensors))
    return SimpleNamespace(checkpoint=checkpoint)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (_gguf(F32=10, Q4_1=9_990), "weights as stored, Q4_1 (GGUF)"),
        (_gguf(Q6_K=2_200, Q4_K=7_790, F32=10), "weights as stored, mostly Q4_K (GGUF, 78 % of the parameters)"),
        (_gguf(BF16=100), "weights as stored, BF16 (GGUF)"),
    ],
)
def test_a_gguf_reference_is_named_by_the_type_of_most_parameters(model, words):
    assert describe_reference(model) == words


def test_a_safetensors_reference_is_named_by_its_dtype_or_its_foreign_quantization(tmp_path):
    save_file({"a": torch.zeros(99, 10, dtype=torch.bfloat16), "b": torch.zeros(1)}, tmp_path / "model.safetensors")
    checkpoint = SimpleNamespace(source="safetensors", config={}, path=tmp_path)
    model = SimpleNamespace(checkpoint=checkpoint)
    assert describe_reference(model) == "weights as stored, BF16 (safetensors)"
    checkpoint.config = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    assert describe_reference(model) == "weights as stored, quantized by gptq (safetensors)"


def test_a_run_of_a_comparison_records_its_reference_in_field_and_event():
    stats = QualityStats(
        {}, {}, 100, 14.0, 0.4, 0.03, 0.01, 0.02, 0.4, 1.0, 92.0, 1.0, "weights as stored, Q4_1 (GGUF)"
    )
    measured = QualityComparison(stats, stats, stats, "text", "hash", 32, 16, lossy=True)
    run = make_run(1, arm="B")
    _attach_quality(run, measured)
    assert run.quality_reference == "weights as stored, Q4_1 (GGUF)"
    assert "reference: weights as stored, Q4_1 (GGUF)" in run.events[0].summary
    assert run.events[0].detail["reference"] == run.quality_reference
    assert run.events[0].detail["reference_perplexity"] == 14.0
