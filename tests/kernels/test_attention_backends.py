"""The backends that run on a CPU against a dense oracle."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from attention_cases import AWKWARD, attend, make_case, oracle, quantized
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from engine.attention.backends import get_backend
from engine.errors import ConfigError
from kernels.cpu.attention import kv_write
from kernels.cpu.build import native
from kernels.kv_formats import KV_FORMATS, dequantize
from kernels.kv_write import kv_write_reference
from tests.kernels.empty_caches import empty_cache

BACKENDS = ["sdpa", "reference", "native"]
QUANTIZED = [name for name in KV_FORMATS if name != "model"]
NO_HALF = ("native", torch.float16)  # refused: no CPU computes in it at speed


def backend_named(name):
    return get_backend(name, torch.device("cpu"), torch.float32, 16)[0]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("shape", AWKWARD.values(), ids=AWKWARD.keys())
def test_attention_matches_dense_oracle_on_awkward_shapes(name, shape):
    query_lens, context_lens, window = shape
    case = make_case(query_lens, context_lens, window=window)
    torch.testing.assert_close(attend(backend_named(name), case).double(), oracle(case), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=25, deadline=None)
@given(
    sequences=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 80)), min_size=1, max_size=6),
    window=st.none() | st.integers(1, 60),
    block_size=st.sampled_from([1, 3, 16, 32]),
    heads=st.sampled_from([(4, 4), (6, 2), (9, 3), (8, 1)]),
    head_dim=st.sampled_from([8, 20, 64]),
    seed=st.integers(0, 1000),
)
def test_attention_matches_dense_oracle_on_any_ragged_batch(name, sequences, window, block_size, heads, head_dim, seed):
    assume(name != "native" or head_dim % native().lanes == 0)
    query_lens = [query_len for query_len, _ in sequences]
    context_lens = [query_len + past for query_len, past in sequences]
    case = make_case(
        query_lens,
        context_lens,
        window=window,
        block_size=block_size,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=head_dim,
        seed=seed,
    )
    torch.testing.assert_close(attend(backend_named(name), case).double(), oracle(case), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("window", [None, 9])
def test_stale_garbage_in_unused_slots_does_not_leak(name, garbage, window):
    case = make_case([1, 5, 1, 20, 12], [3, 40, 77, 50, 12], window=window, garbage=garbage)
    torch.testing.assert_close(attend(backend_named(name), case).double(), oracle(case), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", BACKENDS)
def test_causal_mask_is_bottom_right_where_torch_is_causal_is_top_left(name):
    case = make_case([5], [40], num_heads=1, num_kv_heads=1)
    keys, values = case.dense_keys[0].transpose(0, 1), case.dense_values[0].transpose(0, 1)
    top_left = F.scaled_dot_product_attention(case.query.transpose(0, 1), keys, values, is_causal=True).transpose(0, 1)
    expected = oracle(case)
    assert (top_left.double() - expected).abs().max() > 0.1, "the trap must be one for this test to prove anything"
    torch.testing.assert_close(attend(backend_named(name), case).double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", BACKENDS)
def test_keys_and_values_of_the_step_are_in_the_cache_afterwards_and_no_other_slot_changes(name):
    case = make_case([3, 1], [20, 18])
    before = case.key_cache.clone(), case.value_cache.clone()
    attend(backend_named(name), case)
    for cache, old, rows in zip((case.key_cache, case.value_cache), before, (case.key, case.value), strict=True):
        flat, old_flat = cache.flatten(0, 1), old.flatten(0, 1)
        assert torch.equal(flat[case.batch.slot_mapping], rows)
        untouched = torch.ones(len(flat), dtype=torch.bool)
        untouched[case.batch.slot_mapping] = False
        assert torch.equal(flat[untouched], old_flat[untouched])


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in BACKENDS for dtype in (torch.bfloat16, torch.float16) if (name, dtype) != NO_HALF],
)
def test_half_precision_stays_within_its_rounding(name, dtype):
    case = make_case([1, 5, 33, 20], [70, 40, 33, 50], dtype=dtype, head_dim=64)
    output = attend(backend_named(name), case)
    assert output.dtype == dtype
    tolerance = 0.02 if dtype is torch.bfloat16 else 0.003
    torch.testing.assert_close(output.double(), oracle(case), atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", BACKENDS)
def test_strided_views_of_a_fused_projection_are_accepted(name):
    case = make_case([1, 5, 12, 1], [70, 40, 12, 3], num_heads=6, num_kv_heads=2)
    fused = torch.cat([case.query, case.key, case.value], dim=1)
    query, key, value = fused.split([6, 2, 2], dim=1)
    assert not query.is_contiguous()
    strided = dataclasses.replace(case, query=query, key=key, value=value)
    torch.testing.assert_close(attend(backend_named(name), strided).double(), oracle(case), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", BACKENDS)
def test_heads_that_interleave_query_key_and_value_are_accepted(name):
    """As GPT-NeoX projects them: each head's query, key and value lie side by side, not the heads of one kind."""
    case = make_case([1, 5, 12, 40], [70, 40, 12, 60], num_heads=4, num_kv_heads=4)
    fused = torch.cat([case.query, case.key, case.value], dim=2)
    query, key, value = fused.chunk(3, dim=2)
    assert query.stride(1) != query.shape[2]
    strided = dataclasses.replace(case, query=query, key=key, value=value)
    torch.testing.assert_close(attend(backend_named(name), strided).double(), oracle(case), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("window", [None, 700])
def test_long_contexts_are_split_and_merged_without_changing_the_result(name, window):
    """A lone long decode is cut into parts for the threads; a long chunk takes many tiles of rows and positions."""
    for query_lens, context_lens in (([1], [1500]), ([3], [1300]), ([300], [800])):
        case = make_case(query_lens, context_lens, window=window, num_heads=6, num_kv_heads=2, head_dim=64)
        torch.testing.assert_close(attend(backend_named(name), case).double(), oracle(case), atol=1e-5, rtol=0)


def test_sdpa_splits_many_long_sequences_into_tiles_without_changing_the_result(monkeypatch):
    import engine.attention.sdpa as module

    case = make_case([1] * 12, [300, 5, 17, 290, 16, 15, 64, 200, 1, 2, 310, 33])
    backend = backend_named("sdpa")
    monkeypatch.setattr(module, "_TILE_BYTES", 60_000)
    monkeypatch.setattr(module, "_PADDING_BYTES", 10_000)
    output = attend(backend, case)
    assert len(case.batch.plan["sdpa, window None"].tiles) > 3
    torch.testing.assert_close(output.double(), oracle(case), atol=1e-5, rtol=0)


def test_sdpa_reads_consecutive_blocks_of_a_lone_sequence_in_place():
    case = make_case([1], [100], shuffle=False)
    output = attend(backend_named("sdpa"), case)
    assert isinstance(case.batch.plan["sdpa, window None"].tiles[0].slots, slice)
    torch.testing.assert_close(output.double(), oracle(case), atol=1e-5, rtol=0)


def test_sdpa_derives_its_plan_once_for_all_layers_of_a_step():
    case = make_case([1, 5], [70, 40])
    backend = backend_named("sdpa")
    attend(backend, case)
    plan = case.batch.plan["sdpa, window None"]
    attend(backend, case)
    assert case.batch.plan["sdpa, window None"] is plan


def test_unknown_attention_backend_is_refused_with_the_known_names():
    with pytest.raises(ConfigError) as caught:
        get_backend("flash", "cpu", torch.float32, 64)
    assert caught.value.field == "attention"
    assert "sdpa" in (caught.value.remedy or "")


# -- over a quantized cache -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", QUANTIZED)
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("shape", AWKWARD.values(), ids=AWKWARD.keys())
def test_attention_over_a_quantized_cache_sees_what_it_stores_of_past_and_fresh_tokens(name, shape, format):
    query_lens, context_lens, window = shape
    case = quantized(make_case(query_lens, context_lens, window=window), format)
    torch.testing.assert_close(attend(backend_named(name), case).double(), oracle(case), atol=1e-5, rtol=0)


@pytest.mark.parametrize("format", QUANTIZED)
@pytest.mark.parametrize("name", ["sdpa", "reference", "native"])
def test_a_quantized_cache_serves_queries_in_half_precision(name, format):
    case = quantized(make_case([1, 5, 33, 20], [70, 40, 33, 50], dtype=torch.bfloat16, head_dim=64), format)
    output = attend(backend_named(name), case)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.double(), oracle(case), atol=0.02, rtol=0)


