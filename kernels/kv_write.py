"""Scatter a step's fresh keys and values into the blocks of the paged cache, quantized where it is."""

# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# (the parameters of a Triton kernel are pointers and scalars of the launch: there is no Python type to write)

import torch

from kernels.kv_formats import KV_FORMATS, KVFormat, format_of, quantize, quantized_rows
from kernels.language import tl, triton
from kernels.variant import TYPE_NAMES, Variant, pointers

KVScales = tuple[torch.Tensor, torch.Tensor]
"""float16 scales of the key cache and of the value cache, [num_blocks, block_size, num_kv_heads, 1 or 2] each."""

_TILE = 2048  # elements of a program's tile


def kv_write_reference(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    scales: KVScales | None = None,
) -> None:
    """Write row t of ``key`` and ``value`` to slot ``slot_mapping[t]`` of the caches, in place.

    Args:
        key, value: [T, num_kv_heads, head_dim], any strides.
        key_cache, value_cache: payload in a format of :mod:`kernels.kv_formats`, contiguous.
        slot_mapping: int64 [T], ``block_id * block_size + offset``; no slot twice.
        scales: of the caches, where the format has them.
    """
    format = format_of(key_cache)
    for index, (rows, cache) in enumerate(((key, key_cache), (value, value_cache))):
        payload, factors = quantize(rows, format)
        # As bytes: not every device scatters 8-bit floats.
        flat, source = cache.view(-1, *cache.shape[2:]), payload.to(cache.dtype)
        if cache.dtype.itemsize == 1:
            flat, source = flat.view(torch.uint8), source.contiguous().view(torch.uint8)
        flat.index_copy_(0, slot_mapping, source)
        if factors is not None:
            assert scales is not None, f"a cache in {format.name} has scales"
            scales[index].view(-1, *scales[index].shape[2:]).index_copy_(0, slot_mapping, factors)


