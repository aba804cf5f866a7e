"""What other threads may know of an engine: a snapshot that the loop publishes, and nothing of the engine itself."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.core import Engine
from engine.errors import ConfigError, RequestError
from engine.models import load_model
from engine.reconfigure import reconfigure
from engine.sampling.params import SamplingParams
from engine.worker.loop import EngineLoop

ROOT = Path(__file__).parents[2]
#: Rooms that run in threads of their own.
OTHER_THREADS = ("engine/server", "engine/measure", "engine/cli", "pages")


@pytest.fixture
def loop(tiny_llama: Path) -> Iterator[EngineLoop]:
    config = EngineConfig.from_mapping({"memory_limit_gib": 0.25, "max_num_seqs": 4})
    loop = EngineLoop(Engine(load_model(str(tiny_llama), dtype="float32", device="cpu"), config))
    loop.start()
    yield loop
    loop.stop()


def test_a_change_stands_in_the_snapshot_when_it_returns_and_an_older_snapshot_stays_what_it_was(loop: EngineLoop):
    before = loop.snapshot
    loop.reconfigure({"max_running": 2, "batching": "static"})
    assert (loop.snapshot.config.batching, loop.snapshot.config.max_running) == ("static", 2)
    assert (before.config.batching, before.config.max_running) == ("continuous", 4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        before.config = loop.snapshot.config  # type: ignore[misc]


def test_a_change_made_in_a_call_is_published_even_if_the_call_raises(loop: EngineLoop):
    def change_and_fail(engine: Engine) -> None:
        reconfigure(engine, {"batching": "static"})
        raise KeyError("after the change")

    with pytest.raises(KeyError):
        loop.call(change_and_fail)
    assert loop.snapshot.config.batching == "static"


def test_a_refused_change_leaves_the_snapshot(loop: EngineLoop):
    before = loop.snapshot
    with pytest.raises(ConfigError):
        loop.reconfigure({"block_size": 32})
    assert loop.snapshot is before


def test_another_cache_changes_what_requests_are_checked_against(loop: EngineLoop):
    longest = loop.snapshot.max_model_len
    prompt, params = [1] * (longest - 4), SamplingParams(max_tokens=8)
    with pytest.raises(RequestError, match="tokens a request may hold"):
        loop.submit(prompt, params, on_output=lambda output: None)
    before = loop.snapshot.admission
    loop.reconfigure({"kv_dtype": "int8"})
    assert loop.snapshot.admission is not before
    assert loop.snapshot.max_model_len == loop.status_now().max_model_len


def test_numbered_logs_are_read_without_the_stepping_thread(loop: EngineLoop):
    loop.reconfigure({"batching": "static"})
    loop.stop()  # nobody steps any more, and what happened can still be read
    assert [event.kind for event in loop.events.since(0)] == ["reconfigure"]
    assert loop.steps.last_index == -1


def reaches_into_the_engine(source: str) -> bool:
    """True if it reads ``loop.engine``, by whatever name the loop goes that ends in "loop"."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr == "engine":
            owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
            if owner.endswith("loop"):
                return True
    return False


def test_no_other_thread_reaches_into_the_engine():
    assert reaches_into_the_engine("self._loop.engine.config")
    assert reaches_into_the_engine("loop.engine")
    files = [file for room in OTHER_THREADS for file in (ROOT / room).rglob("*.py")]
    assert len(files) > 60
    assert [str(file) for file in files if reaches_into_the_engine(file.read_text())] == []
