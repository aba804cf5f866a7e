"""CUDA is asked in one file of the engine and one of the kernels: what is not there cannot be rehearsed."""

from __future__ import annotations

import ast

import pytest

from engine import device
from tests.rehearsal.simulated_gpu import ROOT

SEAMS = {"engine/device.py", "kernels/device.py", "kernels/tune.py"}  # tune measures on the GPU that is there


@pytest.mark.parametrize("room", ["engine", "kernels", "pages", "storage"])
def test_nothing_but_the_seam_speaks_to_cuda(room):
    found = []
    for path in sorted((ROOT / room).rglob("*.py")):
        name = str(path.relative_to(ROOT))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            reaches = isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.cuda", "torch.accelerator")
            imports = isinstance(node, ast.Import | ast.ImportFrom) and "torch.cuda" in ast.unparse(node)
            pins = isinstance(node, ast.keyword) and node.arg == "pin_memory"
            if name not in SEAMS and (reaches or imports or pins):
                found.append(f"{name}:{node.lineno}")
    assert found == []


def test_another_runtime_answers_until_its_block_ends():
    class Twelve(device.CudaRuntime):
        def count(self) -> int:
            return 12

    before = device.num_gpus()
    with device.using(Twelve()):
        assert device.num_gpus() == 12
    assert device.num_gpus() == before
