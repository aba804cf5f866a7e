"""Where the command line writes: results on standard output, everything else on standard error."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO

ProgressCallback = Callable[[str, float], None]
"""(what is being done, fraction done from 0 to 1)."""

_QUIET_S = 10.0


@contextlib.contextmanager
def standard_output() -> Iterator[TextIO]:
    """The process's standard output, for the result alone.

    Until the end of the block everything else that is written to standard output, by a library, by C code or by a child
    process, goes to standard error: whoever reads the pipe finds the result and nothing else.
    """
    sys.stdout.flush()
    descriptor = os.dup(1)
    previous = sys.stdout
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    try:
        # a character that the terminal cannot show is no reason to lose the rest
        with open(os.dup(descriptor), "w", encoding="utf-8", errors="replace") as result:
            yield result
    finally:
        sys.stdout = previous
        os.dup2(descriptor, 1)
        os.close(descriptor)


def write_json(out: TextIO, document: dict[str, Any]) -> None:
    """Write one JSON document and a line end; all or, on a value that is no JSON, nothing."""
    out.write(json.dumps(document, allow_nan=False) + "\n")
    out.flush()


def write_table(out: TextIO, title: str, rows: Iterable[tuple[str, str, str]]) -> None:
    """Write a title and (what, value, unit) rows below it."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    for row in rows:
        table.add_row(*row)
    out.write(f"{title}\n\n")  # by itself: in the table it would be wrapped to the table's width
    Console(file=out, markup=False, highlight=False, emoji=False).print(table)
    out.flush()


def number(value: float) -> str:
    """For people: whole numbers whole, others with four significant digits at least.

    >>> number(12345.0), number(1234.56), number(0.123456)
    ('12,345', '1,235', '0.1235')
    """
    if value == int(value):
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def note(line: str) -> None:
    """One line on standard error."""
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def progress_bar() -> Iterator[ProgressCallback]:
    """A bar on standard error while it is a terminal; else a line now and then, and none for what is quick."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False) as bar:
        task = bar.add_task("starting", total=1.0)
        yield lambda stage, fraction: bar.update(task, description=stage, completed=fraction)


def _lines() -> ProgressCallback:
    last = time.monotonic()

    def report(stage: str, fraction: float) -> None:
        nonlocal last
        if time.monotonic() - last >= _QUIET_S:
            last = time.monotonic()
            note(f"{stage}: {fraction:.0%}")

    return report
