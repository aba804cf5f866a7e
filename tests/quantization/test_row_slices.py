"""A weight that is quantized and packed slice by slice is, bit for bit, the one that is made at once."""

from __future__ import annotations

import pytest
import torch

from engine.quantization import rows
from engine.quantization.formats import ModelDtypeFormat, WeightFormat
from engine.quantization.native import to_native
from engine.quantization.registry import QUANTIZED_FORMATS
from engine.quantization.rows import ROWS_MULTIPLE, Weight, WeightRows
from engine.quantization.triton import to_triton

CPU = torch.device("cpu")
NAMES = ("model", *QUANTIZED_FORMATS)


class Counted(WeightRows):
    """Rows of a tensor, and the largest slice that was asked for."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight
        self.shape = (weight.shape[0], weight.shape[1])
        self.largest = 0

    def read(self, start: int, stop: int) -> torch.Tensor:
        self.largest = max(self.largest, stop - start)
        return self.weight[start:stop].clone()


def make(name: str, weight: Weight) -> WeightFormat:
    if name == "model":
        return ModelDtypeFormat.read(weight, CPU, torch.bfloat16)
    return QUANTIZED_FORMATS[name](weight, 32, CPU, torch.bfloat16)


@pytest.mark.parametrize("num_rows", [320, 328])  # whole blocks, and none that an operator could use
@pytest.mark.parametrize("convert", [lambda format: format, to_native, to_triton], ids=["torch", "native", "triton"])
@pytest.mark.parametrize("name", NAMES)
def test_weight_made_slice_by_slice_is_the_one_made_at_once(name, convert, num_rows, monkeypatch):
    weight = torch.randn(num_rows, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    whole = convert(make(name, weight))
    monkeypatch.setattr(rows, "_SLICE_ELEMENTS", 1)
    counted = Counted(weight)
    sliced = convert(make(name, counted))
    assert counted.largest == ROWS_MULTIPLE
    assert (sliced.path, sliced.shape) == (whole.path, whole.shape)
    assert sliced.tensors().keys() == whole.tensors().keys()
    for role, tensor in whole.tensors().items():
        assert torch.equal(sliced.tensors()[role].view(torch.uint8), tensor.view(torch.uint8)), role
    assert torch.equal(sliced.dequantize(), whole.dequantize())


def test_slices_hold_whole_blocks_whatever_the_width():
    assert rows.slice_rows(1, CPU) % ROWS_MULTIPLE == 0
    assert rows.slice_rows(10**9, CPU) == ROWS_MULTIPLE
