"""The table of execution modes: the values of the knob ``execution``, one row and one file for each."""

from __future__ import annotations

from collections.abc import Callable

from engine.config import add_choice
from engine.execution.auto import AutoMode
from engine.execution.compiled import CompiledMode
from engine.execution.eager import EagerMode
from engine.execution.fused import FusedMode
from engine.execution.graphs import GraphsMode
from engine.execution.mode import ExecutionMode
from engine.execution.native import NativeMode

MODES: dict[str, type[ExecutionMode]] = {
    "auto": AutoMode,
    "eager": EagerMode,
    "native": NativeMode,
    "fused": FusedMode,
    "compiled": CompiledMode,
    "graphs": GraphsMode,
}


def register_mode(name: str, mode: type[ExecutionMode]) -> Callable[[], None]:
    """Make a mode a value of the knob ``execution``: page, command line, API and engine have it from then on.

    Args:
        name: the value, e.g. ``"toy"``; the name by which the mode calls itself.
        mode: its class.

    Returns:
        A function that takes it away again; no engine may use it then.

    Raises:
        ValueError: if the mode calls itself by another name: status and record would name what nobody can ask for.
        ConfigError: if the knob has that value already.
    """
    if mode.name != name:
        raise ValueError(f"{mode.__name__} calls itself {mode.name!r}, not {name!r}")
    remove_choice = add_choice("execution", name)
    MODES[name] = mode

    def remove() -> None:
        remove_choice()
        del MODES[name]

    return remove
