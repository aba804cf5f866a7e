"""The log says what an operator looks for, at the level that the environment asks for."""

from __future__ import annotations

import logging
import queue
import subprocess
import sys
from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.core import Engine
from engine.errors import ConfigError
from engine.outputs import RequestOutput
from engine.reconfigure import reconfigure
from engine.sampling.params import SamplingParams
from engine.worker.logs import ROOMS, configure_logging, level_from_environment
from engine.worker.loop import EngineLoop

KNOBS = {"memory_limit_gib": 0.25, "max_num_seqs": 4}


@pytest.fixture(autouse=True)
def _at_info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="engine")


def load(folder: Path) -> Engine:
    return Engine.load(EngineConfig.from_mapping({**KNOBS, "model": str(folder), "dtype": "float32"}))


@pytest.fixture
def engine(tiny_llama: Path) -> Engine:
    return load(tiny_llama)


def lines(caplog: pytest.LogCaptureFixture, room: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == room]


def test_a_load_is_one_line_with_model_memory_blocks_and_seconds(tiny_llama: Path, caplog: pytest.LogCaptureFixture):
    engine = load(tiny_llama)
    (line,) = lines(caplog, "engine.core")
    assert line.startswith(f"loaded {engine.model.name} in ")
    blocks = engine.envelope.num_blocks
    assert f"KV cache {engine.cache.nbytes / 2**30:.3f} GiB in {blocks:,} blocks of 16 tokens" in line
    assert f"weights {engine.model.weight_bytes() / 2**30:.3f} GiB" in line


def test_a_change_of_knobs_is_one_line_with_what_tier_and_pause(engine: Engine, caplog: pytest.LogCaptureFixture):
    reconfigure(engine, {"batching": "static"})
    result = reconfigure(engine, {"weights": "int8"})
    reconfigure(engine, {"weights": "int8"})  # changes nothing
    live, swap = lines(caplog, "engine.reconfigure")
    assert live.startswith("batching: continuous → static: live tier, paused ")
    assert swap == f"weights: model → int8: swap tier, paused {result.pause_ms:.1f} ms, 0 requests in flight"


def test_a_failed_step_is_one_error_that_names_its_requests(
    engine: Engine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    step, fails = engine.step, [True]

    def once() -> list[RequestOutput]:
        if fails.pop() if fails else False:
            raise ValueError("planted")
        return step()

    monkeypatch.setattr(engine, "step", once)
    loop, outputs = EngineLoop(engine), queue.SimpleQueue[RequestOutput]()
    loop.start()
    try:
        loop.submit([1, 2], SamplingParams(max_tokens=2), on_output=outputs.put, request_id="asked-by-a-client")
        while not outputs.get(timeout=30).finished:
            pass
    finally:
        loop.stop()
    (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert record.getMessage() == "a step failed: ValueError: planted (requests: 'asked-by-a-client')"
    assert record.exc_info is not None, "the traceback goes with it"


def test_a_request_that_fails_is_one_error_with_its_id(
    engine: Engine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    def fail(*arguments: object, **named: object) -> None:
        raise ValueError("planted")

    engine.add_request("victim", [1, 2], SamplingParams(max_tokens=2))
    monkeypatch.setattr(engine.streams["victim"].detokenizer, "append", fail)
    engine.step()
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert record.levelno == logging.ERROR
    assert record.getMessage().startswith("request 'victim' ended: ")
    assert "ValueError: planted" in record.getMessage()


@pytest.mark.parametrize(("given", "level"), [("", "INFO"), (" debug ", "DEBUG"), ("Error", "ERROR")])
def test_the_level_is_that_of_the_environment(given: str, level: str):
    before = {room: logging.getLogger(room).level for room in ROOMS}
    try:
        configure_logging({"HEADROOM_LOG_LEVEL": given})
        assert {logging.getLevelName(logging.getLogger(room).level) for room in ROOMS} == {level}
    finally:
        for room, old in before.items():
            logging.getLogger(room).setLevel(old)


@pytest.mark.parametrize("given", ["loud", "20", "INFO,DEBUG", "NOTSET"])
def test_an_unknown_level_is_refused_with_the_names_of_those_there_are(given: str):
    with pytest.raises(ConfigError, match="is not a log level") as refused:
        level_from_environment({"HEADROOM_LOG_LEVEL": given})
    assert refused.value.field == "HEADROOM_LOG_LEVEL"
    assert "DEBUG, INFO, WARNING, ERROR or CRITICAL" in str(refused.value.remedy)


def test_setting_up_the_log_imports_no_torch():
    code = "import sys; from engine.worker.logs import configure_logging; configure_logging(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "engine.core"} & set(done.stdout.split())


def test_nothing_prints_a_traceback_past_the_log():
    root = Path(__file__).parents[2]
    files = [file for room in ROOMS for file in (root / room).rglob("*.py")]
    assert len(files) > 100
    guilty = [file.name for file in files if "traceback.print_" in file.read_text() and file.parent.name != "cli"]
    assert guilty == [], "a bug's traceback belongs into the log, but for the command line's last word"
