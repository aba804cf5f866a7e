"""Beside quality stands what it is measured against: the weights as the file stores them, whatever that is."""

from __future__ import annotations

from types import SimpleNamespace

from engine.measure.interleaved import attach_quality
from engine.measure.quality import QualityComparison, QualityStats, describe_reference
from engine.models.checkpoint import stored_as
from tests.storage.run_examples import make_run


def test_the_reference_is_the_weights_as_their_file_stores_them():
    checkpoint = SimpleNamespace(source="gguf", config={}, stored_elements={"F32": 10, "Q4_1": 9_990})
    assert describe_reference(stored_as(checkpoint)) == "weights as stored, Q4_1 (GGUF)"
    assert describe_reference(None) == "weights as they are in memory"


def test_a_run_of_a_comparison_records_its_reference_in_field_and_event():
    stats = QualityStats(
        {}, {}, 100, 14.0, 0.4, 0.03, 0.01, 0.02, 0.4, 1.0, 92.0, 1.0, "weights as stored, Q4_1 (GGUF)"
    )
    measured = QualityComparison(stats, stats, stats, "text", "hash", 32, 16, lossy=True)
    run = make_run(1, arm="B")
    attach_quality(run, measured)
    assert run.quality_reference == "weights as stored, Q4_1 (GGUF)"
    assert "reference: weights as stored, Q4_1 (GGUF)" in run.events[0].summary
    assert run.events[0].detail["reference"] == run.quality_reference
    assert run.events[0].detail["reference_perplexity"] == 14.0
