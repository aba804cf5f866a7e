"""Where log lines go: one handler on standard error, our rooms at the level that the operator asks for.

Each module has a logger of its own (``logging.getLogger(__name__)``), so a level can be set for a room. Libraries speak
from WARNING on. Imports nothing of the engine but its errors: the command line calls it first of all.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

from engine.errors import ConfigError, shown

ENVIRONMENT = "HEADROOM_LOG_LEVEL"
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
ROOMS = ("engine", "kernels", "pages", "storage")
FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def level_from_environment(environment: Mapping[str, str] | None = None) -> str:
    """The level that ``HEADROOM_LOG_LEVEL`` names, INFO if it is not set or empty.

    Raises:
        ConfigError: if it names none.

    >>> level_from_environment({"HEADROOM_LOG_LEVEL": "debug"}), level_from_environment({})
    ('DEBUG', 'INFO')
    """
    given = (os.environ if environment is None else environment).get(ENVIRONMENT, "")
    level = given.strip().upper() or "INFO"
    if level not in LEVELS:
        remedy = f"Set it to {', '.join(LEVELS[:-1])} or {LEVELS[-1]}."
        raise ConfigError(f"{shown(given)} is not a log level.", field=ENVIRONMENT, remedy=remedy)
    return level


def configure_logging(environment: Mapping[str, str] | None = None) -> None:
    """Have our rooms log from the level of ``HEADROOM_LOG_LEVEL`` on. May be called again.

    A handler that the process has already is used instead of ours.

    Raises:
        ConfigError: if the level is unknown.
    """
    level = level_from_environment(environment)
    logging.basicConfig(format=FORMAT, level=logging.WARNING)
    for room in ROOMS:
        logging.getLogger(room).setLevel(level)
