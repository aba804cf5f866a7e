"""The tables: one row a run, and its metrics, requests, samples and events, which go with it when it is deleted.

    runs 1 ──< metrics   (run_id, name)       one number a row, so that runs can be ordered by any metric
         1 ──< requests  (run_id, position)   engine.measure.results.RequestRecord
         1 ──< samples   (run_id, position)   engine.measure.results.SampleRecord
         1 ──< events    (run_id, position)   engine.measure.results.EventRecord

    runs_wide, requests_flat                  views for people who ask in SQL, see storage.views

Columns of the last three are named as the fields of their record. A change here needs a migration
(``python -m storage revision "what changes"`` writes a draft); a test compares the two.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import BigInteger, ForeignKey, Index, MetaData, String, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from storage.types import FiniteDouble, JsonText


class Base(DeclarativeBase):
    """Names of constraints are fixed, so that migrations can refer to them on every database."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {str: Text, int: BigInteger, float: FiniteDouble}  # noqa: RUF012 - SQLAlchemy's own protocol


class StoredRun(Base):
    """One run: what :class:`engine.measure.results.RunResult` and its Provenance say, and who is running it.

    ``metric_names`` keeps the metrics' order. ``owner_*`` name the process that announced a running run, so that a
    run whose dashboard died can be told from one that is still going; they are NULL in a run that has ended.
    """

    __tablename__ = "runs"
    __table_args__ = (
        Index(None, "started_unix_s"),
        Index(None, "model"),
        Index(None, "status"),
        Index(None, "config_hash"),
        Index(None, "comparison_id"),
    )

    run_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    kind: Mapped[str] = mapped_column(String(32))
    status: Mapped[str] = mapped_column(String(32))
    label: Mapped[str]
    started_unix_s: Mapped[float]
    duration_s: Mapped[float]
    comparison_id: Mapped[str | None] = mapped_column(String(64))
    arm: Mapped[str | None] = mapped_column(String(32))
    repeat: Mapped[int | None]
    error: Mapped[str | None]
    disturbed: Mapped[list[dict[str, Any]]] = mapped_column(JsonText, server_default="[]")
    quality_reference: Mapped[str | None]

    model: Mapped[str]
    model_fingerprint: Mapped[str]
    config: Mapped[dict[str, Any]] = mapped_column(JsonText)
    config_hash: Mapped[str] = mapped_column(String(64))
    workload: Mapped[dict[str, Any]] = mapped_column(JsonText)
    workload_name: Mapped[str]
    workload_hash: Mapped[str] = mapped_column(String(64))
    seed: Mapped[int]
    versions: Mapped[dict[str, str]] = mapped_column(JsonText)
    hardware: Mapped[dict[str, Any]] = mapped_column(JsonText)
    code_revision: Mapped[str]
    code_dirty: Mapped[bool | None]
    path: Mapped[dict[str, str]] = mapped_column(JsonText)
    metric_names: Mapped[list[str]] = mapped_column(JsonText)

    owner_host: Mapped[str | None] = mapped_column(String(64))
    owner_pid: Mapped[int | None]
    owner_started_unix_s: Mapped[float | None]


def _run_key() -> Mapped[str]:
    return mapped_column(String(64), ForeignKey("runs.run_id", ondelete="CASCADE"), primary_key=True)


class StoredMetric(Base):
    """One number of a run; NULL where it was not measured."""

    __tablename__ = "metrics"
    __table_args__ = (Index(None, "name", "value"),)

    run_id: Mapped[str] = _run_key()
    name: Mapped[str] = mapped_column(String(128), primary_key=True)
    value: Mapped[float | None]


class StoredRequest(Base):
    """One request of a run."""

    __tablename__ = "requests"

    run_id: Mapped[str] = _run_key()
    position: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    index: Mapped[int]
    arrival_s: Mapped[float]
    prompt_tokens: Mapped[int]
    output_tokens: Mapped[int]
    cached_tokens: Mapped[int]
    ttft_ms: Mapped[float | None]
    tpot_ms: Mapped[float | None]
    e2e_ms: Mapped[float | None]
    itl_ms: Mapped[list[float]] = mapped_column(JsonText)
    finish_reason: Mapped[str] = mapped_column(String(32))
    preemptions: Mapped[int]
    draft_tokens: Mapped[int]
    accepted_tokens: Mapped[int]
    error: Mapped[str | None]


class StoredSample(Base):
    """The engine at one moment of a run."""

    __tablename__ = "samples"

    run_id: Mapped[str] = _run_key()
    position: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    t_s: Mapped[float]
    output_tokens_s: Mapped[float]
    total_tokens_s: Mapped[float]
    running: Mapped[int]
    waiting: Mapped[int]
    kv_blocks_used: Mapped[int]
    kv_blocks_cached: Mapped[int]
    step_ms: Mapped[float | None]
    resident_bytes: Mapped[int]
    gpu_power_w: Mapped[float | None]
    gpu_utilization_percent: Mapped[float | None]
    gpu_memory_bytes: Mapped[int | None]
    gpu_sm_clock_mhz: Mapped[int | None]


class StoredEvent(Base):
    """A toggle or another event during a run."""

    __tablename__ = "events"

    run_id: Mapped[str] = _run_key()
    position: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    t_s: Mapped[float]
    kind: Mapped[str]
    summary: Mapped[str]
    detail: Mapped[dict[str, Any]] = mapped_column(JsonText)
