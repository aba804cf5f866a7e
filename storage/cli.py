"""``python -m storage``: record, list, export and delete runs without a dashboard."""

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

from engine.measure.unsaved import kept_message
from storage.documents import parse_documents
from storage.errors import StorageError
from storage.queries import RunFilter, RunRow
from storage.spool import keep
from storage.store import Store, open_store

app = typer.Typer(
    help="The measured record: record, list, export and delete runs.", no_args_is_help=True, add_completion=False
)
Database = Annotated[
    str | None,
    typer.Option(
        "--db",
        help="SQLAlchemy URL. Default: HEADROOM_DB, else SQLite under HEADROOM_HOME. Give a URL with a password in "
        "HEADROOM_DB: other users of this machine can read a command line.",
    ),
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
        with _store(db, create=True) as store:
            report = store.import_json(text)
    except typer.Exit:
        _keep(text)
        raise
    print(json.dumps(dataclasses.asdict(report)))


@app.command("list")
def list_runs(
    db: Database = None,
    text: Annotated[str | None, typer.Option(help="Part of label, model, workload or error; start of the id.")] = None,
    limit: Annotated[int, typer.Option(min=0, help="At most so many, the newest first.")] = 50,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """List runs, the newest first, each in one line."""
    with _store(db) as store:
        rows = store.list_runs(RunFilter(text=text), limit=limit)
        if as_json:
            print(json.dumps([dataclasses.asdict(row) for row in rows]))
            return
        for row in rows:
            _write(_line(row) + "\n")


@app.command()
def export(
    file_format: Annotated[Format, typer.Option("--format", help="csv: a line a run; requests-csv: a line a request.")],
    run: Runs = None,
    db: Database = None,
    bom: Annotated[
        bool, typer.Option("--bom", help="Begin CSV with a byte order mark: Excel knows UTF-8 by it.")
    ] = False,
) -> None:
    """Print runs as CSV, or as JSON that `record` takes."""
    if bom and file_format == Format.JSON:
        raise typer.BadParameter("JSON has no byte order mark; leave --bom out.", param_hint="--bom")
    with _store(db) as store:
        if file_format == Format.JSON:
            _write(store.export_json(run))
        else:
            make = store.export_csv if file_format == Format.CSV else store.export_requests_csv
            _write(make(run, byte_order_mark=bom))


@app.command()
def delete(
    run: Annotated[list[str], typer.Option("--run", help="Run id; may be given several times.")], db: Database = None
) -> None:
    """Delete runs with everything recorded of them, also such as cannot be shown."""
    with _store(db) as store:
        print(json.dumps({"deleted": store.delete_runs(run)}))


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
def _store(url: str | None, *, create: bool = False) -> Iterator[Store]:
    """The store; an error that is the user's to mend becomes one line on standard error and exit code 2."""
    store = None
    try:
        store = open_store(url, create=create)
        yield store
    except StorageError as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        raise typer.Exit(2) from error
    finally:
        if store is not None:
            store.close()


def _keep(text: bytes) -> None:
    """Save runs that came through a pipe and could not be recorded; text that holds no runs is left alone."""
    with suppress(StorageError):
        for result in parse_documents(text).runs:
            path = keep(result)
            if path is not None:
                print(kept_message(path), file=sys.stderr)


def _write(text: str) -> None:
    """To standard output as UTF-8, whatever the locale says."""
    sys.stdout.flush()
    sys.stdout.buffer.write(text.encode())
    sys.stdout.buffer.flush()


def _line(row: RunRow) -> str:
    if row.unshowable is not None:
        return one_line(f"{row.run_id}  cannot be shown: {row.unshowable}  {row.label}")
    started = datetime.fromtimestamp(row.started_unix_s).astimezone().isoformat(" ", "seconds")
    rate = row.metrics.get("output_tokens_s")
    speed = "–" if rate is None else f"{rate:.1f} tokens/s"
    mark = "  disturbed" if row.disturbed else ""
    return one_line(
        f"{row.run_id}  {started}  {row.status:9}  {row.model}  {row.workload_name}  {speed}{mark}  {row.label}"
    )


def one_line(text: str) -> str:
    r"""The text in one line that moves no cursor: what does not print stands as its escape.

    >>> one_line("a\nb\x1b[31m\u2028")
    'a\\nb\\x1b[31m\\u2028'
    """
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)
