"""Products of 8-bit numbers against torch's, and the quantization of rows against the bandwidth."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kernels.quantize_rows import (
    EIGHT_BITS,
    gated_mul_quantize_reference,
    gated_mul_quantize_triton,
    quantize_rows_reference,
    quantize_rows_triton,
    rms_norm_quantize_reference,
    rms_norm_quantize_triton,
)
from kernels.scaled_linear import num_counters, scaled_linear_reference, scaled_linear_triton
from tests.gpu.case import Bar, Case, Run, Size


def cases(device: torch.device, size: Size) -> Iterator[Case]:
    """Both types at a decode's and a prefill's rows; FP8 where the GPU has it."""
    full = size == "full"
    kinds = [kind for kind in EIGHT_BITS if kind != "fp8" or not full or torch.cuda.get_device_capability() >= (8, 9)]
    for kind in kinds:
        yield from _products(device, full, kind)
        yield from _quantizations(device, full, kind)


def _products(device: torch.device, full: bool, kind: str) -> Iterator[Case]:
    outputs, inputs = (28672, 4096) if full else (70, 129)
    weight, scales = quantize_rows_triton(torch.randn(outputs, inputs, device=device), kind)
    counters = torch.zeros(num_counters(outputs), dtype=torch.int32, device=device)
    for rows in (1, 16, 256, 4096) if full else (1, 5):
        x, row_scales = quantize_rows_triton(torch.randn(rows, inputs, device=device), kind)
        arguments = (x, row_scales, weight, scales)
        yield Case(
            "scaled_linear",
            f"{kind} {outputs}x{inputs}, {rows} rows",
            lambda a=arguments: scaled_linear_triton(*a, counters=counters),
            (lambda a=arguments: scaled_linear_reference(*a)) if rows <= 256 else None,
            0.01,
            weight.nbytes + x.nbytes + 2 * rows * outputs,
            2 * rows * outputs * inputs,
            "int8" if kind == "int8" else "float8",
            peers=_peers(kind, *arguments),
        )


def _peers(
    kind: str, x: torch.Tensor, row_scales: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor
) -> dict[str, Run]:
    if not x.is_cuda:
        return {}
    if kind == "int8":
        return {"torch._int_mm": lambda: torch._int_mm(x, weight.t())}
    columns, rows = scales[None, :], row_scales[:, None]
    return {
        "torch._scaled_mm": lambda: torch._scaled_mm(
            x, weight.t(), scale_a=rows, scale_b=columns, out_dtype=torch.bfloat16
        )
    }


def _quantizations(device: torch.device, full: bool, kind: str) -> Iterator[Case]:
    tokens, hidden, width = (8192, 4096, 14336) if full else (3, 96, 70)
    dtype = torch.bfloat16 if full else torch.float32
    x, residual = (torch.randn(tokens, hidden, device=device).to(dtype) for _ in range(2))
    weight = torch.randn(hidden, device=device).to(dtype)
    gate_up = torch.randn(tokens, 2 * width, device=device).to(dtype)
    small = x.nbytes // dtype.itemsize
    done: dict[str, tuple[Run, Run, int]] = {
        "alone": (lambda: quantize_rows_triton(x, kind), lambda: quantize_rows_reference(x, kind), x.nbytes + small),
        "with residual and norm": (
            lambda: rms_norm_quantize_triton(x, weight, 1e-5, kind, residual),
            lambda: rms_norm_quantize_reference(x, weight, 1e-5, kind, residual),
            3 * x.nbytes + small,
        ),
        "with silu": (
            lambda: gated_mul_quantize_triton(gate_up, "silu", kind),
            lambda: gated_mul_quantize_reference(gate_up, "silu", kind),
            gate_up.nbytes + tokens * width,
        ),
    }
    for name, (ours, theirs, moved) in done.items():
        yield Case(
            "quantize_rows",
            f"{kind} {name}, {tokens} tokens",
            ours,
            theirs,
            0.02 if kind == "int8" else 0.15,  # a value at the edge of two steps may fall on either
            moved,
            bars=(Bar("bandwidth", 0.85),) if full else (),
        )
