"""The lookup of token embeddings, scaled where a family scales them."""

# ruff: noqa: ANN001
# mypy: disable-error-code="no-untyped-def"
# (the parameters of a Triton kernel are pointers and scalars of the launch: there is no Python type to write)

import torch
import torch.nn.functional as F

from kernels.language import tl, triton
from kernels.variant import TYPE_NAMES, Variant, pointers

_BLOCK = 1024


def embedding_reference(table: torch.Tensor, token_ids: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Rows ``token_ids`` of ``table`` times ``scale``.

    Args:
        table: [V, hidden_size], contiguous.
        token_ids: int64 [T], each in 0 … V - 1 (not checked on a device).
        scale: factor, applied in float32 and rounded once.

    Returns:
        [T, hidden_size] in the dtype of ``table``.
    """
    rows = F.embedding(token_ids, table)
    return rows if scale == 1.0 else (rows.float() * scale).to(table.dtype)


def embedding_triton(table: torch.Tensor, token_ids: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """As :func:`embedding_reference`, in one launch."""
    if not table.is_contiguous() or token_ids.dim() != 1 or token_ids.stride(0) != 1:
        raise ValueError("table must be contiguous [V, hidden_size], token_ids contiguous [T]")
    num_tokens, size = token_ids.shape[0], table.shape[1]
    output = torch.empty((num_tokens, size), dtype=table.dtype, device=table.device)
    if num_tokens:
        grid = (num_tokens, triton.cdiv(size, _BLOCK))
        _embedding_kernel[grid](
            output, table, token_ids, scale, SIZE=size, SCALED=scale != 1.0, BLOCK=_BLOCK, num_warps=4
        )
    return output


@triton.jit
def _embedding_kernel(
    output_ptr, table_ptr, token_ids_ptr, scale, SIZE: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < SIZE
    token = tl.load(token_ids_ptr + row).to(tl.int64)  # a table holds more than 2^31 bytes
    values = tl.load(table_ptr + token * SIZE + column, mask=inside, other=0.0)
    if SCALED:
        values = (values.to(tl.float32) * scale).to(output_ptr.dtype.element_ty)
    tl.store(output_ptr + row * SIZE + column, values, mask=inside)


def aot_variants() -> list[Variant]:
    """With and without scale."""
    types = {**pointers(torch.bfloat16, "output_ptr", "table_ptr"), "token_ids_ptr": "*i64", "scale": "fp32"}
    name = TYPE_NAMES[torch.bfloat16]
    return [
        Variant(
            _embedding_kernel,
            f"{name} 4096 wide" + (" scaled" if scaled else ""),
            types,
            {"SIZE": 4096, "SCALED": scaled, "BLOCK": _BLOCK},
            {"num_warps": 4},
        )
        for scaled in (False, True)
    ]
