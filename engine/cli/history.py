"""``headroom history``: the recorded runs, through the storage room's own command in a process of its own.

The engine does not import ``storage``; this file knows how its command is started.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import typer

_ROOT = Path(__file__).resolve().parents[2]

#: Everything after the command's name, its ``--help`` included, is for the other command.
PASSES_ARGUMENTS = {"ignore_unknown_options": True, "allow_extra_args": True, "allow_interspersed_args": False}


def history(context: typer.Context) -> None:
    """List, show, record, export and import the runs on record (see headroom history --help)."""
    sys.stdout.flush()
    os.execve(
        sys.executable,
        [*storage_command(), *context.args],
        storage_environment({"HEADROOM_PROGRAM": context.command_path}),
    )


def storage_command() -> list[str]:
    """``python -m storage``; ``-P``: a folder of that name in the current one is not ours."""
    return [sys.executable, "-P", "-m", "storage"]


def storage_environment(values: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment in which :func:`storage_command` finds its room, from a source tree too.

    Args:
        values: variables to set in it; HEADROOM_PROGRAM is what its help calls it.
    """
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, **(values or {})}
