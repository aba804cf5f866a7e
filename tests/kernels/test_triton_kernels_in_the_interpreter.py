"""Runs tests/kernels/interpreter in a process where Triton interprets its kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

FOLDER = Path(__file__).parent / "interpreter"
ROOT = Path(__file__).parents[2]


def test_kernels_agree_with_their_references_in_the_interpreter():
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("this process interprets already and runs the folder itself")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=590,
    )
    # 5, "no tests collected", is a failure too: the folder must not fall silent.
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
