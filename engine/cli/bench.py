"""``headroom bench``: a workload, its measurement, and the run put on record."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import subprocess
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from engine.cli import console
from engine.cli.exits import FAILED, INTERRUPTED
from engine.cli.history import storage_command, storage_environment
from engine.cli.options import AsJson, ComputeDtype, ModelName, Settings, engine_config, load_engine

if TYPE_CHECKING:
    from engine.config import EngineConfig
    from engine.measure.results import RunResult

_RECORD_HELP = (
    "SQLAlchemy URL of the database to put the run on record in. Other users of this machine can read a command line: "
    "for a URL with a password, give --json, pipe into `headroom history record`, and set HEADROOM_DB there."
)


def bench(
    workload: Annotated[str, typer.Option("--workload", "-w", help="Name of a workload, or path of a JSON file.")],
    model: ModelName = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="Of the workload: the same seed gives the same requests.")
    ] = 0,
    settings: Settings = None,
    dtype: ComputeDtype = None,
    label: Annotated[str, typer.Option(help="Free text on the record of the run.")] = "",
    record: Annotated[str | None, typer.Option(metavar="URL", help=_RECORD_HELP)] = None,
    as_json: AsJson = False,
) -> None:
    """Run a workload and measure it. Interrupting it ends the run; what was measured until then is kept."""
    config = engine_config(model, dtype, settings)
    with console.standard_output() as out:
        result = _measure(config, workload, seed, label)
        document = dataclasses.asdict(result)
        if as_json:
            console.write_json(out, document)
        else:
            _show_run(out, result)
        recorded = record is None or put_on_record(document, record)
    if result.status == "cancelled":
        raise typer.Exit(INTERRUPTED)
    if result.status != "completed" or not recorded:
        raise typer.Exit(FAILED)


def _measure(config: EngineConfig, workload: str, seed: int, label: str) -> RunResult:
    """Load the model, run the workload on it, with a bar on standard error."""
    from engine.measure import get_workload

    definition = get_workload(workload)  # a mistake in it shows before the model is loaded
    engine = load_engine(config)
    from engine.measure import run_workload
    from engine.worker.loop import EngineLoop

    loop = EngineLoop(engine)
    loop.start()
    try:
        with _interrupts() as cancel, console.progress_bar() as report:
            return run_workload(
                loop,
                definition,
                seed=seed,
                label=label,
                cancel=cancel,
                progress=lambda state: report(state.detail, state.done / state.total),
            )
    finally:
        loop.stop()


@contextlib.contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C (or SIGTERM) sets; the second one stops at once."""
    interrupted = threading.Event()

    def interrupt(signum: int, frame: object) -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupted
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _show_run(out: TextIO, result: RunResult) -> None:
    from engine.measure.metrics import METRICS

    record = result.provenance
    title = f"{record.workload['name']} on {record.model}: {result.status}"
    values = [(info, result.metrics.get(name)) for name, info in METRICS.items()]
    rows = [(info.label, console.number(value), info.unit) for info, value in values if value is not None]
    console.write_table(out, title, rows)
    path = ", ".join(f"{name}: {what}" for name, what in record.path.items())
    lines = ["", f"run {result.run_id}, seed {record.seed}, config {record.config_hash}", f"ran on {path}"]
    print("\n".join(lines + ([f"error: {result.error}"] if result.error else [])), file=out)


def put_on_record(document: dict[str, Any], url: str) -> bool:
    """Put the run on record through the storage room's own command; False, with the run in a file, if it fails."""
    from engine.measure.unsaved import keep_document, kept_message

    environment = storage_environment({"HEADROOM_DB": url})  # not as an argument: everybody here can read those
    command = [*storage_command(), "record"]
    text = json.dumps(document)
    done = subprocess.run(command, input=text, capture_output=True, text=True, env=environment, check=False)
    if done.returncode == 0:
        console.note(f"run {document['run_id']} is on record.")
        return True
    console.note("error: the run could not be put on record:")
    told = (done.stderr or done.stdout).strip()
    for line in told.splitlines()[-5:]:
        console.note(f"  {line}")
    if f"headroom-run-{document['run_id']}.json" not in told:  # it ended before it could keep the run itself
        path = keep_document(document)
        console.note("It could not be kept in a file either." if path is None else kept_message(path))
    return False
