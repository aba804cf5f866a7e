"""Views for people who ask in SQL: the record without a join and without JSON.

    runs_wide       one row a run: what identifies it, every knob and every metric in a column of its own name
    requests_flat   one row a request: its run's id, label and setting, and all its times

Their columns are those of this version's knobs and metrics; :func:`storage.database.migrate` makes the views again
where they are others. A migration that changes a table drops them first. A configuration that is no
JSON gives NULLs in its own row and disturbs no other.
"""

from __future__ import annotations

from sqlalchemy import Connection, inspect

from engine.config import Knob, knobs
from engine.measure.metrics import METRICS

RUNS_WIDE, REQUESTS_FLAT = "runs_wide", "requests_flat"
_RUN_COLUMNS = (
    *("run_id", "label", "kind", "status", "started_unix_s", "duration_s", "comparison_id", "arm", "repeat", "error"),
    *("disturbed", "model", "model_fingerprint", "config_hash", "workload_name", "workload_hash", "seed"),
    *("code_revision", "code_dirty", "quality_reference"),
)
_REQUEST_COLUMNS = (
    *("position", "index", "arrival_s", "prompt_tokens", "output_tokens", "cached_tokens", "ttft_ms", "tpot_ms"),
    *("e2e_ms", "itl_ms", "finish_reason", "preemptions", "draft_tokens", "accepted_tokens", "error"),
)
# PostgreSQL raises at text that is no JSON, and would refuse the whole view for one bad row
_POSTGRES_JSON = """
CREATE OR REPLACE FUNCTION headroom_json(document text) RETURNS jsonb LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
    RETURN document::jsonb;
EXCEPTION WHEN OTHERS THEN
    RETURN NULL;
END $$
"""


def create_views(connection: Connection) -> None:
    """Make the views, in place of those that are there."""
    drop_views(connection)
    postgres = connection.dialect.name == "postgresql"
    if postgres:
        connection.exec_driver_sql(_POSTGRES_JSON)
    connection.exec_driver_sql(f"CREATE VIEW {RUNS_WIDE} AS {_runs_wide(postgres)}")
    connection.exec_driver_sql(f"CREATE VIEW {REQUESTS_FLAT} AS {_requests_flat()}")


def drop_views(connection: Connection) -> None:
    """Remove the views: no table that they read can be altered while they are there."""
    for name in (RUNS_WIDE, REQUESTS_FLAT):
        connection.exec_driver_sql(f"DROP VIEW IF EXISTS {name}")


def views_are_current(connection: Connection) -> bool:
    """True if both are there with the columns of this version."""
    inspector = inspect(connection)
    if not {RUNS_WIDE, REQUESTS_FLAT} <= set(inspector.get_view_names()):
        return False
    return [column["name"] for column in inspector.get_columns(RUNS_WIDE)] == wide_columns()


def wide_columns() -> list[str]:
    """The columns of ``runs_wide``. A knob or a metric that a column of ``runs`` already tells has none of its own."""
    return [*_RUN_COLUMNS, *(knob.name for knob in _knobs()), *_metrics()]


def _knobs() -> list[Knob]:
    return [knob for knob in knobs() if knob.name not in _RUN_COLUMNS]


def _metrics() -> list[str]:
    taken = {*_RUN_COLUMNS, *(knob.name for knob in _knobs())}
    return [name for name in METRICS if name not in taken]


def _runs_wide(postgres: bool) -> str:
    columns = [f'r."{name}"' for name in _RUN_COLUMNS]
    columns += [f'{_knob_value(knob, postgres)} AS "{knob.name}"' for knob in _knobs()]
    columns += [f'm."{name}"' for name in _metrics()]
    pivot = ", ".join(f"MAX(CASE WHEN name = '{name}' THEN value END) AS \"{name}\"" for name in _metrics())
    document = "headroom_json(config)" if postgres else "CASE WHEN json_valid(config) THEN config END"
    return (
        f"SELECT {', '.join(columns)} FROM (SELECT *, {document} AS document FROM runs) AS r "
        f"LEFT JOIN (SELECT run_id, {pivot} FROM metrics GROUP BY run_id) AS m ON m.run_id = r.run_id"
    )


def _knob_value(knob: Knob, postgres: bool) -> str:
    """The knob out of the configuration: numbers as numbers, all else as text (SQLite: switches as 0 and 1)."""
    if not postgres:
        return f"json_extract(r.document, '$.\"{knob.name}\"')"
    value = f"(r.document ->> '{knob.name}')"
    if knob.kind not in ("int", "float"):
        return value
    return f"CASE jsonb_typeof(r.document -> '{knob.name}') WHEN 'number' THEN {value} END::double precision"


def _requests_flat() -> str:
    run = ("label", "status", "started_unix_s", "disturbed", "model", "workload_name", "config_hash")
    columns = ["q.run_id", *(f"r.{name}" for name in run), "r.started_unix_s + q.arrival_s AS arrival_unix_s"]
    columns += [f'q."{name}"' + (" AS request_error" if name == "error" else "") for name in _REQUEST_COLUMNS]
    return f"SELECT {', '.join(columns)} FROM requests AS q JOIN runs AS r ON r.run_id = q.run_id"
