"""Which mark a test must have, and which tests run in one process when several share the suite.

``make check`` leaves out by mark what needs a model, a browser, a database server, Triton's interpreter or minutes. A
forgotten mark would bring it in by the back door, so a test that uses such a fixture without its mark is an error.
"""

from __future__ import annotations

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


def mistake(item: pytest.Item) -> str | None:
    """What is missing from a test's marks, or None."""
    used = getattr(item, "fixturenames", ())
    missing = {MARK_OF[name] for name in used if name in MARK_OF} - {mark.name for mark in item.iter_markers()}
    return f"{item.nodeid} needs the mark {', '.join(sorted(missing))}." if missing else None


def group(item: pytest.Item) -> str:
    """The tests with this name run in one process, one after another: those of a file, and all that measure servers."""
    beside = item.get_closest_marker("beside")
    if beside is not None:
        return f"beside {beside.args[0]}"
    path = item.nodeid.partition("::")[0]
    if path.startswith(SERVED):
        return "served"
    return "default model" if "hf_default_model" in getattr(item, "fixturenames", ()) else path


def rank(item: pytest.Item, *, in_parallel: bool) -> int:
    """Long groups first where processes share the suite; what waits for a command last where there is one process."""
    beside = item.get_closest_marker("beside") is not None
    if not in_parallel:
        return int(beside)
    return {"served": 0, "default model": 2}.get(group(item), 1 if beside else 3)
