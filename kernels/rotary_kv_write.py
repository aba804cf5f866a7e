"""From the fused product of a layer to attention's inputs in one launch: norms of heads, rotary, cache write.

The product's row of a token holds its heads side by side, [query heads | key heads | value heads]; queries are rotated
into a tensor of their own, keys are rotated and, like values, written to their slot, quantized where the cache is.
"""

# ruff: noqa: ANN001
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# (the parameters of a Triton kernel are pointers and scalars of the launch: there is no Python type to write)

import torch

from kernels.kv_formats import KV_FORMATS
from kernels.kv_write import KVScales, check_caches, kv_write_reference, store_rows
from kernels.language import tl, triton
from kernels.rotary import check_angles, partner_of, rotary_reference
from kernels.variant import TYPE_NAMES, Variant, pointers

_TILE = 1024  # elements of a program's tile


def rotary_kv_write_reference(
    heads: torch.Tensor,
    cos: torch.Tensor,
    signed_sin: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    num_heads: int,
    query_norm: torch.Tensor | None = None,
    key_norm: torch.Tensor | None = None,
    eps: float = 0.0,
    scales: KVScales | None = None,
) -> torch.Tensor:
    """Rotate queries and keys, write keys and values to the cache.

    Args:
        heads: [T, num_heads + 2 · num_kv_heads, head_dim], contiguous in its last dimension.
        cos, signed_sin: float32 [T, 1, dim], see :func:`kernels.rotary.rotary_reference`.
        key_cache, value_cache, slot_mapping, scales: see :func:`kernels.kv_write.kv_write_reference`.
        num_heads: of the queries.
        query_norm, key_norm: [head_dim], weights of an RMS norm of each head before it is rotated (Qwen 3, Gemma 3);
            both or none.
        eps: of these norms.

    Returns:
        The rotated queries, [T, num_heads, head_dim] in the dtype of ``heads``.
    """
    num_kv_heads = (heads.shape[1] - num_heads) // 2
    query, key, value = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], dim=1)
    if query_norm is not None and key_norm is not None:
        query = torch.nn.functional.rms_norm(query, query_norm.shape, query_norm, eps)
        key = torch.nn.functional.rms_norm(key, key_norm.shape, key_norm, eps)
    query, key = (rotary_reference(x, cos, signed_sin) for x in (query, key))
    kv_write_reference(key, value, key_cache, value_cache, slot_mapping, scales)
    return query


def rotary_kv_write_triton(
    heads: torch.Tensor,
    cos: torch.Tensor,
    signed_sin: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    num_heads: int,
    query_norm: torch.Tensor | None = None,
    key_norm: torch.Tensor | None = None,
    eps: float = 0.0,
    scales: KVScales | None = None,
) -> torch.Tensor:
    """As :func:`rotary_kv_write_reference`, in one launch that reads every head once.

    Raises:
        ValueError: naming the argument whose shape or layout does not fit.
    """
    num_tokens, all_heads, head_dim = heads.shape
    num_kv_heads = key_cache.shape[2]
    format = check_caches(key_cache, value_cache, scales)
    check_angles(heads, cos, signed_sin)
    if all_heads != num_heads + 2 * num_kv_heads:
        raise ValueError(f"heads must be {num_heads} + 2 · {num_kv_heads} of a token, not {all_heads}")
    if (query_norm is None) != (key_norm is None):
        raise ValueError("query_norm and key_norm go together")
    query = torch.empty((num_tokens, num_heads, head_dim), dtype=heads.dtype, device=heads.device)
    if not num_tokens:
        return query
    block_d = triton.next_power_of_2(head_dim)
    block_h = max(1, min(triton.next_power_of_2(all_heads), _TILE // block_d))
    key_scales, value_scales = scales or (key_cache, value_cache)  # without any, never read
    _rotary_kv_write_kernel[(num_tokens, triton.cdiv(all_heads, block_h))](
        query,
        heads,
        cos,
        signed_sin,
        query if query_norm is None else query_norm,
        query if key_norm is None else key_norm,
        key_cache,
        value_cache,
        key_scales,
        value_scales,
        slot_mapping,
        *heads.stride()[:2],
        eps,
        num_heads,
        num_kv_heads,
        HAS_NORM=query_norm is not None,
        FORMAT=format.number,
        HEAD_DIM=head_dim,
        ROTARY_DIM=cos.shape[-1],
        BLOCK_H=block_h,
        BLOCK_D=block_d,
        num_warps=4,
    )
    return query


@triton.jit
def _rotated_heads(
    rows,  # [H, 1] pointers
    norms,  # [H, 1] pointers, read with HAS_NORM
    cos_ptr,  # of the token
    signed_sin_ptr,
    eps,
    dim,  # [1, D]
    inside,  # [H, D]
    HAS_NORM: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
):
    """Heads normalized and rotated, [H, D] in their own dtype."""
    x = tl.load(rows + dim, mask=inside, other=0.0)
    partner_dim = partner_of(dim, ROTARY_DIM)
    partner = tl.load(rows + partner_dim, mask=inside, other=0.0)  # from the nearest cache: read a moment ago
    if HAS_NORM:
        wide = x.to(tl.float32)
        factor = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=1) / HEAD_DIM + eps)[:, None]
        weight = tl.load(norms + dim, mask=inside, other=0.0).to(tl.float32)
        partner_weight = tl.load(norms + partner_dim, mask=inside, other=0.0).to(tl.float32)
        # Rounded before the rotation, as by a norm of its own.
        x = (wide * factor * weight).to(rows.dtype.element_ty)
        partner = (partner.to(tl.float32) * factor * partner_weight).to(rows.dtype.element_ty)
    rotates = dim < ROTARY_DIM
    cos = tl.load(cos_ptr + dim, mask=rotates, other=1.0)
    sin = tl.load(signed_sin_ptr + dim, mask=rotates, other=0.0)
    return (x.to(tl.float32) * cos + partner.to(tl.float32) * sin).to(rows.dtype.element_ty)


