"""Runs the parity of all families in a process beside the suite: its tiny models keep one thread busy for minutes."""

import pytest


@pytest.mark.beside("families")
def test_every_family_generates_the_tokens_of_transformers_under_every_toggle(beside):
    run = beside.result("families")
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
