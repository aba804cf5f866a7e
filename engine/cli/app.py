"""``headroom`` and ``python -m engine``: every command, and what becomes of an error.

Results go to standard output, everything else to standard error. With ``--json`` standard output holds exactly one
JSON document, in case of an error ``{"error": {"message", "field", "remedy"}}``. Exit codes: :mod:`engine.cli.exits`.

Whatever takes long to import (torch, transformers) is imported by the command that needs it.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

from engine import __version__
from engine.cli import console
from engine.cli.bench import bench
from engine.cli.cache import reset_prefix_cache
from engine.cli.exits import FAILED, INTERRUPTED, WRONG_INPUT
from engine.cli.fetch import fetch
from engine.cli.generate import generate
from engine.cli.history import PASSES_ARGUMENTS, history
from engine.cli.plan import plan
from engine.cli.run import run
from engine.cli.serve import serve
from engine.errors import HeadroomError
from engine.worker.logs import configure_logging

PROGRAM = "headroom"
logger = logging.getLogger(__name__)

#: In the order of the help. A new command is one file and one row.
COMMANDS: tuple[Callable[..., None], ...] = (run, serve, plan, bench, generate, fetch, reset_prefix_cache)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"{PROGRAM} {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Headroom: plan, tune and prove LLM inference on your own hardware."""


def command_line(*, completion: bool) -> typer.Typer:
    """All commands.

    Args:
        completion: offer ``--install-completion`` and ``--show-completion``; a shell completes programs, so not for
            ``python -m engine``.
    """
    program = typer.Typer(no_args_is_help=True, add_completion=completion, pretty_exceptions_enable=False)
    program.callback()(_root)
    for command in COMMANDS:
        program.command()(command)
    program.command(context_settings=PASSES_ARGUMENTS, add_help_option=False)(history)
    return program


def main(arguments: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Run a command; its exit code. Errors become one line, or with ``--json`` one document.

    Args:
        arguments: of the command line; None takes those of the process.
        program: what help and errors call it.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in given
    try:
        configure_logging()
        code = command_line(completion=program == PROGRAM)(args=given, prog_name=program, standalone_mode=False)
        return code if isinstance(code, int) else 0
    except HeadroomError as error:
        return _fail(error.to_dict(), str(error), as_json, WRONG_INPUT)
    except TyperException as error:
        return _fail_usage(error, program, as_json)
    except (KeyboardInterrupt, typer.Abort):
        document = {"message": "interrupted.", "field": None, "remedy": None}
        return _fail(document, "interrupted.", as_json, INTERRUPTED)
    except BrokenPipeError:  # whoever read the output has seen enough
        return FAILED
    except Exception as error:
        logger.critical("a command failed", exc_info=True)  # at every level: the remedy points to it
        message = f"{type(error).__name__}: {error}"
        remedy = "This is a bug in the engine: please report it with the traceback above."
        return _fail({"message": message, "field": None, "remedy": remedy}, f"{message}. {remedy}", as_json, FAILED)


def _fail(error: dict[str, Any], line: str, as_json: bool, code: int) -> int:
    if as_json:
        console.write_json(sys.stdout, {"error": error})
    else:
        console.note(f"error: {line}")
    return code


def _fail_usage(error: TyperException, program: str, as_json: bool) -> int:
    """A command line that cannot be parsed: the option at fault is the field."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context else program
    parameter = getattr(error, "param", None)
    field = parameter.name if parameter is not None else getattr(error, "option_name", None)
    message = error.format_message()
    remedy = f"See {command} --help."
    if not message:  # no command was given: its help has been shown
        return WRONG_INPUT
    return _fail({"message": message, "field": field, "remedy": remedy}, f"{message} {remedy}", as_json, WRONG_INPUT)
