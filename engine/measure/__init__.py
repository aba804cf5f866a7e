"""Measurement: workloads, metric definitions, the run driver, A/B statistics, quality.

The names below are imported on first use: whoever reads only records (``storage``, the pages) pays for neither torch
nor scipy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.measure.claims import CLAIMS, Claim, ClaimVerdict, claims_for, judge_claim
    from engine.measure.comparison import MetricComparison, compare, compare_all
    from engine.measure.driver import RunProgress, run_workload
    from engine.measure.interleaved import Comparison, run_comparison
    from engine.measure.metrics import METRICS, MetricInfo, Slo, summarize
    from engine.measure.prompts import WorkloadRequest, expand, workload_hash
    from engine.measure.provenance import collect_provenance
    from engine.measure.quality import QualityComparison, measure_quality
    from engine.measure.workloads import WORKLOADS, Workload, get_workload

_HOME = {
    "claims": ("CLAIMS", "Claim", "ClaimVerdict", "claims_for", "judge_claim"),
    "comparison": ("MetricComparison", "compare", "compare_all"),
    "driver": ("RunProgress", "run_workload"),
    "interleaved": ("Comparison", "run_comparison"),
    "metrics": ("METRICS", "MetricInfo", "Slo", "summarize"),
    "prompts": ("WorkloadRequest", "expand", "workload_hash"),
    "quality": ("QualityComparison", "measure_quality"),
    "workloads": ("WORKLOADS", "Workload", "get_workload"),
}
_MODULE_OF = {name: f"engine.measure.{module}" for module, names in _HOME.items() for name in names}
_MODULE_OF["collect_provenance"] = "engine.measure.provenance"

__all__ = [
    "CLAIMS",
    "METRICS",
    "WORKLOADS",
    "Claim",
    "ClaimVerdict",
    "Comparison",
    "MetricComparison",
    "MetricInfo",
    "QualityComparison",
    "RunProgress",
    "Slo",
    "Workload",
    "WorkloadRequest",
    "claims_for",
    "collect_provenance",
    "compare",
    "compare_all",
    "expand",
    "get_workload",
    "judge_claim",
    "measure_quality",
    "run_comparison",
    "run_workload",
    "summarize",
    "workload_hash",
]


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(importlib.import_module(_MODULE_OF[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
