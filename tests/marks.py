"""Which mark a test must have, and which tests run in one process when several share the suite.

``make check`` leaves out by mark what needs a model, a browser, a database server, Triton's interpreter or minutes. A
forgotten mark would bring it in by the back door, so a test that uses such a fixture without its mark is an error.
"""

from __future__ import annotations

from typing import Any

import pytest

#: The mark that whoever uses a fixture must have.
MARK_OF = {
    "default_gguf": "model",
    "hf_default_model": "model",
    "default_model_float32": "model",
    "browser": "browser",
    "postgres_server": "postgres",
    "beside": "beside",
}
#: Rooms whose tests start servers of several processes and measure how long these take to answer: one at a time.
SERVED = ("tests/e2e/", "tests/server/", "tests/attack/")
#: Files that compare with the default model in transformers, which takes a quarter of a minute to load.
REFERENCED = (
    "tests/parity/test_default_model_parity.py",
    "tests/models/test_decoder_parity.py",
    "tests/measure/test_measuring_the_real_engine.py",
)
#: Files of a minute: begun late, they would be waited for.
LONG = ("tests/core/test_execution.py", "tests/parity/test_families_parity.py")


def mistake(item: pytest.Item) -> str | None:
    """What is missing from a test's marks, or None."""
    used = getattr(item, "fixturenames", ())
    missing = {MARK_OF[name] for name in used if name in MARK_OF} - {mark.name for mark in item.iter_markers()}
    return f"{item.nodeid} needs the mark {', '.join(sorted(missing))}." if missing else None


def group(nodeid: str) -> str:
    """Tests of one group run in one process, one after another: those of a file, and all that measure servers."""
    path = nodeid.partition("::")[0]
    if path.startswith(SERVED):
        return "served"
    return "referenced" if path in REFERENCED else path


def rank(item: pytest.Item, *, in_parallel: bool) -> int:
    """Long groups first where processes share the suite; what waits for a command last where there is one process."""
    beside = item.get_closest_marker("beside") is not None
    if not in_parallel:
        return int(beside)
    found = group(item.nodeid)
    if found == "served":
        return 0
    return 1 if beside else 2 if found == "referenced" or found in LONG else 3


def group_scheduling() -> Any:
    """The class with which pytest-xdist hands out groups. (Its own groups, by mark, get lost with pytest 9.2.)"""
    from xdist.scheduler import LoadScopeScheduling

    class GroupScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group(nodeid)

    return GroupScheduling
