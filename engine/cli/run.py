"""``headroom run``: the dashboard, with an engine worker that it starts and stops."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from engine.config import DEFAULT_MODEL, EngineConfig
from engine.errors import HeadroomError

#: The folder that holds ``app.py`` and ``.streamlit/config.toml``: the source tree, or site-packages once installed.
_ROOT = Path(__file__).resolve().parents[2]


def run(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            envvar="HEADROOM_MODEL",
            help=f"The model to load first: {DEFAULT_MODEL} (default), a folder of safetensors, a .gguf file, or a hub "
            "id.",
        ),
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on. Default: 127.0.0.1, this machine alone.")
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8501,
) -> None:
    """Open the dashboard in this terminal; it starts an engine worker and ends with Ctrl-C.

    Before listening on an address that others can reach, set up a login and HEADROOM_ALLOWED_HOSTS (documentation:
    Security).
    """
    if not (_ROOT / "app.py").is_file():
        raise HeadroomError("the dashboard is not part of this installation.", remedy="Install Headroom again.")
    environment = {**os.environ, "HEADROOM_MODEL": _found(model or DEFAULT_MODEL)}
    sys.stdout.flush()
    # In place of this process, so that whoever started it supervises and stops the dashboard itself.
    os.execve(sys.executable, dashboard_command(host, port), environment)


def dashboard_command(host: str | None, port: int) -> list[str]:
    """The command that starts the dashboard.

    Streamlit reads ``.streamlit/config.toml`` in the folder of the script that it runs: settings and themes are the
    same from a source tree and installed. ``-P``: a folder named ``engine`` in the current one is not ours.

    Args:
        host: address to listen on; None leaves it to the settings (loopback).
        port: to listen on.
    """
    command = [sys.executable, "-P", "-m", "streamlit", "run", str(_ROOT / "app.py"), "--server.port", str(port)]
    return command + (["--server.address", host] if host else [])


def _found(model: str) -> str:
    """A path as the worker finds it, which runs in a folder of its own; names and hub ids as they are."""
    name = EngineConfig.from_mapping({"model": model}).model
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name
