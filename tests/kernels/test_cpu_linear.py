"""The C++ linear layers against plain torch: every format, few rows and many."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.quantization.formats import ModelDtypeFormat
from engine.quantization.int4 import Int4Format
from engine.quantization.int8 import Int8Format
from engine.quantization.native import to_native
from engine.quantization.w4a8 import W4A8Format
from kernels.cpu.linear import linear, linear_reference, pack_w4a8, round_to_bytes

CPU = torch.device("cpu")
FLOATS = ["float32", "bfloat16"]
INTEGERS = ["int8", "int4", "w4a8"]
KINDS = [*FLOATS, *INTEGERS]


def source(kind, outputs, inputs, group=32, dtype=torch.float32):
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(outputs * 7919 + inputs))
    if kind == "int8":
        return Int8Format(weight, CPU, dtype)
    if kind == "int4":
        return Int4Format(weight, group, CPU, dtype)
    if kind == "w4a8":
        return W4A8Format(weight, CPU, dtype)
    return ModelDtypeFormat(weight.to(getattr(torch, kind)))


def activations(rows, inputs, dtype=torch.float32):
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(rows)).to(dtype)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 40),
    outputs=st.integers(1, 5).map(lambda panels: 32 * panels),
    groups=st.integers(1, 11),
    bias=st.booleans(),
)
def test_native_product_equals_the_dequantized_product_on_any_shape(kind, rows, outputs, groups, bias):
    format = to_native(source(kind, outputs, 32 * groups))
    x = activations(rows, 32 * groups)
    offset = torch.randn(outputs) if bias else None
    expected = linear_reference(x, format.packed, offset)
    rounding = 2e-5 if kind in FLOATS else 2e-4
    torch.testing.assert_close(format.forward(x, offset), expected, atol=rounding * (32 * groups) ** 0.5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("rows", [1, 6, 23])
def test_products_with_integer_weights_are_exact_for_activations_of_16_bits(kind, rows):
    format = to_native(source(kind, 96, 576))
    words = torch.randint(-32767, 32768, (rows, 576), generator=torch.Generator().manual_seed(rows))
    words[:, :: format.packed.group] = 32767  # every group's largest: its scale is 2⁻¹⁰
    x = words.float() / 1024
    exact = x.double() @ format.dequantize().double().t()
    torch.testing.assert_close(format.forward(x, None).double(), exact, atol=2e-3, rtol=1e-6)  # outputs around 400


def test_products_of_w4a8_are_exact_for_activations_of_8_bits():
    format = to_native(source("w4a8", 96, 576))
    for rows in (1, 5, 6, 23):
        whole = torch.randint(-127, 128, (rows, 576), generator=torch.Generator().manual_seed(rows))
        whole[:, ::32] = 127  # every group's largest: its scale is 2⁻⁴
        x = whole.float() / 16
        exact = x.double() @ format.dequantize().double().t()
        torch.testing.assert_close(format.forward(x, None).double(), exact, atol=2e-3, rtol=1e-6)


def test_the_largest_sums_of_bytes_do_not_overflow():
    """Every weight 15 steps above its zero point, every activation at its largest: 16-bit sums are full to 93 %."""
    q = torch.full((64, 64), 15, dtype=torch.uint8)
    scales, zeros = torch.ones(64, 2, dtype=torch.bfloat16), torch.full((64, 2), 8.0, dtype=torch.bfloat16)
    for sign in (1.0, -1.0):
        y = linear(torch.full((7, 64), 127.0 * sign), pack_w4a8(q, scales, zeros), None)
        assert y.unique().tolist() == [sign * 127 * 15 * 64]


def test_activations_are_rounded_in_groups_of_32_to_a_254th_of_the_largest():
    x = activations(5, 96)
    x[2, 32:64] = 0.0
    x[3, 7] = 1000.0  # its own group alone suffers
    step = x.unflatten(1, (3, 32)).abs().amax(-1, keepdim=True).expand(5, 3, 32).flatten(1) / 127
    rounded = round_to_bytes(x)
    assert ((rounded - x).abs() <= step * 0.501).all()
    assert ((rounded - x).abs() > step * 0.3).any()


@pytest.mark.parametrize("kind", INTEGERS)
def test_integer_products_of_a_row_have_the_same_bits_whatever_other_rows_come_with_it(kind):
    format = to_native(source(kind, 96, 576))
    x = activations(40, 576)
    together = format.forward(x, None)
    for rows in (1, 3, 7, 16):
        assert torch.equal(format.forward(x[:rows], None), together[:rows])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_show_in_the_result(kind, bad):
    format = to_native(source(kind, 32, 128))
    x = activations(9, 128)
    x[4, 77] = bad
    result = format.forward(x, None)
    assert not result[4].isfinite().any()
    assert result[:4].isfinite().all()
    assert result[5:].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("outputs", [32, 64, 96])
def test_packing_keeps_every_number_bit_by_bit(kind, outputs):
    plain = source(kind, outputs, 96)
    packed = to_native(plain)
    torch.testing.assert_close(packed.dequantize(), plain.dequantize(), atol=0, rtol=0)
    assert packed.shape == plain.shape
    assert packed.largest_step() == plain.largest_step()
    index = torch.tensor([outputs - 1, 0, 7, 0])  # the lookup of a tied embedding
    torch.testing.assert_close(packed.packed.rows(index).float(), plain.dequantize()[index], atol=0, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_activations_give_bfloat16_results_rounded_at_the_end(kind):
    format = to_native(source(kind, 96, 576, dtype=torch.bfloat16))  # whole panels, whatever their width here
    x = activations(9, 576, torch.bfloat16)
    exact = linear_reference(x.float(), format.packed, None)
    result = format.forward(x, None)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), exact, atol=1e-3, rtol=2**-8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 5, 33])
def test_result_is_the_same_bits_for_any_number_of_threads_and_in_every_call(kind, rows):
    format = to_native(source(kind, 192, 512))
    x = activations(rows, 512)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = format.forward(x, None)
        torch.set_num_threads(2)
        assert torch.equal(format.forward(x, None), alone)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(format.forward(x, None), alone)  # and again: no scratch of the last call shows


def test_int4_groups_of_every_size_are_read_with_their_own_scale():
    for group in (32, 64, 128):
        format = to_native(source("int4", 64, 384, group))
        x = torch.eye(384)
        torch.testing.assert_close(format.forward(x, None), format.dequantize().t(), atol=1e-6, rtol=1e-6)


def test_compiled_graph_keeps_the_native_product_as_one_opaque_step():
    format = to_native(source("int4", 64, 96))

    def layer(x):
        return torch.nn.functional.silu(format.forward(x, None)) * 2

    x = activations(3, 96)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows_give_no_rows(kind):
    assert to_native(source(kind, 64, 96)).forward(activations(0, 96), None).shape == (0, 64)


def test_outputs_that_fill_no_panel_stay_with_torch_and_the_path_says_so():
    format = to_native(source("float32", 34, 64))
    assert isinstance(format, ModelDtypeFormat)
    assert "native" not in format.path


def test_path_names_the_format_and_the_kernel():
    assert to_native(source("int4", 32, 64)).path.startswith("int4 g32, native")
    assert to_native(source("w4a8", 32, 64)).path.endswith("8-bit activations")
    assert to_native(source("bfloat16", 32, 64)).path.startswith("model: bfloat16, native")
