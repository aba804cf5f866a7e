"""Runs tests/kernels/interpreter in a process where Triton interprets its kernels."""

import os

import pytest

pytest.importorskip("triton")


@pytest.mark.interpreter
@pytest.mark.beside("interpreter")
def test_kernels_agree_with_their_references_in_the_interpreter(beside):
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("this process interprets already and runs the folder itself")
    run = beside.result("interpreter")
    # 5, "no tests collected", is a failure too: the folder must not fall silent.
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
