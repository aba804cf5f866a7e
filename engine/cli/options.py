"""The options that several commands share, and what they lead to: a configuration, a loaded engine."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from engine.cli import console
from engine.config import DEFAULT_MODEL, EngineConfig, parse_assignments
from engine.errors import ConfigError

if TYPE_CHECKING:
    from engine.core import Engine

Options = TypeVar("Options")

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output and nothing else.")]
ModelName = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", help=f"{DEFAULT_MODEL} (default), a folder of safetensors, a .gguf file, or a hub id."
    ),
]
ComputeDtype = Annotated[
    str | None, typer.Option("--dtype", help="Compute dtype: auto (default), float32, bfloat16 or float16.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KNOB=VALUE", help="Set a knob of the engine; may be given several times."),
]


def engine_config(model: str | None, dtype: str | None, settings: list[str] | None) -> EngineConfig:
    """The knobs of ``--set``, to which ``--model`` and ``--dtype`` are shortcuts.

    Raises:
        ConfigError: naming the knob and the remedy; also where a shortcut contradicts ``--set``.
    """
    values: dict[str, Any] = dict(parse_assignments(settings or []))
    for name, value in (("model", model), ("dtype", dtype)):
        if value is not None and values.setdefault(name, value) != value:
            message = f"--{name} says {value!r}, --set says {values[name]!r}."
            raise ConfigError(message, field=name, remedy="Give it once.")
    return EngineConfig.from_mapping(values)


def load_engine(config: EngineConfig) -> Engine:
    """The engine with its model, with a bar on standard error while it loads."""
    with console.progress_bar() as report:
        report("starting", 0.0)
        from engine.core import Engine

        return Engine.load(config, report)


def with_options(options: Callable[..., Options]) -> Callable[[Callable[[Options], None]], Callable[..., None]]:
    """Make a function of one dataclass a command whose options are the dataclass's fields.

    Args:
        options: the dataclass; its annotations are typer's.
    """
    hints = typing.get_type_hints(options, include_extras=True)
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter(field.name, keyword, default=field.default, annotation=hints[field.name])
        for field in dataclasses.fields(options)  # type: ignore[arg-type]
    ]

    def decorate(command: Callable[[Options], None]) -> Callable[..., None]:
        @functools.wraps(command)
        def with_keywords(**values: Any) -> None:
            command(options(**values))

        with_keywords.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        with_keywords.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return with_keywords

    return decorate