def kv_write_triton(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    scales: KVScales | None = None,
) -> None:
    """As :func:`kv_write_reference`, in one launch; one program a token and some heads."""
    num_tokens, num_kv_heads, head_dim = key.shape
    format = check_caches(key_cache, value_cache, scales)
    if not num_tokens:
        return
    block_d = triton.next_power_of_2(head_dim)
    heads = max(1, min(triton.next_power_of_2(num_kv_heads), _TILE // block_d))
    key_scales, value_scales = scales or (key_cache, value_cache)  # without any, never read
    _kv_write_kernel[(num_tokens, triton.cdiv(num_kv_heads, heads))](
        key,
        value,
        key_cache,
        value_cache,
        key_scales,
        value_scales,
        slot_mapping,
        *key.stride(),
        *value.stride(),
        num_kv_heads,
        FORMAT=format.number,
        HEAD_DIM=head_dim,
        BLOCK_H=heads,
        BLOCK_D=block_d,
        num_warps=4,
    )


def check_caches(key_cache: torch.Tensor, value_cache: torch.Tensor, scales: KVScales | None) -> KVFormat:
    """The format of both caches.

    Raises:
        ValueError: if they differ, are not contiguous, or scales are missing.
    """
    format = format_of(key_cache)
    if format_of(value_cache) is not format:
        raise ValueError("key_cache and value_cache must have the same format")
    if not (key_cache.is_contiguous() and value_cache.is_contiguous()):
        raise ValueError("key_cache and value_cache must be contiguous")
    if format.num_scales and scales is None:
        raise ValueError(f"scales are needed for a cache in {format.name}")
    for name, tensor in zip(("key", "value"), scales or (), strict=False):
        expected = (*key_cache.shape[:3], format.num_scales)
        if tensor.shape != expected or tensor.dtype != torch.float16 or not tensor.is_contiguous():
            raise ValueError(f"{name} scales must be contiguous float16 {list(expected)}, not {list(tensor.shape)}")
    return format


@triton.jit
def store_rows(
    cache_ptr,  # payload
    scales_ptr,  # float16, read by nobody for the model's dtype
    slot,  # int64
    head,  # [H]: KV head of each row
    num_kv_heads,
    x,  # [H, D], float32 if quantized, else as it is stored
    wanted,  # [H]: rows to be stored
    dim,  # [D]
    FORMAT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write rows of heads into one slot, quantized as the format asks."""
    row = slot * num_kv_heads + head
    mask = wanted[:, None] & (dim < HEAD_DIM)[None, :]
    if FORMAT == 0:
        tl.store(cache_ptr + row[:, None] * HEAD_DIM + dim[None, :], x.to(cache_ptr.dtype.element_ty), mask=mask)
    else:
        q, scale, minimum = quantized_rows(x, (dim < HEAD_DIM)[None, :], FORMAT)
        if FORMAT == 3:
            low, high = tl.split(tl.reshape(q.to(tl.uint8), (BLOCK_H, BLOCK_D // 2, 2)))
            byte = tl.arange(0, BLOCK_D // 2)
            target = cache_ptr + row[:, None] * (HEAD_DIM // 2) + byte[None, :]
            tl.store(target, low | (high << 4), mask=wanted[:, None] & (byte < HEAD_DIM // 2)[None, :])
            tl.store(scales_ptr + row * 2, scale, mask=wanted)
            tl.store(scales_ptr + row * 2 + 1, minimum, mask=wanted)
        else:
            tl.store(cache_ptr + row[:, None] * HEAD_DIM + dim[None, :], q.to(cache_ptr.dtype.element_ty), mask=mask)
            tl.store(scales_ptr + row, scale, mask=wanted)


@triton.jit
def _kv_write_kernel(
    key_ptr,
    value_ptr,
    key_cache_ptr,
    value_cache_ptr,
    key_scales_ptr,
    value_scales_ptr,
    slot_mapping_ptr,
    key_stride_token,
    key_stride_head,
    key_stride_dim,
    value_stride_token,
    value_stride_head,
    value_stride_dim,
    num_kv_heads,
    FORMAT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    dim = tl.arange(0, BLOCK_D)
    slot = tl.load(slot_mapping_ptr + token).to(tl.int64)  # a cache holds more than 2^31 elements
    wanted = head < num_kv_heads
    inside = wanted[:, None] & (dim < HEAD_DIM)[None, :]
    source = key_ptr + token * key_stride_token + head[:, None] * key_stride_head + dim[None, :] * key_stride_dim
    key = tl.load(source, mask=inside, other=0.0)
    source = (
        value_ptr + token * value_stride_token + head[:, None] * value_stride_head + dim[None, :] * value_stride_dim
    )
    value = tl.load(source, mask=inside, other=0.0)
    if FORMAT != 0:
        key = key.to(tl.float32)
        value = value.to(tl.float32)
    store_rows(
        key_cache_ptr, key_scales_ptr, slot, head, num_kv_heads, key, wanted, dim, FORMAT, HEAD_DIM, BLOCK_H, BLOCK_D
    )
    store_rows(
        value_cache_ptr,
        value_scales_ptr,
        slot,
        head,
        num_kv_heads,
        value,
        wanted,
        dim,
        FORMAT,
        HEAD_DIM,
        BLOCK_H,
        BLOCK_D,
    )


def aot_variants() -> list[Variant]:
    """Every format, as a model of 8 billion parameters launches it."""
    return [_variant(name, 8, 128) for name in KV_FORMATS]


def _variant(name: str, num_kv_heads: int, head_dim: int) -> Variant:
    format, bf16 = KV_FORMATS[name], torch.bfloat16
    types = {
        **pointers(bf16, "key_ptr", "value_ptr"),
        **pointers(format.dtype or bf16, "key_cache_ptr", "value_cache_ptr"),
        **pointers(torch.float16, "key_scales_ptr", "value_scales_ptr"),
        "slot_mapping_ptr": "*i64",
        **{f"{tensor}_stride_{axis}": "i32" for tensor in ("key", "value") for axis in ("token", "head")},
        "num_kv_heads": "i32",
    }
    constants: dict[str, int | bool | float | None] = {
        "key_stride_dim": 1,
        "value_stride_dim": 1,
        "FORMAT": format.number,
        "HEAD_DIM": head_dim,
        "BLOCK_H": num_kv_heads,
        "BLOCK_D": head_dim,
    }
    label = f"{TYPE_NAMES[bf16]} to {name}, {num_kv_heads} heads d={head_dim}"
    return Variant(_kv_write_kernel, label, types, constants, {"num_warps": 4}, min_target=90 if name == "fp8" else 80)
