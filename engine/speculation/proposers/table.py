"""The proposers that can be chosen, one row each: the values of the knob ``speculation`` besides ``off``."""

from __future__ import annotations

from collections.abc import Callable, Collection

from engine.config import EngineConfig, add_choice
from engine.speculation.proposers.base import Proposer
from engine.speculation.proposers.ngram import NgramProposer

PROPOSERS: dict[str, type[Proposer]] = {"ngram": NgramProposer}


def make_proposer(config: EngineConfig) -> Proposer | None:
    """The proposer that the knobs ask for; None if speculation is off."""
    if config.speculation == "off":
        return None
    return PROPOSERS[config.speculation].from_config(config)


def needs_new_proposer(config: EngineConfig, changed: Collection[str]) -> bool:
    """Whether the proposer that ``config`` asks for is another one than before the knobs ``changed``."""
    if config.speculation == "off":
        return "speculation" in changed
    return not {"speculation", *PROPOSERS[config.speculation].knobs}.isdisjoint(changed)


def register_proposer(name: str, proposer: type[Proposer]) -> Callable[[], None]:
    """Make a proposer a value of the knob ``speculation``: page, command line, API and engine have it from then on.

    Args:
        name: the value, e.g. ``"suffix"``.
        proposer: its class.

    Returns:
        A function that takes it away again; no engine may use it then.

    Raises:
        ConfigError: if the knob has that value already.
    """
    remove_choice = add_choice("speculation", name)
    PROPOSERS[name] = proposer

    def remove() -> None:
        remove_choice()
        del PROPOSERS[name]

    return remove
