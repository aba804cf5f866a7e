"""The quantized cache, written and read by the kernels, and what attention offers beside plain softmax, interpreted."""

import itertools

import pytest
import torch
from attention_cases import make_case, oracle
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import paged_attention
from kernels.attention_mass import attention_mass_reference, attention_mass_triton
from kernels.kv_formats import KV_FORMATS, dequantize, quantize
from kernels.kv_write import kv_write_reference, kv_write_triton
from kernels.paged_attention import paged_attention_reference, paged_attention_triton
from kernels.rotary_kv_write import rotary_kv_write_reference, rotary_kv_write_triton
from tests.kernels.empty_caches import empty_cache

QUANTIZED = [name for name in KV_FORMATS if name != "model"]
HALF_STEP = {"int8": 0.5 / 127, "fp8": 0.5 / 8, "int4": 0.5 / 15}  # of the largest magnitude, of the range for INT4


def caches_of(name, num_blocks, block_size, num_kv_heads, head_dim, dtype=torch.float32):
    """(key cache, value cache), and their scales or None; every payload byte is garbage."""
    made = [empty_cache(KV_FORMATS[name], num_blocks, block_size, num_kv_heads, head_dim, dtype) for _ in range(2)]
    for payload, scales in made:
        payload.view(torch.uint8).fill_(0x7F)  # FP8's NaN, and large numbers elsewhere
        if scales is not None:
            scales.fill_(float("nan"))
    return [payload for payload, _ in made], None if made[0][1] is None else (made[0][1], made[1][1])


def quantized_case(name, query_lens, context_lens, **fields):
    """A case whose keys and values are in a cache of that format, and the arguments of attention on it."""
    case = make_case(query_lens, context_lens, garbage=float("nan"), **fields)
    num_blocks, block_size, num_kv_heads, head_dim = case.key_cache.shape
    caches, scales = caches_of(name, num_blocks, block_size, num_kv_heads, head_dim, case.query.dtype)
    for index, context_len in enumerate(context_lens):
        positions = torch.arange(context_len)
        slots = case.batch.block_tables[index].long()[positions // block_size] * block_size + positions % block_size
        kv_write_reference(case.dense_keys[index], case.dense_values[index], *caches, slots, scales)
    batch = case.batch
    tables = (batch.block_tables, batch.query_start, batch.context_lens_tensor)
    return case, (case.query, *caches, *tables, case.scale, case.window), scales


# -- the formats ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_quantized_value_is_within_half_a_step_of_its_row(name):
    x = torch.randn(5, 3, 64) * torch.tensor([1e-3, 1.0, 50.0, 3e3, 0.0])[:, None, None]
    back = dequantize(*quantize(x, KV_FORMATS[name]))
    spread = x.amax(-1) - x.amin(-1) if name == "int4" else x.abs().amax(-1)
    assert ((back - x).abs().amax(-1) <= spread * HALF_STEP[name] * 1.1 + x.abs().amax(-1) * 1.5e-3 + 1e-7).all()


def test_bytes_of_a_head_count_payload_and_scales():
    counted = {name: format.head_bytes(128, torch.bfloat16) for name, format in KV_FORMATS.items()}
    assert counted == {"model": 256, "fp8": 130, "int8": 130, "int4": 68}
    for name, format in KV_FORMATS.items():
        payload, scales = empty_cache(format, 3, 16, 2, 128, torch.bfloat16)
        assert payload.nbytes + (0 if scales is None else scales.nbytes) == 3 * 16 * 2 * counted[name]


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(list(KV_FORMATS)),
    num_tokens=st.integers(1, 6),
    num_kv_heads=st.sampled_from([1, 3, 8]),
    head_dim=st.sampled_from([16, 80, 96]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_the_kernel_writes_what_the_reference_writes_and_nothing_else(name, num_tokens, num_kv_heads, head_dim, dtype):
    key, value = torch.randn(2, num_tokens, num_kv_heads, head_dim).to(dtype)
    slots = torch.randperm(4 * 3)[:num_tokens]
    results = []
    for write in (kv_write_reference, kv_write_triton):
        caches, scales = caches_of(name, 3, 4, num_kv_heads, head_dim, dtype)
        write(key, value, *caches, slots, scales)
        results.append([tensor.contiguous().view(torch.uint8) for tensor in (*caches, *(scales or ()))])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


# -- attention over them ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("head_dim", [16, 80, 128])
def test_attention_reads_a_quantized_cache_as_its_dequantized_values(name, head_dim):
    _, arguments, scales = quantized_case(
        name, [1, 5, 18], [33, 40, 18], head_dim=head_dim, num_heads=4, num_kv_heads=2
    )
    expected, expected_lse = paged_attention_reference(*arguments, scales=scales)
    found, lse = paged_attention_triton(*arguments, scales=scales)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(lse, expected_lse, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "allowed"), [("int8", 0.02), ("fp8", 0.1), ("int4", 0.4)])
def test_attention_over_a_quantized_cache_is_near_the_exact_one(name, allowed):
    case, arguments, scales = quantized_case(name, [1, 6], [40, 33], head_dim=64, num_heads=4, num_kv_heads=2)
    found, _ = paged_attention_triton(*arguments, scales=scales)
    assert (found.double() - oracle(case)).abs().max() < allowed


def test_missing_scales_are_refused_by_name():
    _, arguments, _ = quantized_case("int8", [1], [20])
    with pytest.raises(ValueError, match="scales are needed"):
        paged_attention_triton(*arguments)


# -- what models add --------------------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    sequences=st.lists(st.tuples(st.integers(1, 20), st.integers(0, 60)), min_size=1, max_size=4),
    soft_cap=st.none() | st.sampled_from([0.5, 20.0]),
    sinks=st.booleans(),
    window=st.none() | st.integers(1, 40),
)
def test_soft_cap_sinks_and_window_agree_with_the_reference(sequences, soft_cap, sinks, window):
    case, arguments, _ = quantized_case(
        "model", [query for query, _ in sequences], [query + past for query, past in sequences], window=window
    )
    asked = {"soft_cap": soft_cap, "sinks": torch.randn(case.query.shape[1]) * 2 if sinks else None}
    for found, expected in zip(
        paged_attention_triton(*arguments, **asked), paged_attention_reference(*arguments, **asked), strict=True
    ):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


