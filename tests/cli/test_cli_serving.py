"""``headroom serve``, ``fetch`` and ``run``: what they hand on."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from engine.cli import app as cli
from engine.server.limits import ServerLimits
from tests.cli.conftest import REPOSITORY, Run
from tests.conftest import DEFAULT_MODEL


def test_serve_hands_its_options_on_and_takes_the_token_from_the_environment(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    calls: list[tuple[Any, dict[str, Any]]] = []
    module = ModuleType("engine.server.run")
    module.serve = lambda config, **options: calls.append((config, options))  # type: ignore[attr-defined]
    module.door_settings = lambda host, **options: (host, options)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "engine.server.run", module)
    monkeypatch.setenv("HEADROOM_ADMIN_TOKEN", "secret")
    ready = tmp_path / "ready.json"
    options = ("--port", 0, "--parent-pid", 77, "--ready-file", ready, "--set", "max_running=8")
    options += ("--max-choices", 7, "--allowed-host", "gpu.lab")
    assert run("serve", "--model", "some.gguf", *options)[0] == 0
    config, given = calls[0]
    assert (config.model, config.max_running) == ("some.gguf", 8)
    assert given == {
        "host": "127.0.0.1",
        "port": 0,
        "admin_token": "secret",
        "parent_pid": 77,
        "ready_file": ready,
        "limits": ServerLimits(max_choices=7),
        "door": ("127.0.0.1", {"hosts": ["gpu.lab"], "api_key": None, "cors_origins": (), "served_names": ()}),
    }
    monkeypatch.setenv("HEADROOM_ADMIN_TOKEN", "")
    run("serve")
    assert calls[1][1]["admin_token"] is None


def test_fetch_names_the_file_and_its_checksum(run: Run, tiny_llama: Path):
    code, out, _ = run("fetch", tiny_llama, "--json")
    document = json.loads(out)
    assert code == 0
    assert document.keys() == {"model", "path", "source", "sha256"}
    assert (document["path"], document["source"], len(document["sha256"])) == (str(tiny_llama), "safetensors", 64)


@pytest.mark.model
def test_fetch_is_quick_once_the_model_is_there(run: Run, default_gguf: Path):
    began = time.monotonic()
    code, out, _ = run("fetch", DEFAULT_MODEL, "--json")
    assert code == 0
    assert time.monotonic() - began < 10
    assert json.loads(out)["path"] == str(default_gguf)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, str]]]:
    """The programs that take this process's place, with their environments; none does."""
    programs: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(os, "execve", lambda path, command, environment: programs.append((command, environment)))
    return programs


def test_run_opens_the_dashboard_on_this_machine_alone_unless_told_otherwise(
    run: Run, started: list[tuple[list[str], dict[str, str]]], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("HEADROOM_MODEL", raising=False)
    assert run("run")[0] == run("run", "--host", "0.0.0.0", "--port", 80)[0] == 0
    dashboard = [sys.executable, "-P", "-m", "streamlit", "run", str(REPOSITORY / "app.py"), "--server.port"]
    assert [command for command, _ in started] == [
        [*dashboard, "8501"],
        [*dashboard, "80", "--server.address", "0.0.0.0"],
    ]
    assert started[0][1]["HEADROOM_MODEL"] == DEFAULT_MODEL


def test_run_names_a_model_so_that_its_worker_finds_it(
    run: Run, started: list[tuple[list[str], dict[str, str]]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some.gguf").touch()
    for given in ("some.gguf", "organization/model"):
        assert run("run", "--model", given)[0] == 0
    monkeypatch.setenv("HEADROOM_MODEL", "from-the-environment")
    assert run("run")[0] == 0
    models = [environment["HEADROOM_MODEL"] for _, environment in started]
    assert models == [str(tmp_path / "some.gguf"), "organization/model", "from-the-environment"]


def test_history_hands_every_argument_on(run: Run, started: list[tuple[list[str], dict[str, str]]]):
    assert run("history", "list", "--db", "sqlite:///x.db", "--help")[0] == 0
    command, environment = started[0]
    assert command == [sys.executable, "-P", "-m", "storage", "list", "--db", "sqlite:///x.db", "--help"]
    assert environment["PYTHONPATH"].split(os.pathsep)[0] == str(REPOSITORY)
    assert environment["HEADROOM_PROGRAM"] == "headroom history"


def test_commands_are_called_as_they_were_started(run: Run, capfd: pytest.CaptureFixture[str]):
    assert "See headroom generate --help." in run("generate", "--nonsense")[2]
    assert cli.main(["generate", "--nonsense"], program="python -m engine") == 2
    assert "See python -m engine generate --help." in capfd.readouterr().err


def test_log_level_is_that_of_the_environment(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HEADROOM_LOG_LEVEL", "chatty")
    code, _, err = run("plan", "--model", "Llama-3.1-8B", "--gpu", "L4 24GB")
    assert code == 2
    assert err.startswith("error: HEADROOM_LOG_LEVEL: ")
