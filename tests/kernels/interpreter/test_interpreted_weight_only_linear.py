"""Products with weights of 4 and 8 bits, interpreted: packing, the three ways, and programs that share an output."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.quantization.formats import ModelDtypeFormat
from engine.quantization.int4 import Int4Format
from engine.quantization.int8 import Int8Format
from engine.quantization.triton import TritonFormat, to_triton
from kernels.weight_only_linear import (
    CONFIGS,
    default_config,
    dequantize_triton,
    weight_only_linear_reference,
    weight_only_linear_triton,
)
from kernels.weight_only_packing import NF4_LEVELS, pack_int4, pack_int8, pack_nf4

TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3}


def before_nan(tensor):
    """The same values, with NaN behind them in memory: what is read beyond the end shows."""
    wide = torch.full((tensor.shape[0] + 8, *tensor.shape[1:]), float("nan"), dtype=tensor.dtype)
    wide[: tensor.shape[0]] = tensor
    return wide[: tensor.shape[0]]


def random_weight(kind, outputs, inputs, group_size=0, *, zeros=False, act_order=False):
    """A packed weight and its values, float32 [N, K], by a formula that shares no code with the packing."""
    if kind == "int8":
        q, scales = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8), torch.rand(outputs) + 0.1
        return pack_int8(q, scales), q.float() * scales[:, None]
    groups = inputs // group_size
    q = torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8)
    scales = torch.rand(outputs, groups) + 0.1
    group_of = torch.arange(inputs) // group_size
    if kind == "nf4":
        return pack_nf4(q, scales), torch.tensor(NF4_LEVELS)[q.long()] * scales[:, group_of]
    group_of = group_of[torch.randperm(inputs)] if act_order else group_of
    offsets = torch.randn(outputs, groups) if zeros else None
    values = (q.float() - 8) * scales[:, group_of] + (0 if offsets is None else offsets[:, group_of])
    return pack_int4(q, scales, offsets, group_of if act_order else None), values


WEIGHTS = {
    "int4, one block": ("int4", 32, 128, 128),
    "int4, groups of 32 that do not fill the last block": ("int4", 40, 192, 32),
    "int4, 16 columns a group": ("int4", 8, 96, 16),
    "int4, groups larger than a block": ("int4", 16, 512, 256),
    "int4, one group": ("int4", 17, 72, 72),
    "int8": ("int8", 50, 100, 0),
    "int8, one output": ("int8", 1, 64, 0),
    "nf4": pytest.param(("nf4", 33, 256, 64), marks=pytest.mark.waiting),
}


@pytest.mark.parametrize("shape", WEIGHTS.values(), ids=WEIGHTS.keys())
def test_packing_keeps_every_value(shape):
    weight, values = random_weight(*shape)
    torch.testing.assert_close(weight.dequantize(), values, atol=1e-6, rtol=1e-6)
    index = torch.tensor([0, shape[1] - 1, 0])
    torch.testing.assert_close(weight.rows(index), values[index], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(dequantize_triton(weight, torch.float32), values, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("shape", WEIGHTS.values(), ids=WEIGHTS.keys())
@pytest.mark.parametrize("num_rows", [1, 2, 17, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_product_of_any_number_of_rows_is_that_of_the_values(shape, num_rows, dtype):
    weight, values = random_weight(*shape)
    weight = dataclasses.replace(weight, scales=before_nan(weight.scales))
    x, bias = torch.randn(num_rows, shape[2]).to(dtype), torch.randn(shape[1]).to(dtype)
    expected = x.double() @ values.double().t() + bias.double()
    found = weight_only_linear_triton(x, weight, bias)
    assert found.dtype == dtype
    assert (found.double() - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()
    reference = weight_only_linear_reference(x, weight, bias)
    assert (found.double() - reference.double()).abs().max() <= TOLERANCE[dtype] * expected.abs().max()


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    groups=st.integers(1, 5),
    group_size=st.sampled_from([16, 32, 64, 128]),
    outputs=st.integers(1, 70),
    num_rows=st.sampled_from([1, 2, 16, 18]),
    zeros=st.booleans(),
    act_order=st.booleans(),
    num_splits=st.integers(1, 4),
)
def test_groups_zeros_act_order_and_splits_in_any_combination(
    groups, group_size, outputs, num_rows, zeros, act_order, num_splits
):
    weight, values = random_weight("int4", outputs, groups * group_size, group_size, zeros=zeros, act_order=act_order)
    x = torch.randn(num_rows, groups * group_size)
    expected = x.double() @ values.double().t()
    for _ in range(2):  # the second time with the counters that the first left behind
        found = weight_only_linear_triton(x, weight, num_splits=num_splits)
        assert (found.double() - expected).abs().max() <= 5e-6 * max(1.0, expected.abs().max())
        assert not weight.counters.any()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_gives_the_product(name):
    weight, values = random_weight("int4", 200, 256, 128, zeros=True)
    x = torch.randn(1 if CONFIGS[name].way == "gemv" else 19, 256)
    expected = x @ values.t()
    found = weight_only_linear_triton(x, weight, config=name)
    assert (found - expected).abs().max() <= 5e-6 * expected.abs().max()


def test_programs_that_share_an_output_add_up_in_the_same_order_whoever_comes_last():
    weight, _ = random_weight("int4", 64, 1024, 128)
    x = torch.randn(1, 1024)
    first = weight_only_linear_triton(x, weight, num_splits=4)
    assert all(torch.equal(first, weight_only_linear_triton(x, weight, num_splits=4)) for _ in range(3))


def test_rows_of_a_wider_matrix_are_taken_and_others_refused():
    weight, values = random_weight("int8", 40, 64)
    wide = torch.randn(3, 128)
    torch.testing.assert_close(
        weight_only_linear_triton(wide[:, :64], weight), wide[:, :64] @ values.t(), atol=1e-3, rtol=0
    )
    with pytest.raises(ValueError, match="x must be"):
        weight_only_linear_triton(wide, weight)
    with pytest.raises(ValueError, match="contiguous in its last"):
        weight_only_linear_triton(wide[:, ::2], weight)
    with pytest.raises(ValueError, match="takes one row"):
        weight_only_linear_triton(wide[:, :64], weight, config="gemv 64")
    assert weight_only_linear_triton(wide[:0, :64], weight).shape == (0, 40)


def test_groups_that_cannot_be_packed_are_refused():
    q = torch.zeros(4, 48, dtype=torch.uint8)
    with pytest.raises(ValueError, match="groups of 24"):
        pack_int4(q, torch.ones(4, 2))
    with pytest.raises(ValueError, match="group_index"):
        pack_int4(q[:, :32], torch.ones(4, 2), group_index=torch.zeros(32, dtype=torch.int64))


def test_few_rows_never_take_the_way_that_unpacks():
    ways = [CONFIGS[default_config(rows)].way for rows in (1, 2, 16, 128, 129, 4096)]
    assert ways == ["gemv", "tile", "tile", "tile", "dequantize", "dequantize"]


# -- as the engine has them -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [
    lambda weight: Int8Format(weight, torch.device("cpu"), torch.float32),
    lambda weight: Int4Format(weight, 32, torch.device("cpu"), torch.float32),
])  # fmt: skip
def test_an_engine_format_means_the_same_numbers_after_its_conversion(make):
    plain = make(torch.randn(48, 96))
    converted = to_triton(plain)
    assert isinstance(converted, TritonFormat)
    assert (converted.name, converted.shape, converted.bits) == (plain.name, plain.shape, plain.bits)
    assert (converted.group_size, converted.largest_step()) == (plain.group_size, plain.largest_step())
    torch.testing.assert_close(converted.dequantize(), plain.dequantize(), atol=1e-6, rtol=1e-6)
    index = torch.tensor([3, 0, 47])
    torch.testing.assert_close(converted.rows(index).float(), plain.rows(index).float(), atol=1e-6, rtol=1e-6)
    x = torch.randn(5, 96)
    torch.testing.assert_close(converted.forward(x, None), x @ plain.dequantize().t(), atol=1e-4, rtol=1e-4)
    assert "triton" in converted.path
    # Columns are padded to whole blocks of 64 or 128.
    assert converted.nbytes() <= 1.6 * plain.nbytes() + 64


def test_weights_without_a_quantized_form_stay_as_they_are():
    plain = ModelDtypeFormat(torch.randn(4, 8))
    assert to_triton(plain) is plain


def test_packed_weights_name_all_their_tensors():
    weight, _ = random_weight("int4", 8, 64, 32, zeros=True, act_order=True)
    held = {field.name for field in dataclasses.fields(weight) if isinstance(getattr(weight, field.name), torch.Tensor)}
    assert set(weight.tensors()) == held