def test_a_sink_takes_its_share_of_the_softmax():
    _case, arguments, _ = quantized_case("model", [1], [20])
    without, lse = paged_attention_triton(*arguments)
    sinks = lse[0].clone()  # as large as all keys together: half of the weight goes to it
    found, with_sinks = paged_attention_triton(*arguments, sinks=sinks)
    torch.testing.assert_close(found, without / 2, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(with_sinks, lse + torch.log(torch.tensor(2.0)), atol=1e-5, rtol=0)


# -- split contexts ---------------------------------------------------------------------------------------------------


@pytest.fixture
def short_chunks(monkeypatch):
    """Chunks of one tile, so that a short context has many."""
    monkeypatch.setattr(paged_attention, "CHUNK", 64)


@pytest.mark.parametrize("context_lens", [[1, 63, 64, 65], [200, 5, 128, 129], [193]])
@pytest.mark.parametrize("window", [None, 70])
def test_a_split_decode_has_the_same_bits_however_many_programs_share_it(short_chunks, context_lens, window):
    case, arguments, _ = quantized_case("model", [1] * len(context_lens), context_lens, window=window)
    sinks = torch.randn(case.query.shape[1])
    alone = paged_attention_triton(*arguments, sinks=sinks, num_splits=1)
    for num_splits in (2, 3, 16):
        shared = paged_attention_triton(*arguments, sinks=sinks, num_splits=num_splits)
        assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))
    expected, _ = paged_attention_reference(*arguments, sinks=sinks)
    torch.testing.assert_close(alone[0], expected, atol=2e-5, rtol=1e-5)


def test_a_sequence_decodes_to_the_same_bits_whatever_else_is_in_the_batch(short_chunks):
    _case, arguments, _ = quantized_case("model", [1] * 3, [150, 9, 70])
    together, _ = paged_attention_triton(*arguments)
    query, keys, values, tables, starts, lengths, *rest = arguments
    alone, _ = paged_attention_triton(query[:1], keys, values, tables[:1], starts[:2], lengths[:1], *rest)
    assert torch.equal(together[:1], alone)


