"""``headroom reset-prefix-cache``: what is asked of a running worker."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from engine.cli import console
from engine.cli.options import AsJson


def reset_prefix_cache(
    url: Annotated[str, typer.Option(help="Address of the worker.")] = "http://127.0.0.1:8000",
    as_json: AsJson = False,
) -> None:
    """Make a running worker forget its reusable prefixes; needs its token in HEADROOM_ADMIN_TOKEN."""
    from engine.worker.client import EngineClient

    with console.standard_output() as out:
        client = EngineClient(url, os.environ.get("HEADROOM_ADMIN_TOKEN", ""))
        try:
            blocks = client.reset_prefix_cache()
        finally:
            client.close()
        if as_json:
            console.write_json(out, {"blocks": blocks})
        else:
            print(f"{blocks:,} blocks forgotten", file=out)
