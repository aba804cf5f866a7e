"""``python -m storage``: record, list and export runs without a dashboard."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from enum import StrEnum
from typing import Annotated

import typer

from storage.documents import parse_documents
from storage.errors import StorageError
from storage.queries import RunFilter, RunRow
from storage.spool import keep
from storage.store import Store, open_store

app = typer.Typer(help="The measured record: record, list and export runs.", no_args_is_help=True, add_completion=False)
Database = Annotated[
    str | None, typer.Option("--db", help="SQLAlchemy URL. Default: HEADROOM_DB, else SQLite under HEADROOM_HOME.")
]
Runs = Annotated[list[str] | None, typer.Option("--run", help="Run id; may be given several times. Default: all runs.")]


class Format(StrEnum):
    """What ``export`` writes."""

    CSV = "csv"
    REQUESTS_CSV = "requests-csv"
    JSON = "json"


@app.command()
def record(db: Database = None) -> None:
    """Put the run(s) on standard input, as `python -m engine bench --json` prints them, on record."""
    text = sys.stdin.buffer.read()
    try:
        with _store(db) as store:
            report = store.import_json(text)
    except typer.Exit:
        _keep(text)
        raise
    print(json.dumps(dataclasses.asdict(report)))


@app.command("list")
def list_runs(
    db: Database = None,
    text: Annotated[str | None, typer.Option(help="Part of label, model, workload or error; start of the id.")] = None,
    limit: Annotated[int, typer.Option(help="At most so many, the newest first.")] = 50,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """List runs, the newest first."""
    with _store(db) as store:
        rows = store.list_runs(RunFilter(text=text), limit=limit)
        if as_json:
            print(json.dumps([dataclasses.asdict(row) for row in rows]))
            return
        for row in rows:
            print(_line(row))


@app.command()
def export(
    file_format: Annotated[Format, typer.Option("--format", help="csv: a line a run; requests-csv: a line a request.")],
    run: Runs = None,
    db: Database = None,
) -> None:
    """Print runs as CSV, or as JSON that `record` takes."""
    with _store(db) as store:
        write = {
            Format.CSV: store.export_csv,
            Format.REQUESTS_CSV: store.export_requests_csv,
            Format.JSON: store.export_json,
        }[file_format]
        sys.stdout.write(write(run))


@app.command(hidden=True)
def revision(message: str) -> None:
    """For developers: draft the migration from the newest one to the tables as they are in the code now."""
    import tempfile

    import alembic.command

    from storage.database import alembic_config, database_url, make_engine, migrate, writer

    with tempfile.TemporaryDirectory() as folder:
        engine = make_engine(database_url(f"sqlite:///{folder}/draft.db"), 1.0)
        migrate(engine)
        with writer(engine).begin() as connection:
            alembic.command.revision(alembic_config(connection), message, autogenerate=True)
        engine.dispose()


@contextmanager
def _store(url: str | None) -> Iterator[Store]:
    """The store; an error that is the user's to mend becomes one line on standard error and exit code 2."""
    store = None
    try:
        store = open_store(url)
        yield store
    except StorageError as problem:
        print(f"error: {problem}", file=sys.stderr)
        raise typer.Exit(2) from problem
    finally:
        if store is not None:
            store.close()


def _keep(text: bytes) -> None:
    """Save runs that came through a pipe and could not be recorded; text that holds no runs is left alone."""
    with suppress(StorageError):
        for result in parse_documents(text):
            path = keep(result)
            if path is not None:
                print(f"The run was kept in {path}; afterwards: python -m storage record < {path}", file=sys.stderr)


def _line(row: RunRow) -> str:
    started = datetime.fromtimestamp(row.started_unix_s).astimezone().isoformat(" ", "seconds")
    rate = row.metrics.get("output_tokens_s")
    speed = "–" if rate is None else f"{rate:.1f} tokens/s"
    return f"{row.run_id}  {started}  {row.status:9}  {row.model}  {row.workload_name}  {speed}  {row.label}"
