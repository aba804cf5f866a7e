"""Quantized weight formats: what they store, what they multiply with, and which path runs."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from engine.errors import ConfigError
from engine.layers.linear import Linear
from engine.quantization import cpu_ops, int4, int8
from engine.quantization.error import quantization_error
from engine.quantization.formats import ModelDtypeFormat
from engine.quantization.int4 import Int4Format, largest_group_size
from engine.quantization.int8 import Int8Format
from engine.quantization.registry import QUANTIZED_FORMATS, WeightChoice
from engine.quantization.scaled import ScaledFormat
from engine.quantization.w4a8 import W4A8Format

CPU = torch.device("cpu")


def weights_of_kind(kind, num_rows=128, num_columns=256):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(num_rows, num_columns, generator=generator) * 0.05
    if kind == "outliers":
        weight[::7, ::31] *= 40
    elif kind == "all positive":  # groups that do not straddle zero
        weight = weight.abs() + 3
    elif kind == "constant":
        weight = torch.full_like(weight, -0.37)
    elif kind == "zero":
        weight = torch.zeros_like(weight)
    return weight


KINDS = ["normal", "outliers", "all positive", "constant", "zero"]
MAKERS = {
    "int8": lambda weight, dtype=torch.float32: Int8Format(weight, CPU, dtype),
    "int4-g32": lambda weight, dtype=torch.float32: Int4Format(weight, 32, CPU, dtype),
    "int4-g64": lambda weight, dtype=torch.float32: Int4Format(weight, 64, CPU, dtype),
    "int4-g128": lambda weight, dtype=torch.float32: Int4Format(weight, 128, CPU, dtype),
}

GROUPED_ACTIVATIONS = {"w4a8": lambda weight, dtype=torch.float32: W4A8Format(weight, CPU, dtype)}
SCALED = {
    name: lambda weight, dtype=torch.float32, name=name: ScaledFormat(name, weight, CPU, dtype)
    for name in ("w8a8", "fp8")
}


def plain_int8(weight):
    """w ≈ q·s with s = max abs(w) / 127 rounded up to bfloat16, written out."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    stored = scale.bfloat16().float()
    stored = torch.where(stored < scale, (scale * (1 + 2**-8)).bfloat16().float(), stored)
    return torch.round(weight / stored.clamp_min(1e-30)).clamp(-127, 127) * stored


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*MAKERS, *GROUPED_ACTIVATIONS, *SCALED])
def test_every_weight_is_within_half_a_step_of_the_original(name, kind):
    weight = weights_of_kind(kind)
    error = quantization_error(weight, (MAKERS | GROUPED_ACTIVATIONS | SCALED)[name](weight))
    assert error.max_error <= error.half_step * (1 + 1e-5)
    assert error.rms_error <= error.max_error
    assert error.format == name


def test_published_bound_holds_for_int4_up_to_the_rounding_of_its_scales():
    weight = weights_of_kind("normal")
    error = quantization_error(weight, MAKERS["int4-g64"](weight))
    groups = weight.view(-1, 64)
    assert error.published_bound == pytest.approx(float((groups.amax(1) - groups.amin(1)).max()) / 30)
    assert 0.5 * error.published_bound < error.max_error < 1.02 * error.published_bound


def test_int8_is_symmetric_with_one_scale_a_channel():
    weight = weights_of_kind("outliers")
    torch.testing.assert_close(MAKERS["int8"](weight).dequantize(), plain_int8(weight), atol=0, rtol=1e-6)


