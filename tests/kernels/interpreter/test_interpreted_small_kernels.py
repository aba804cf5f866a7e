"""The small operations, interpreted, against their torch references."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.gated_mul import ACTIVATIONS, gated_mul_reference, gated_mul_triton
from kernels.kv_write import kv_write_reference, kv_write_triton
from kernels.rms_norm import rms_norm_reference, rms_norm_triton

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    num_tokens=st.integers(1, 20),
    num_kv_heads=st.integers(1, 5),
    head_dim=st.sampled_from([1, 20, 64, 80]),
    block_size=st.sampled_from([1, 3, 16]),
    dtype=st.sampled_from(DTYPES),
    fused=st.booleans(),
)
def test_kv_write_fills_exactly_the_mapped_slots(num_tokens, num_kv_heads, head_dim, block_size, dtype, fused):
    num_blocks = 20 // block_size + 3
    rows = torch.randn(num_tokens, 2 * num_kv_heads, head_dim).to(dtype)
    key, value = rows.split(num_kv_heads, dim=1)
    if not fused:
        key, value = key.contiguous(), value.contiguous()
    slots = torch.randperm(num_blocks * block_size)[:num_tokens]
    caches = torch.randn(2, num_blocks, block_size, num_kv_heads, head_dim).to(dtype)
    expected = caches.clone()
    kv_write_reference(key, value, expected[0], expected[1], slots)
    kv_write_triton(key, value, caches[0], caches[1], slots)
    assert torch.equal(caches, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 64), (5, 576), (2, 1000)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm_matches_reference(dtype, shape, with_residual):
    hidden = torch.randn(shape).to(dtype)
    weight = torch.randn(shape[1]).to(dtype)
    residual = torch.randn(shape).to(dtype) if with_residual else None
    output, total = rms_norm_triton(hidden, weight, 1e-5, residual)
    expected, expected_total = rms_norm_reference(hidden, weight, 1e-5, residual)
    # The interpreter of Triton 3.7 truncates float32 to bfloat16 where a GPU rounds: one unit in the last place.
    ulp = 2**-7 if dtype is torch.bfloat16 else 0.0
    torch.testing.assert_close(total, expected_total, atol=0, rtol=ulp)
    torch.testing.assert_close(output, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_rms_norm_accepts_rows_of_a_wider_matrix():
    wide = torch.randn(4, 96)
    hidden, residual = wide[:, :48], wide[:, 48:]
    output, _ = rms_norm_triton(hidden, torch.ones(48), 1e-5, residual)
    torch.testing.assert_close(output, rms_norm_reference(hidden, torch.ones(48), 1e-5, residual)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 100), (2, 1024), (2, 1025)])
def test_gated_mul_matches_reference(dtype, shape):
    gate_up = (torch.randn(shape[0], 2 * shape[1]) * 4).to(dtype)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(gated_mul_triton(gate_up), gated_mul_reference(gate_up), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_of_a_gate_matches_torch_at_small_and_large_values(activation):
    gate_up = torch.cat((torch.linspace(-60, 60, 481), torch.randn(481)))[None]
    found, expected = gated_mul_triton(gate_up, activation), gated_mul_reference(gate_up, activation)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=2e-6)


def test_an_activation_that_nobody_knows_is_refused_by_name():
    with pytest.raises(ValueError, match="activation must be one of silu"):
        gated_mul_triton(torch.randn(1, 4), "swiglu")
