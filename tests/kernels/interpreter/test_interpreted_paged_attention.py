"""The Triton paged attention kernel, interpreted, against the dense oracle and the torch reference."""

import dataclasses

import pytest
import torch
from attention_cases import AWKWARD, attend, make_case, oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.runtime.interpreter import GridExecutor

from engine.attention.backends import get_backend
from engine.attention.triton import TritonAttention
from kernels.paged_attention import paged_attention_reference, paged_attention_triton
from tests.kernels import guarded_memory


@pytest.mark.parametrize("shape", AWKWARD.values(), ids=AWKWARD.keys())
def test_triton_attention_matches_dense_oracle_on_awkward_shapes(shape):
    query_lens, context_lens, window = shape
    case = make_case(query_lens, context_lens, window=window)
    torch.testing.assert_close(attend(TritonAttention(), case).double(), oracle(case), atol=1e-5, rtol=0)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    sequences=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 80)), min_size=1, max_size=5),
    window=st.none() | st.integers(1, 60),
    block_size=st.sampled_from([1, 3, 16, 32]),
    heads=st.sampled_from([(2, 2), (4, 2), (3, 1), (8, 1)]),
    head_dim=st.sampled_from([8, 20, 64]),
    seed=st.integers(0, 1000),
)
def test_triton_attention_matches_dense_oracle_on_any_ragged_batch(
    sequences, window, block_size, heads, head_dim, seed
):
    case = make_case(
        [query_len for query_len, _ in sequences],
        [query_len + past for query_len, past in sequences],
        window=window,
        block_size=block_size,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=head_dim,
        seed=seed,
    )
    torch.testing.assert_close(attend(TritonAttention(), case).double(), oracle(case), atol=1e-5, rtol=0)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_head_dimension_and_dtype_stays_within_its_rounding(head_dim, dtype):
    case = make_case([1, 5, 18], [20, 40, 18], head_dim=head_dim, num_heads=3, num_kv_heads=1, dtype=dtype)
    output = attend(TritonAttention(), case)
    assert output.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.float16: 0.003, torch.bfloat16: 0.02}[dtype]
    torch.testing.assert_close(output.double(), oracle(case), atol=tolerance, rtol=0)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
@pytest.mark.parametrize("window", [None, 9])
def test_stale_garbage_in_unused_slots_does_not_leak_into_the_kernel(garbage, window):
    case = make_case([1, 5, 20, 12], [3, 40, 50, 12], window=window, garbage=garbage)
    torch.testing.assert_close(attend(TritonAttention(), case).double(), oracle(case), atol=1e-5, rtol=0)


def test_window_that_spans_many_loop_steps_skips_what_no_query_sees():
    case = make_case([1, 40], [400, 300], window=100)
    # What lies before every query's window is never read: NaN there must not matter.
    for index, (query_len, context_len) in enumerate(zip([1, 40], [400, 300], strict=True)):
        unseen = (context_len - query_len - 100 + 1) // 64 * 64  # the kernel starts at a multiple of its loop step
        blocks = case.batch.block_tables[index, : unseen // 16].long()
        case.key_cache[blocks] = float("nan")
        case.value_cache[blocks] = float("nan")
    torch.testing.assert_close(attend(TritonAttention(), case).double(), oracle(case), atol=1e-5, rtol=0)


def test_strided_views_of_a_fused_projection_are_accepted_by_the_kernels():
    case = make_case([1, 5, 12], [70, 40, 12], num_heads=6, num_kv_heads=2)
    query, key, value = torch.cat([case.query, case.key, case.value], dim=1).split([6, 2, 2], dim=1)
    strided = dataclasses.replace(case, query=query, key=key, value=value)
    torch.testing.assert_close(attend(TritonAttention(), strided).double(), oracle(case), atol=1e-5, rtol=0)


def test_block_tables_wider_than_needed_and_padded_with_garbage_are_harmless():
    case = make_case([1, 3], [20, 33])
    padding = torch.full((2, 3), 2**30, dtype=torch.int32)
    needed = [2, 3]
    tables = torch.cat([case.batch.block_tables, padding], dim=1)
    for index, used in enumerate(needed):
        tables[index, used:] = 2**30
    wide = dataclasses.replace(case, batch=dataclasses.replace(case.batch, block_tables=tables))
    torch.testing.assert_close(attend(TritonAttention(), wide).double(), oracle(case), atol=1e-5, rtol=0)


def test_block_offsets_past_two_to_the_31_elements_are_addressed_right(monkeypatch):
    # The interpreter would copy the whole cache back onto itself; pages that nobody touches cost no memory.
    monkeypatch.setattr(guarded_memory, "MOST_BYTES", 0)  # what is copied must be copied back
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *_: None)
    block_elements = 16 * 2 * 64
    far = 2**31 // block_elements + 1
    key_cache, value_cache = (torch.empty(far + 1, 16, 2, 64, dtype=torch.float16) for _ in range(2))
    case = make_case([1], [20], head_dim=64, dtype=torch.float16)
    near_blocks = case.batch.block_tables[0, :2].long()
    blocks = torch.tensor([far, 2])
    key_cache[blocks], value_cache[blocks] = case.key_cache[near_blocks], case.value_cache[near_blocks]
    batch = dataclasses.replace(
        case.batch, block_tables=blocks[None].to(torch.int32), slot_mapping=torch.tensor([2 * 16 + 3])
    )
    moved = dataclasses.replace(case, key_cache=key_cache, value_cache=value_cache, batch=batch)
    torch.testing.assert_close(attend(TritonAttention(), moved).double(), oracle(case), atol=0.003, rtol=0)


def test_triton_and_reference_agree_through_the_same_signature():
    case = make_case([1, 5, 33], [70, 40, 33], window=12)
    attend(TritonAttention(), case)
    batch = case.batch
    arguments = (
        case.query,
        case.key_cache,
        case.value_cache,
        batch.block_tables,
        batch.query_start,
        batch.context_lens_tensor,
        case.scale,
        case.window,
    )
    for found, expected in zip(paged_attention_triton(*arguments), paged_attention_reference(*arguments), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_query_that_is_not_contiguous_in_its_head_is_refused():
    case = make_case([2], [20])
    query = case.query.transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ValueError, match="contiguous"):
        attend(TritonAttention(), dataclasses.replace(case, query=query))


def test_the_record_says_that_the_interpreter_ran():
    assert get_backend("triton", "cpu", torch.float32, 64)[1] == "triton (interpreter)"
