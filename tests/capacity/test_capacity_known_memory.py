"""Plans against what serving engines reported on real GPUs."""

from __future__ import annotations

import dataclasses

import pytest

from engine.capacity import plan_from_names


@dataclasses.dataclass(frozen=True)
class Report:
    """What an engine logged at its start; GiB, None where it was not recorded."""

    profile: str
    model: str
    gpu: str
    memory_gib: float
    utilization: float
    context: int
    max_num_seqs: int
    weights_gib: float | None
    activation_gib: float | None
    kv_gib: float | None
    kv_tokens: int


REPORTS = [
    Report("vllm-0.19", "Llama-3.1-8B-Instruct", "H100 SXM", 79.19, 0.95, 8192, 1024, 14.99, 1.89, 58.11, 476_016),
    Report("vllm-0.19", "Qwen2.5-7B-Instruct", "H100 SXM", 79.19, 0.95, 8192, 1024, 14.25, 2.21, 58.53, 1_096_000),
    Report("vllm-0.18", "Qwen/Qwen3-14B", "H100 SXM", 79.19, 0.95, 8192, 1024, 27.52, 2.23, 45.23, 296_387),
    Report("vllm-0.15.1", "meta-llama/Llama-2-7b-hf", "H100 SXM", 79.19, 0.9, 4096, 128, None, None, None, 119_408),
    Report("vllm-0.6", "Llama-3.1-8B-Instruct", "RTX 3090", 23.58, 0.9, 20000, 256, 14.9888, 2.07, 3.81, 31_232),
]


def _plan(report: Report):
    return plan_from_names(
        report.model,
        report.gpu,
        gpu_memory_gib=report.memory_gib,
        profile=report.profile,
        utilization=report.utilization,
        context=report.context,
        max_num_seqs=report.max_num_seqs,
        dtype="bfloat16",
    ).to_dict()["memory"]


@pytest.mark.parametrize("report", REPORTS, ids=lambda report: f"{report.profile} {report.model}")
def test_kv_tokens_are_within_two_percent_of_the_report(report: Report):
    assert _plan(report)["kv_tokens"] == pytest.approx(report.kv_tokens, rel=0.02)


@pytest.mark.parametrize("report", [r for r in REPORTS if r.weights_gib], ids=lambda report: report.model)
def test_weights_activations_and_cache_are_those_of_the_report(report: Report):
    memory = _plan(report)
    assert memory["weights_gib"] == pytest.approx(report.weights_gib, rel=0.001)
    assert memory["activation_gib"] == pytest.approx(report.activation_gib, rel=0.1)
    assert memory["kv_gib"] == pytest.approx(report.kv_gib, rel=0.02)
