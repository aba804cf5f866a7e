"""INT4 and INT8 weights against the bandwidth and cuBLAS, on the linear layers of Llama-3.1-8B."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kernels.weight_only_linear import (
    LLAMA_3_1_8B,
    random_int4,
    random_int8,
    weight_only_linear_reference,
    weight_only_linear_triton,
)
from kernels.weight_only_packing import PackedWeight
from tests.gpu.case import Bar, Case, Run, Size


def cases(device: torch.device, size: Size) -> Iterator[Case]:
    """One row against the bandwidth, sixteen against cuBLAS, more for the record."""
    full = size == "full"
    shapes = LLAMA_3_1_8B if full else {"tiny": (40, 256)}
    dtype = torch.bfloat16 if full else torch.float32
    for name, (outputs, inputs) in shapes.items():
        dense = torch.randn(outputs, inputs, device=device).to(dtype)
        for kind, make, least in (("int4", random_int4, 0.75), ("int8", random_int8, 0.80)):
            weight = make(outputs, inputs, device)
            for rows in (1, 16, 64, 256) if full else (1, 3):
                bars = (Bar("bandwidth", least),) if rows == 1 else ()
                if rows == 16 and kind == "int4":
                    bars = (Bar("cuBLAS", 3.0),)
                yield _case(f"{kind} {name} {outputs}x{inputs}", weight, dense, rows, kind, bars)
            del weight


def _case(name: str, weight: PackedWeight, dense: torch.Tensor, rows: int, kind: str, bars: tuple[Bar, ...]) -> Case:
    x = torch.randn(rows, weight.inputs, device=dense.device).to(dense.dtype)
    payload = sum(part.nbytes for part in (weight.words, weight.scales) if part is not None)
    payload += 0 if weight.zeros is None else weight.zeros.nbytes
    peers: dict[str, Run] = {"cuBLAS": lambda: torch.nn.functional.linear(x, dense)}
    if kind == "int4" and x.is_cuda and (peer := _tinygemm(x, weight.outputs)) is not None:
        peers["torch int4"] = peer
    return Case(
        "weight_only_linear",
        f"{name}, {rows} rows",
        lambda: weight_only_linear_triton(x, weight),
        lambda: weight_only_linear_reference(x, weight),
        0.02 if x.dtype == torch.bfloat16 else 1e-5,
        payload + x.nbytes + rows * weight.outputs * x.element_size(),
        2 * rows * weight.outputs * weight.inputs,
        peers=peers,
        bars=bars,
    )


def _tinygemm(x: torch.Tensor, outputs: int) -> Run | None:
    """torch's own INT4 product; None where this torch has none."""
    try:
        q = torch.randint(0, 255, (outputs, x.shape[1] // 2), dtype=torch.uint8, device=x.device)
        packed = torch.ops.aten._convert_weight_to_int4pack(q, 8)
        grid = torch.ones(x.shape[1] // 128, outputs, 2, dtype=x.dtype, device=x.device)
        torch.ops.aten._weight_int4pack_mm(x, packed, 128, grid)
    except (RuntimeError, NotImplementedError, AttributeError):
        return None
    return lambda: torch.ops.aten._weight_int4pack_mm(x, packed, 128, grid)
