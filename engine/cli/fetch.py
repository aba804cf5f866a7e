"""``headroom fetch``: a model onto this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from engine.cli import console
from engine.cli.options import AsJson
from engine.config import DEFAULT_MODEL


def fetch(
    model: Annotated[str, typer.Argument(help="smollm2-135m, a hub id, or a local path to check.")] = DEFAULT_MODEL,
    as_json: AsJson = False,
) -> None:
    """Make sure that a model is on this machine, complete and verified."""
    with console.standard_output() as out:
        with console.progress_bar() as report:
            from engine.models import resolve

            checkpoint = resolve(model, report)
            sha256 = checkpoint.fingerprint()
        path = str(checkpoint.path)
        if as_json:
            console.write_json(out, {"model": model, "path": path, "source": checkpoint.source, "sha256": sha256})
        else:
            print(f"{model}: {path}", file=out)
