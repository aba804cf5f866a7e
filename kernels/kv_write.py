"""Scatter a step's fresh keys and values into the blocks of the paged cache."""

# ruff: noqa: ANN001
# mypy: disable-error-code="no-untyped-def"
# (the parameters of a Triton kernel are pointers and scalars of the launch: there is no Python type to write)

import torch

from kernels.language import tl, triton
from kernels.variant import TYPE_NAMES, Variant


def kv_write_reference(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Write row t of ``key`` and ``value`` to slot ``slot_mapping[t]`` of the caches, in place.

    Args:
        key, value: [T, num_kv_heads, head_dim], any strides.
        key_cache, value_cache: [num_blocks, block_size, num_kv_heads, head_dim], contiguous.
        slot_mapping: int64 [T], ``block_id * block_size + offset``; no slot twice.
    """
    key_cache.view(-1, *key_cache.shape[2:]).index_copy_(0, slot_mapping, key)
    value_cache.view(-1, *value_cache.shape[2:]).index_copy_(0, slot_mapping, value)


def kv_write_triton(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """As :func:`kv_write_reference`, in one launch; one program a token."""
    num_tokens, num_kv_heads, head_dim = key.shape
    row_size = num_kv_heads * head_dim
    _kv_write_kernel[(num_tokens,)](
        key,
        value,
        key_cache,
        value_cache,
        slot_mapping,
        key.stride(0),
        key.stride(1),
        key.stride(2),
        value.stride(0),
        value.stride(1),
        value.stride(2),
        HEAD_DIM=head_dim,
        ROW_SIZE=row_size,
        BLOCK=triton.next_power_of_2(row_size),
    )


@triton.jit
def _kv_write_kernel(
    key_ptr,
    value_ptr,
    key_cache_ptr,
    value_cache_ptr,
    slot_mapping_ptr,
    key_stride_token,
    key_stride_head,
    key_stride_dim,
    value_stride_token,
    value_stride_head,
    value_stride_dim,
    HEAD_DIM: tl.constexpr,
    ROW_SIZE: tl.constexpr,  # num_kv_heads * head_dim: a slot of the cache is this many contiguous elements
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping_ptr + token).to(tl.int64)  # a cache holds more than 2^31 elements
    element = tl.arange(0, BLOCK)
    inside = element < ROW_SIZE
    head, dim = element // HEAD_DIM, element % HEAD_DIM
    key = tl.load(key_ptr + token * key_stride_token + head * key_stride_head + dim * key_stride_dim, mask=inside)
    tl.store(key_cache_ptr + slot * ROW_SIZE + element, key, mask=inside)
    value = tl.load(
        value_ptr + token * value_stride_token + head * value_stride_head + dim * value_stride_dim, mask=inside
    )
    tl.store(value_cache_ptr + slot * ROW_SIZE + element, value, mask=inside)


def aot_variants() -> list[Variant]:
    """As a model of 8 billion parameters launches it."""
    return [_variant(torch.bfloat16, num_kv_heads=8, head_dim=128)]


def _variant(dtype: torch.dtype, *, num_kv_heads: int, head_dim: int) -> Variant:
    element = f"*{TYPE_NAMES[dtype]}"
    types = dict.fromkeys(("key_ptr", "value_ptr", "key_cache_ptr", "value_cache_ptr"), element)
    types |= {"slot_mapping_ptr": "*i64"}
    types |= {f"{tensor}_stride_{axis}": "i32" for tensor in ("key", "value") for axis in ("token", "head")}
    row_size = num_kv_heads * head_dim
    constants: dict[str, int | bool | float | None] = {
        "key_stride_dim": 1,
        "value_stride_dim": 1,
        "HEAD_DIM": head_dim,
        "ROW_SIZE": row_size,
        "BLOCK": 1 << (row_size - 1).bit_length(),
    }
    label = f"{TYPE_NAMES[dtype]} {num_kv_heads} heads d={head_dim}"
    return Variant(_kv_write_kernel, label, types, constants, {"num_warps": 4}, False)
