"""``headroom serve``: a model over HTTP."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from engine.cli.options import ComputeDtype, ModelName, Settings, engine_config
from engine.server.limits import ServerLimits, with_limit_options


@with_limit_options
def serve(
    model: ModelName = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    settings: Settings = None,
    dtype: ComputeDtype = None,
    parent_pid: Annotated[
        int | None, typer.Option(min=1, max=2**31 - 1, help="Exit once the process of this id is no longer the parent.")
    ] = None,
    ready_file: Annotated[
        Path | None, typer.Option(help="File that is written once the server listens: its port and pid, JSON.")
    ] = None,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(help="What the model is called in the API instead of its own name; may be given several times."),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            help="Key that /v1 asks for. Better set HEADROOM_API_KEY: every user of the machine can read arguments."
        ),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(help="Host that requests may be for, besides this machine's own; * is any. Several are possible."),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="Origin whose web pages may use /v1; * is any. May be given several times. Default: none."),
    ] = None,
    **limits: Any,
) -> None:
    """Serve a model over HTTP (OpenAI API, health, metrics, administration) until interrupted.

    Administration needs a token: that of the environment variable HEADROOM_ADMIN_TOKEN, or a fresh one that is shown on
    standard error. Each limit may also be set as an environment variable, e.g. HEADROOM_MAX_BODY_BYTES.
    """
    accepted = ServerLimits(**limits)
    config = engine_config(model, dtype, settings)
    from engine.server.run import door_settings
    from engine.server.run import serve as serve_http

    door = door_settings(
        host,
        hosts=allowed_host or (),
        api_key=api_key,
        cors_origins=cors_origin or (),
        served_names=served_model_name or (),
    )
    token = os.environ.get("HEADROOM_ADMIN_TOKEN") or None
    serve_http(
        config,
        host=host,
        port=port,
        admin_token=token,
        parent_pid=parent_pid,
        ready_file=ready_file,
        limits=accepted,
        door=door,
    )
