"""The command line, run in this process or in one of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.cli import app as cli

REPOSITORY = Path(__file__).resolve().parents[2]
GENERATE_KEYS = {"text", "token_ids", "prompt_token_ids", "finish_reason", "config", "path", "metrics"}
WORKLOAD = {"name": "tiny", "num_requests": 3, "prompt_tokens": 12, "output_tokens": 5, "warmup_requests": 1}

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process: its exit code, standard output and standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        return code, *capfd.readouterr()

    return call


@pytest.fixture
def error_of(run: Run) -> Callable[..., dict[str, Any]]:
    """Run a command that must refuse its input, both ways: the JSON error, after checking the line for people."""

    def call(*arguments: object) -> dict[str, Any]:
        code, out, err = run(*arguments)
        assert code == 2
        assert out == ""
        assert "Traceback" not in err
        line = err.strip().splitlines()[-1]
        code, out, err = run(*arguments, "--json")
        assert code == 2
        document = json.loads(out)
        assert document.keys() == {"error"}
        error = document["error"]
        assert error.keys() == {"message", "field", "remedy"}
        assert line.startswith("error: ")
        assert error["message"] in line
        assert error["remedy"] in line
        assert "Traceback" not in err
        return error

    return call


def in_subprocess(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False, timeout=300, **options)
