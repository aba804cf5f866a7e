"""The record of a measured run: what was run, on what, under which settings, and everything that came of it.

These are the types that cross from the engine to storage, to the pages and to exported files. They are plain
dataclasses of JSON-ready values; :func:`to_json` and :func:`from_json` are exact inverses.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Literal

RunStatus = Literal["running", "completed", "failed", "cancelled"]


@dataclasses.dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request of a run. Times in milliseconds; ``arrival_s`` counts from the start of the run.

    TTFT = first token - arrival (queueing included). TPOT = (last token - first token) / (output tokens - 1), None
    for fewer than two tokens. E2E = end - arrival. ``itl_ms`` are the gaps between successive output tokens;
    tokens that one verification accepted together have gaps of 0.
    """

    index: int
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    ttft_ms: float | None
    tpot_ms: float | None
    e2e_ms: float | None
    itl_ms: list[float]
    finish_reason: str
    preemptions: int
    draft_tokens: int
    accepted_tokens: int
    error: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class SampleRecord:
    """State of the engine at one moment of a run, sampled a few times a second. ``t_s`` counts from its start.

    Attributes:
        output_tokens_s, total_tokens_s: tokens per second since the previous sample.
        running, waiting: requests.
        kv_blocks_used, kv_blocks_cached: blocks.
        step_ms: mean step time since the previous sample; None if there was no step.
        resident_bytes: memory of the process.
        gpu_power_w, gpu_utilization_percent, gpu_memory_bytes, gpu_sm_clock_mhz: of the engine's GPU, see
            :class:`engine.telemetry.gpu.GpuReading`; None if it has none or the reading is unavailable.
    """

    t_s: float
    output_tokens_s: float
    total_tokens_s: float
    running: int
    waiting: int
    kv_blocks_used: int
    kv_blocks_cached: int
    step_ms: float | None
    resident_bytes: int
    gpu_power_w: float | None = None
    gpu_utilization_percent: float | None = None
    gpu_memory_bytes: int | None = None
    gpu_sm_clock_mhz: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class EventRecord:
    """A toggle or another event during a run. ``t_s`` counts from the run's start."""

    t_s: float
    kind: str
    summary: str
    detail: dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Provenance:
    """Everything needed to repeat a run.

    Attributes:
        model: name as given; model_fingerprint: SHA-256 over the checkpoint's content.
        config, config_hash: every knob; see :class:`engine.config.EngineConfig`.
        workload, workload_hash: the workload's definition and the SHA-256 of the requests it expands to.
        seed: of the workload.
        versions: python, torch, triton, transformers, headroom …
        hardware: cpu, cores, memory, gpu, driver, host name hashed.
        code_revision, code_dirty: git commit, and whether the tree had changes; "" and None outside a checkout.
        path: the path that really ran (device, dtype, attention, weights, execution).
    """

    model: str
    model_fingerprint: str
    config: dict[str, Any]
    config_hash: str
    workload: dict[str, Any]
    workload_hash: str
    seed: int
    versions: dict[str, str]
    hardware: dict[str, Any]
    code_revision: str
    code_dirty: bool | None
    path: dict[str, str]


@dataclasses.dataclass(slots=True)
class RunResult:
    """A run as recorded. ``metrics`` are those of :func:`engine.measure.metrics.summarize` (names carry their unit).

    Attributes:
        run_id: UUID4 hex.
        kind: "bench" for a run by itself, "compare" for one arm of a comparison.
        status: "completed", "failed", "cancelled" (or "running" while it is only announced).
        label: free text for people.
        started_unix_s: wall clock; duration_s: wall time from the first arrival to the last end.
        comparison_id, arm, repeat: for a run of a comparison: its id, "A" or "B", and the number of the repetition.
        error: why it failed.
        disturbed: what else happened to the engine meanwhile, so that the figures are not those of the setting alone
            (a knob was changed by force, other traffic): ``{"time_unix_s": float, "what": str}`` each.
        quality_reference: what the figures of quality are measured against, as it is stored (see
            :func:`engine.measure.quality.describe_reference`); None where quality was not measured, or not said.
    """

    run_id: str
    kind: Literal["bench", "compare"]
    status: RunStatus
    label: str
    started_unix_s: float
    duration_s: float
    provenance: Provenance
    metrics: dict[str, float | None]
    requests: list[RequestRecord] = dataclasses.field(default_factory=list)
    samples: list[SampleRecord] = dataclasses.field(default_factory=list)
    events: list[EventRecord] = dataclasses.field(default_factory=list)
    comparison_id: str | None = None
    arm: str | None = None
    repeat: int | None = None
    error: str | None = None
    disturbed: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    quality_reference: str | None = None


def to_json(result: RunResult) -> dict[str, Any]:
    """The run as a JSON-ready mapping."""
    return dataclasses.asdict(result)


def from_json(document: dict[str, Any] | str) -> RunResult:
    """The run from what :func:`to_json` gave (a mapping or its JSON text).

    Raises:
        ValueError: naming the missing or unknown field.
    """
    data = dict(json.loads(document)) if isinstance(document, str) else dict(document)
    try:
        data["provenance"] = Provenance(**data["provenance"])
        data["requests"] = [RequestRecord(**item) for item in data.get("requests", [])]
        data["samples"] = [SampleRecord(**item) for item in data.get("samples", [])]
        data["events"] = [EventRecord(**item) for item in data.get("events", [])]
        return RunResult(**data)
    except (TypeError, KeyError) as error:
        raise ValueError(f"not a run record: {error}") from error