@pytest.mark.parametrize("rows", [1, 3, int8.PACKED_ROWS_LIMIT, int8.PACKED_ROWS_LIMIT + 1, 45, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MAKERS)
def test_product_is_that_of_the_dequantized_weight_on_both_sides_of_the_threshold(name, dtype, rows):
    weight = weights_of_kind("outliers")
    format = MAKERS[name](weight, dtype)
    x = torch.randn(rows, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
    bias = torch.randn(128, generator=torch.Generator().manual_seed(2)).to(dtype)
    expected = F.linear(x.double(), format.dequantize().double(), bias.double())
    result = format.forward(x, bias)
    assert result.dtype == dtype
    assert (result.double() - expected).abs().max() <= 0.01 * expected.abs().max()  # a bfloat16 product


@pytest.mark.parametrize("name", MAKERS)
def test_float32_product_of_many_rows_is_exact_to_float32(name):
    format = MAKERS[name](weights_of_kind("normal"))
    x = torch.randn(200, 256, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(format.forward(x, None), x @ format.dequantize().t(), atol=1e-5, rtol=1e-5)


def scaled_product(x, format):
    """(p qᵀ) · s · t, written out in float64, with p and s from the definition: the largest becomes 127 or 448."""
    largest = 127.0 if format.name == "w8a8" else 448.0
    scales = x.float().abs().amax(1, keepdim=True) / largest
    p = x.float() / torch.where(scales > 0, scales, 1.0)
    p = p.round() if format.name == "w8a8" else p.to(torch.float8_e4m3fn).float()
    return (p.double() * scales.double()) @ format.dequantize().double().t()


@pytest.mark.parametrize("rows", [1, 5, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["normal", "outliers", "zero"])
@pytest.mark.parametrize("name", SCALED)
def test_w8a8_product_is_that_of_activations_and_weights_of_8_bits(name, kind, dtype, rows):
    format = SCALED[name](weights_of_kind(kind), dtype)
    x = torch.randn(rows, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
    x[0] *= 300  # a loud token takes nothing from the others: each has its scale
    if rows > 1:
        x[1] = 0
    bias = torch.randn(128, generator=torch.Generator().manual_seed(2)).to(dtype)
    expected = scaled_product(x, format) + bias.double()
    result = format.forward(x, bias)
    assert result.dtype == dtype
    # one activation may fall to the other side of a tie, by the last digit of its scale
    bound = {torch.float32: 2e-3, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}[dtype]
    assert ((result.double() - expected).abs().amax(1) <= bound * expected.abs().amax(1)).all()


@pytest.mark.parametrize("rows", [1, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_w4a8_product_is_that_of_int4_weights_and_activations_of_8_bits_in_groups(dtype, rows):
    weight = weights_of_kind("outliers")
    format = GROUPED_ACTIVATIONS["w4a8"](weight, dtype)
    assert torch.equal(format.dequantize(), MAKERS["int4-g32"](weight).dequantize())
    x = torch.randn(rows, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
    x[0, 3] = 300.0  # an outlier takes from its own group alone
    scales = x.double().unflatten(1, (8, 32)).abs().amax(-1, keepdim=True) / 127
    p = (x.double().unflatten(1, (8, 32)) / scales).round() * scales
    expected = p.flatten(1) @ format.dequantize().double().t()
    bound = {torch.float32: 2e-4, torch.bfloat16: 1.2e-2}[dtype]
    assert (format.forward(x, None).double() - expected).abs().max() <= bound * expected.abs().max()


def test_every_number_of_e4m3_is_widened_to_itself():
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    numbers = numbers[~numbers.float().isnan()]
    format = SCALED["fp8"](torch.zeros(2, len(numbers)))
    format.q = numbers.expand(2, -1).contiguous()
    assert torch.equal(format._widened().float() * format._unit(), numbers.float().expand(2, -1))


def test_fp8_needs_a_gpu_that_has_it_and_int8_does_not(monkeypatch):
    from engine.quantization import triton

    for capability, has_fp8 in (((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert triton._multiplies("fp8", torch.device("cuda")) is has_fp8
        assert triton._multiplies("int8", torch.device("cuda"))


def test_int4_operator_of_torch_means_q_minus_8_times_scale_plus_zero():
    """The convention, checked with one weight at a time against the operator itself."""
    if cpu_ops.int4_block_rows() is None:
        pytest.skip("this CPU has no usable aten::_weight_int4pack_mm_for_cpu")
    q = torch.arange(16, dtype=torch.int32).repeat(64, 2)  # [64, 32]: every value, one group
    scales, zeros = torch.full((1, 64), 0.25).bfloat16(), torch.full((1, 64), -3.0).bfloat16()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
    x = torch.eye(32).bfloat16()
    result = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, 32, torch.stack((scales, zeros), -1))
    assert torch.equal(result.float(), ((q - 8) * 0.25 - 3.0).t().float())


def test_packing_is_the_one_of_torch_so_that_large_batches_can_unpack_it():
    if (block_rows := cpu_ops.int4_block_rows()) is None:
        pytest.skip("this CPU has no usable aten::_weight_int4pack_mm_for_cpu")
    q = torch.randint(0, 16, (block_rows * 3, 96), generator=torch.Generator().manual_seed(0))
    expected = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.to(torch.int32), 1)
    assert torch.equal(cpu_ops.pack_int4(q.to(torch.uint8), block_rows), expected)


@pytest.mark.parametrize("name", MAKERS)
def test_without_the_operators_the_same_weights_are_dequantized_and_the_path_says_so(name, monkeypatch):
    weight = weights_of_kind("normal")
    with_operators = MAKERS[name](weight)
    monkeypatch.setattr(int4, "int4_block_rows", lambda: None)
    monkeypatch.setattr(int8, "int8_product_works", lambda: False)
    without = MAKERS[name](weight)
    assert torch.equal(without.dequantize(), with_operators.dequantize())
    assert without.nbytes() == with_operators.nbytes()
    assert "aten" not in without.path
    assert "dequantize + float32 matmul" in without.path
    x = torch.randn(1, 256)
    torch.testing.assert_close(without.forward(x, None), x @ without.dequantize().t(), atol=1e-5, rtol=1e-5)


def test_rows_that_do_not_fill_a_block_are_dequantized():
    format = Int4Format(weights_of_kind("normal", num_rows=34), 64, CPU, torch.float32)
    assert format.packed_rows_limit == 0
    x = torch.randn(2, 256)
    torch.testing.assert_close(format.forward(x, None), x @ format.dequantize().t(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("width", "wanted", "fitting"),
    [(576, 128, 64), (576, 64, 64), (1536, 128, 128), (96, 128, 32), (80, 128, None), (576, 32, 32)],
)
def test_group_size_falls_back_to_the_largest_that_divides_the_width(width, wanted, fitting):
    assert largest_group_size(width, wanted) == fitting


@pytest.mark.parametrize("name", ["int4", "w4a8"])
def test_width_without_a_fitting_group_stays_in_the_model_dtype(name):
    format = QUANTIZED_FORMATS[name](weights_of_kind("normal", num_columns=80), 64, CPU, torch.bfloat16)
    assert isinstance(format, ModelDtypeFormat)
    assert format.path == "model: bfloat16 matmul"


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("int8", 8 + 16 / 256),
        ("int4-g32", 5),
        ("int4-g64", 4.5),
        ("w4a8", 5),
        ("w8a8", 8 + 32 / 256),
        ("fp8", 8 + 32 / 256),
    ],
)
def test_resident_bytes_are_the_bits_of_the_format(name, bits):
    assert (MAKERS | GROUPED_ACTIVATIONS | SCALED)[name](weights_of_kind("normal")).nbytes() == 128 * 256 * bits / 8


def test_linear_refuses_a_weight_of_another_shape_and_keeps_its_own():
    linear = Linear(ModelDtypeFormat(torch.zeros(4, 8)))
    with pytest.raises(ValueError, match="cannot replace"):
        linear.swap(ModelDtypeFormat(torch.zeros(8, 4)))
    assert linear.format.shape == (4, 8)


@pytest.mark.parametrize(
    ("weights", "group_size", "field"), [("int3", 64, "weights"), ("int4", 48, "group_size"), ("int4", 0, "group_size")]
)
def test_unknown_format_or_group_size_names_the_knob(weights, group_size, field):
    with pytest.raises(ConfigError) as caught:
        WeightChoice(weights, group_size)
    assert caught.value.field == field
    assert caught.value.remedy
