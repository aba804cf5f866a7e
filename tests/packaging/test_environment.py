"""Setting up takes the build of torch that the machine can use, and looks where pip has been told to look."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / ".ci" / "environment.py"
PYTHON = Path("environment/bin/python")


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("environment", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def installs(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """What is installed: every attempt at the CPU build fails."""
    attempts: list[tuple[str, ...]] = []

    def uv(python: Path, *arguments: str, must: bool = True) -> bool:
        assert arguments[:3] == ("install", "--require-hashes", "-r")
        attempts.append((Path(arguments[3]).name, *arguments[4:]))
        return Path(arguments[3]).name == "requirements.lock"

    monkeypatch.setattr(script, "_uv", uv)
    monkeypatch.setattr(script, "_torch_version", lambda python: "")
    return attempts


def test_cpu_build_is_looked_for_where_pip_looks_then_at_home_then_given_up(
    script: ModuleType, installs: list[tuple[str, ...]], capsys: pytest.CaptureFixture[str]
):
    script._install(PYTHON, "auto")
    cpu = "requirements-cpu.lock"
    assert installs == [(cpu,), (cpu, "--torch-backend", "cpu"), ("requirements.lock",)]
    assert "No CPU build of torch" in capsys.readouterr().err


def test_cpu_build_that_is_found_is_all(script: ModuleType, monkeypatch: pytest.MonkeyPatch):
    taken: list[str] = []
    monkeypatch.setattr(script, "_uv", lambda python, *arguments, must=True: not taken.append(Path(arguments[3]).name))
    script._install(PYTHON, "cpu")
    assert taken == ["requirements-cpu.lock"]


def test_default_build_replaces_the_cpu_build(
    script: ModuleType, installs: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
):
    script._install(PYTHON, "cuda")
    monkeypatch.setattr(script, "_torch_version", lambda python: "2.13.0+cpu")
    script._install(PYTHON, "cuda")
    assert installs == [("requirements.lock",), ("requirements.lock", "--reinstall-package", "torch")]


def test_gpu_is_seen_by_its_driver(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not script._has_nvidia_gpu()
    for says, seen in (("GPU 0: NVIDIA H100", True), ("No devices were found", False)):
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\necho '{says}'\n")
        tool.chmod(0o755)
        assert script._has_nvidia_gpu() is seen


def test_places_of_pip_are_those_of_uv(script: ModuleType):
    settings = ":env:.index-url='https://mirror.example/simple'\nglobal.extra-index-url='\\nfile:///a\\nfile:///b'\n"
    assert script._as_uv_variables(settings + "global.find-links='/a /b'\nglobal.timeout='9'\n") == {
        "UV_DEFAULT_INDEX": "https://mirror.example/simple",
        "UV_INDEX": "file:///a file:///b",
        "UV_FIND_LINKS": "/a,/b",
    }


def test_uv_itself_comes_by_its_lock(script: ModuleType):
    lock = script.UV.read_text()
    assert f"uv=={script.UV_VERSION} " in lock
    assert "--hash=sha256:" in lock


def test_pip_takes_over_where_uv_reaches_no_index(script: ModuleType, monkeypatch: pytest.MonkeyPatch):
    commands: list[list[str]] = []
    monkeypatch.setattr(script, "_uv", lambda *arguments, must=True: False)
    monkeypatch.setattr(script.subprocess, "run", lambda command, check: commands.append(command))
    script._locked(PYTHON, script.DEFAULT, "--reinstall-package", "torch")
    (command,) = commands
    assert command[1:4] == ["-m", "pip", "install"]
    assert "--require-hashes" in command
    assert command[-3:] == ["-r", str(script.DEFAULT), "--force-reinstall"]