@pytest.mark.parametrize("format", QUANTIZED)
@pytest.mark.parametrize("name", ["sdpa", "native"])
def test_long_contexts_in_a_quantized_cache_are_split_and_merged_without_changing_the_result(name, format):
    for query_lens, context_lens in (([1], [1500]), ([3], [1300]), ([300], [800])):
        case = make_case(query_lens, context_lens, window=700, num_heads=6, num_kv_heads=2, head_dim=64)
        case = quantized(case, format)
        torch.testing.assert_close(attend(backend_named(name), case).double(), oracle(case), atol=1e-5, rtol=0)


@pytest.mark.parametrize("format", QUANTIZED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=40, deadline=None)
@given(
    magnitudes=st.lists(st.floats(-9, 4), min_size=1, max_size=5),
    ties=st.booleans(),
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([16, 64, 80]),
    seed=st.integers(0, 1000),
)
def test_native_write_stores_the_bytes_of_the_reference(format, dtype, magnitudes, ties, heads, head_dim, seed):
    """Of rows of any size, zeros among them, and of values that lie between two of the format's."""
    generator = torch.Generator().manual_seed(seed)
    tokens = len(magnitudes) + 1
    rows = torch.randn(2, tokens, heads, head_dim, generator=generator)
    if ties:
        rows = (rows * 16).round() / 8
    rows = (rows * torch.tensor([0.0, *(10.0**power for power in magnitudes)])[:, None, None]).to(dtype)
    slots = torch.randperm(12, generator=generator)[:tokens]
    written = []
    for write in (kv_write, kv_write_reference):
        made = [empty_cache(KV_FORMATS[format], 3, 4, heads, head_dim, dtype) for _ in range(2)]
        for payload, scales in made:
            payload.view(torch.uint8).fill_(0x55)
            scales.fill_(7.0)
        (keys, key_scales), (values, value_scales) = made
        write(rows[0], rows[1], keys, values, slots, (key_scales, value_scales))
        written.append([keys.view(torch.uint8), values.view(torch.uint8), key_scales, value_scales])
    for ours, theirs in zip(*written, strict=True):
        assert torch.equal(ours, theirs)


def test_native_write_skips_what_has_no_slot_in_a_quantized_cache_too():
    made = [empty_cache(KV_FORMATS["int8"], 1, 4, 1, 16, torch.float32) for _ in range(2)]
    for payload, scales in made:
        payload.fill_(9)
        scales.fill_(1.0)
    rows = torch.randn(2, 1, 16)
    scales = (made[0][1], made[1][1])
    kv_write(rows, rows, made[0][0], made[1][0], torch.tensor([-1, 2]), scales)
    stored = dequantize(made[0][0], scales[0]).view(4, 16)
    assert (stored[[0, 1, 3]] == 9).all()
    assert (stored[2] - rows[1, 0]).abs().max() < 0.03
