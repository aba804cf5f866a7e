"""The small operations, interpreted, against their torch references."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.embedding import embedding_reference, embedding_triton
from kernels.gated_mul import ACTIVATIONS, gated_mul_reference, gated_mul_triton
from kernels.kv_write import kv_write_reference, kv_write_triton
from kernels.rms_norm import rms_norm_reference, rms_norm_triton
from kernels.rotary import rotary_reference, rotary_triton
from kernels.soft_cap import soft_cap_reference, soft_cap_triton

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


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    num_tokens=st.integers(1, 5),
    num_heads=st.integers(1, 4),
    head_dim=st.sampled_from([2, 20, 64, 80]),
    partial=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_rotary_turns_the_first_dimensions_and_leaves_the_rest(num_tokens, num_heads, head_dim, partial, dtype):
    dim = head_dim // 2 if partial and head_dim % 4 == 0 else head_dim
    angles = torch.rand(num_tokens, 1, dim // 2) * 6
    cos, sin = angles.cos().repeat(1, 1, 2), torch.cat((-angles.sin(), angles.sin()), dim=-1)
    x = torch.randn(num_tokens, num_heads + 1, head_dim).to(dtype)[:, 1:]  # heads of a wider row
    found = rotary_triton(x, cos, sin)
    torch.testing.assert_close(found, rotary_reference(x, cos, sin), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert torch.equal(found[..., dim:], x[..., dim:])
    back = rotary_triton(found, cos, -sin)  # a rotation is undone by the opposite one
    torch.testing.assert_close(back.float(), x.float(), atol=3 * TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("vocab", "size", "scale"), [(1, 1, 1.0), (50, 1025, 1.0), (30, 64, 25.25)])
def test_embedding_gathers_rows_and_scales_them_once(dtype, vocab, size, scale):
    table, token_ids = torch.randn(vocab, size).to(dtype), torch.randint(0, vocab, (7,))
    found = embedding_triton(table, token_ids, scale)
    ulp = 2**-7 if dtype is torch.bfloat16 else 1e-3 if dtype is torch.float16 else 0.0
    torch.testing.assert_close(
        found, embedding_reference(table, token_ids, scale), atol=0, rtol=ulp if scale != 1.0 else 0
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cap", [0.5, 30.0])
def test_soft_cap_bounds_values_of_any_size(dtype, cap):
    x = (torch.linspace(-1e4, 1e4, 2049) * torch.linspace(0, 1, 2049) ** 4).to(dtype)
    found = soft_cap_triton(x, cap)
    assert found.abs().max() <= cap
    torch.testing.assert_close(found, soft_cap_reference(x, cap), atol=TOLERANCE[dtype] * cap, rtol=TOLERANCE[dtype])
    with pytest.raises(ValueError, match="cap must be above 0"):
        soft_cap_triton(x, 0.0)
