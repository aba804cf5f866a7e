"""While the C++ kernels are built, health says so, and how far it is."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.server import host
from kernels.cpu import build
from kernels.trust import private_dir
from tests.server.conftest import ServedApp, wait_until

# A compiler that takes its time and makes nothing that could be loaded.
COMPILER = """#!/bin/sh
case "$1" in --version) echo "slow 1.0"; exit 0;; esac
sleep 0.7
while [ "$1" != "-o" ]; do shift; done
echo made > "$2"
"""


@pytest.fixture
def slow_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that a compiler without haste builds into. The real kernels are loaded before."""
    if reason := build.why_not():
        pytest.skip(reason)
    compiler = tmp_path / "slow-c++"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(build, "_folder", lambda: private_dir(tmp_path / "native", tmp_path))
    monkeypatch.setattr(build, "_EXPECTED_S", 3.0)
    return tmp_path / "native"


def test_health_says_that_kernels_are_built_and_how_far_it_is(
    slow_compiler: Path, start_app: Callable[..., ServedApp], tiny_config: EngineConfig
):
    served = start_app(tiny_config)
    seen: list[tuple[str, float]] = []

    def ready() -> bool:
        health = served.client.health()
        if health["stage"].startswith("building"):
            assert health["status"] == "loading"
            seen.append((health["stage"], health["progress"]))
        return bool(health["status"] == "ready")

    wait_until(ready, 60)
    assert seen[0][0].startswith("building CPU kernels, once: ")
    assert seen[-1][0].endswith(" %")
    fractions = [fraction for _, fraction in seen]
    assert fractions == sorted(fractions)
    assert 0 <= fractions[0] < fractions[-1] < 1
    assert list(slow_compiler.glob("native-*.so"))


def test_nothing_is_said_where_nothing_is_to_be_built(slow_compiler: Path, tiny_config: EngineConfig):
    said: list[float] = []
    build.build(said.append)
    assert said
    said.clear()
    build.build(said.append)
    assert said == []
    for knobs in ({"attention": "sdpa", "linear": "torch", "execution": "eager"}, {"device": "cpu"}):
        host.build_ahead(tiny_config.with_changes(knobs), lambda stage, fraction: said.append(fraction))
    assert said == []


def test_compiler_that_fails_or_is_missing_does_not_stop_the_load(
    slow_compiler: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("CXX", "/no/such/compiler")
    build.build(pytest.fail)
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\nexit 1\n")
    os.chmod(broken, 0o755)
    monkeypatch.setenv("CXX", str(broken))
    build.build(lambda fraction: None)
    assert not list(slow_compiler.glob("native-*.so"))
