"""Products of 8-bit numbers and the quantization of rows, alone and fused, interpreted."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.quantize_rows import (
    EIGHT_BITS,
    gated_mul_quantize_reference,
    gated_mul_quantize_triton,
    quantize_rows_reference,
    quantize_rows_triton,
    rms_norm_quantize_reference,
    rms_norm_quantize_triton,
)
from kernels.scaled_linear import CONFIGS, num_counters, scaled_linear_reference, scaled_linear_triton

KINDS = list(EIGHT_BITS)


def bits(payload):
    return payload.view(torch.uint8)


def nearly(found, expected, kind):
    """The same numbers, but for values that lie within rounding of the edge between two steps."""
    step = 1 / 127 if kind == "int8" else 1 / 8
    difference = (found[0].float() - expected[0].float()).abs()
    assert (bits(found[0]) != bits(expected[0])).float().mean() <= 0.02
    assert (difference <= step * expected[0].float().abs().clamp(min=1.0) * 1.01).all()
    torch.testing.assert_close(found[1], expected[1], atol=0, rtol=1e-5)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    num_rows=st.integers(1, 4),
    size=st.sampled_from([1, 7, 64, 100, 576, 1025]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    kind=st.sampled_from(KINDS),
    magnitude=st.sampled_from([1e-6, 1.0, 1e4]),
)
def test_rows_are_quantized_to_the_nearest_with_a_scale_of_their_own(num_rows, size, dtype, kind, magnitude):
    x = (torch.randn(num_rows, size + 3) * magnitude).to(dtype)[:, :size]
    nearly(quantize_rows_triton(x, kind), quantize_rows_reference(x, kind), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_zeros_stays_zero_and_the_largest_value_survives(kind):
    x = torch.zeros(2, 50)
    x[1, 3] = -3.0
    payload, scales = quantize_rows_triton(x, kind)
    assert scales[0] == 0
    assert not payload[0].float().any()
    assert (payload[1].float() * scales[1])[3] == pytest.approx(-3.0, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_fused_quantization_gives_what_the_two_steps_give(kind, dtype):
    hidden, residual, weight = torch.randn(3, 96).to(dtype), torch.randn(3, 96).to(dtype), torch.randn(96).to(dtype)
    found = rms_norm_quantize_triton(hidden, weight, 1e-5, kind, residual)
    expected = rms_norm_quantize_reference(hidden, weight, 1e-5, kind, residual)
    nearly(found, expected, kind)
    assert torch.equal(found[2], expected[2])
    assert rms_norm_quantize_triton(hidden, weight, 1e-5, kind)[2] is hidden
    gate_up = torch.randn(3, 2 * 70).to(dtype)
    nearly(gated_mul_quantize_triton(gate_up, "silu", kind), gated_mul_quantize_reference(gate_up, "silu", kind), kind)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    num_rows=st.sampled_from([1, 3, 16, 17, 40]),
    outputs=st.sampled_from([1, 33, 64, 130]),
    inputs=st.sampled_from([1, 64, 129, 500]),
    kind=st.sampled_from(KINDS),
    num_splits=st.integers(1, 4),
    with_bias=st.booleans(),
)
def test_a_product_of_eight_bits_is_exact_to_the_rounding_of_its_result(
    num_rows, outputs, inputs, kind, num_splits, with_bias
):
    x, weight = (quantize_rows_reference(torch.randn(rows, inputs), kind) for rows in (num_rows, outputs))
    bias = torch.randn(outputs) if with_bias else None
    counters = torch.zeros(num_counters(outputs), dtype=torch.int32)
    expected = scaled_linear_reference(*x, *weight, bias, torch.float32)
    for _ in range(2):  # the second time with the counters that the first left behind
        found = scaled_linear_triton(*x, *weight, bias, torch.float32, counters=counters, num_splits=num_splits)
        torch.testing.assert_close(found, expected, atol=2e-6 * max(1.0, expected.abs().max().item()), rtol=0)
        assert not counters.any()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_configuration_gives_the_product_of_eight_bits(name, kind):
    x, weight = (quantize_rows_reference(torch.randn(rows, 200), kind) for rows in (70, 140))
    found = scaled_linear_triton(*x, *weight, dtype=torch.float16, config=name)
    expected = scaled_linear_reference(*x, *weight, dtype=torch.float32)
    torch.testing.assert_close(found.float(), expected, atol=2e-3 * expected.abs().max().item(), rtol=0)


def test_what_does_not_fit_is_refused_by_name():
    x, scales = quantize_rows_reference(torch.randn(2, 32), "int8")
    with pytest.raises(ValueError, match="must both be"):
        scaled_linear_triton(x.float(), scales, x, scales)
    with pytest.raises(ValueError, match="weight_scales"):
        scaled_linear_triton(x, scales, x, scales[:1])
    with pytest.raises(ValueError, match="kind must be"):
        quantize_rows_triton(torch.randn(2, 32), "int3")