def test_splits_follow_from_shapes_and_never_exceed_the_chunks():
    splits = paged_attention._num_splits
    assert splits(8, 131072) == min(128, paged_attention.SPLIT_PROGRAMS // 8)
    assert splits(8, 1000) == 1
    assert splits(4096, 131072) == 1


# -- masses -----------------------------------------------------------------------------------------------------------


@pytest.mark.waiting
@pytest.mark.parametrize(
    ("name", "window", "soft_cap"), [("model", None, None), ("int8", 9, None), ("int4", None, 3.0)]
)
def test_attention_masses_agree_with_the_reference_and_sum_to_the_queries(name, window, soft_cap):
    case, arguments, scales = quantized_case(name, [1, 7, 20], [30, 50, 20], window=window)
    query, keys, _, tables, starts, lengths, scale, _ = arguments
    _, lse = paged_attention_triton(*arguments, scales=scales, soft_cap=soft_cap)
    asked = (query, keys, tables, starts, lengths, lse, scale, window)
    found = attention_mass_triton(*asked, scales=scales, soft_cap=soft_cap)
    torch.testing.assert_close(
        found, attention_mass_reference(*asked, scales=scales, soft_cap=soft_cap), atol=2e-5, rtol=1e-5
    )
    queries = torch.tensor(case.batch.query_lens, dtype=torch.float32)
    group = query.shape[1] // keys.shape[2]
    torch.testing.assert_close(found.sum(-1), queries[:, None].expand(-1, keys.shape[2]) * group, atol=1e-3, rtol=1e-4)


# -- from the fused product -------------------------------------------------------------------------------------------


def angles_of(positions, dim):
    """cos and signed sine as the engine's rotary embedding gives them."""
    from engine.layers.rotary import RotaryEmbedding, inverse_frequencies

    return RotaryEmbedding(inverse_frequencies(dim, 1e4))(positions)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(list(KV_FORMATS)),
    heads=st.sampled_from([(1, 1), (4, 2), (9, 3), (14, 1)]),
    head_dim=st.sampled_from([16, 80, 128]),
    partial=st.booleans(),
    norms=st.booleans(),
    num_tokens=st.integers(1, 5),
)
def test_rotary_and_write_in_one_launch_agree_with_the_steps_one_by_one(
    name, heads, head_dim, partial, norms, num_tokens
):
    num_heads, num_kv_heads = heads
    wide = torch.randn(num_tokens, num_heads + 2 * num_kv_heads + 1, head_dim)  # rows of a wider product
    product = wide[:, :-1]
    angles = angles_of(torch.randint(0, 900, (num_tokens,)), head_dim // 2 if partial else head_dim)
    weights = {"query_norm": torch.randn(head_dim), "key_norm": torch.randn(head_dim), "eps": 1e-6} if norms else {}
    slots = torch.randperm(12)[:num_tokens]
    results = []
    for write in (rotary_kv_write_reference, rotary_kv_write_triton):
        caches, scales = caches_of(name, 3, 4, num_kv_heads, head_dim)
        query = write(product, *angles, *caches, slots, num_heads=num_heads, scales=scales, **weights)
        flat = [cache.view(torch.uint8).view(12, -1)[slots].view(cache.dtype) for cache in caches]
        rows = [payload.view(num_tokens, num_kv_heads, -1) for payload in flat]
        kept = None if scales is None else [scale.view(12, num_kv_heads, -1)[slots] for scale in scales]
        results.append((query, *(dequantize(row, kept and kept[side]) for side, row in enumerate(rows))))
    step = {"model": 0.0, "int8": 0.03, "fp8": 0.3, "int4": 0.3}[
        name
    ]  # a value at the edge of two steps may fall on either
    for found, expected in zip(results[1], results[0], strict=True):
        assert ((found - expected).abs() > 1e-5).float().mean() < 0.02
        torch.testing.assert_close(found, expected, atol=1e-5 + step * expected.abs().max().item(), rtol=1e-5)


def test_heads_that_do_not_fit_the_cache_are_refused():
    caches, _ = caches_of("model", 1, 4, 2, 16)
    angles = angles_of(torch.arange(1), 16)
    for heads, words in (
        (torch.randn(1, 5, 16), "heads must be"),
        (torch.randn(1, 16, 8).transpose(1, 2), "contiguous"),
    ):
        with pytest.raises(ValueError, match=words):
            rotary_kv_write_triton(heads, *angles, *caches, torch.zeros(1, dtype=torch.int64), num_heads=4)


def test_every_pair_of_format_and_configuration_that_ships_compiles_ahead_of_time():
    labels = [variant.label for variant in paged_attention.aot_variants()]
    for name, way in itertools.product(["int8", "int4"], ["decode", "prefill"]):
        assert any(way in label and f"{name} cache" in label for label in labels)
    assert all(any(label.startswith(name) for label in labels) for name in paged_attention.CONFIGS)