@triton.jit
def _rotary_kv_write_kernel(
    query_ptr,  # [T, num_heads, HEAD_DIM], contiguous
    heads_ptr,  # [T, num_heads + 2 · num_kv_heads, HEAD_DIM]
    cos_ptr,  # float32 [T, ROTARY_DIM]
    signed_sin_ptr,
    query_norm_ptr,
    key_norm_ptr,
    key_cache_ptr,
    value_cache_ptr,
    key_scales_ptr,
    value_scales_ptr,
    slot_mapping_ptr,
    stride_token,
    stride_head,
    eps,
    num_heads,
    num_kv_heads,
    HAS_NORM: tl.constexpr,
    FORMAT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    dim = tl.arange(0, BLOCK_D)[None, :]
    is_query = head < num_heads
    is_key = (head >= num_heads) & (head < num_heads + num_kv_heads)
    is_value = (head >= num_heads + num_kv_heads) & (head < num_heads + 2 * num_kv_heads)
    turns = (is_query | is_key)[:, None]
    inside = (is_query | is_key | is_value)[:, None] & (dim < HEAD_DIM)
    rows = heads_ptr + token * stride_token + (head * stride_head)[:, None]
    values = tl.load(rows + dim, mask=is_value[:, None] & inside, other=0.0)

    norms = tl.where(is_query[:, None], query_norm_ptr, key_norm_ptr)
    angle = token * ROTARY_DIM
    turned = _rotated_heads(
        rows, norms, cos_ptr + angle, signed_sin_ptr + angle, eps, dim, turns & inside, HAS_NORM, HEAD_DIM, ROTARY_DIM
    )

    target = query_ptr + (token * num_heads + head)[:, None] * HEAD_DIM + dim
    tl.store(target, turned, mask=is_query[:, None] & inside)
    slot = tl.load(slot_mapping_ptr + token).to(tl.int64)  # a cache holds more than 2^31 elements
    dims = tl.arange(0, BLOCK_D)
    if FORMAT != 0:
        turned = turned.to(tl.float32)
        values = values.to(tl.float32)
    key_head = head - num_heads
    store_rows(
        key_cache_ptr, key_scales_ptr, slot, key_head, num_kv_heads, turned, is_key, dims, FORMAT, HEAD_DIM, BLOCK_H,
        BLOCK_D,
    )  # fmt: skip
    value_head = key_head - num_kv_heads
    store_rows(
        value_cache_ptr, value_scales_ptr, slot, value_head, num_kv_heads, values, is_value, dims, FORMAT, HEAD_DIM,
        BLOCK_H, BLOCK_D,
    )  # fmt: skip


def aot_variants() -> list[Variant]:
    """Every format, as a model of 8 billion parameters launches it, and one with norms of heads."""
    return [*(_variant(name, norm=False) for name in KV_FORMATS), _variant("model", norm=True)]


def _variant(name: str, *, norm: bool) -> Variant:
    format, bf16 = KV_FORMATS[name], torch.bfloat16
    types = {
        **pointers(bf16, "query_ptr", "heads_ptr", "query_norm_ptr", "key_norm_ptr"),
        **pointers(torch.float32, "cos_ptr", "signed_sin_ptr"),
        **pointers(format.dtype or bf16, "key_cache_ptr", "value_cache_ptr"),
        **pointers(torch.float16, "key_scales_ptr", "value_scales_ptr"),
        "slot_mapping_ptr": "*i64",
        **dict.fromkeys(("stride_token", "stride_head", "num_heads", "num_kv_heads"), "i32"),
        "eps": "fp32",
    }
    constants: dict[str, int | bool | float | None] = {
        "HAS_NORM": norm,
        "FORMAT": format.number,
        "HEAD_DIM": 128,
        "ROTARY_DIM": 128,
        "BLOCK_H": 8,
        "BLOCK_D": 128,
    }
    label = f"{TYPE_NAMES[bf16]} to {name}, d=128" + (", norms" if norm else "")
    target = 90 if name == "fp8" else 80
    return Variant(_rotary_kv_write_kernel, label, types, constants, {"num_warps": 4}, min_target=target)
