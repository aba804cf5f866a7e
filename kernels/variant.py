"""What a kernel's module declares for ahead-of-time compilation: one use of it with its compile-time constants."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

TYPE_NAMES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}
"""Triton's name of each element type, as a signature spells it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Variant:
    """One kernel with the compile-time constants of one use.

    Attributes:
        kernel: the ``@triton.jit`` function.
        label: what it is used for.
        types: Triton type of each run-time parameter, in order.
        constants: value of each ``tl.constexpr`` parameter.
        options: num_warps and num_stages.
        needs_matrix_unit: its PTX must hold a matrix instruction.
        aligned: run-time parameters that are multiples of 16 in real models, besides strides and addresses.
        min_target, max_target: the compute capabilities that it is shipped for, e.g. from 89 on for FP8 products.
    """

    kernel: Any
    label: str
    types: dict[str, str]
    constants: dict[str, int | bool | float | None]
    options: dict[str, int]
    needs_matrix_unit: bool = False
    min_target: int = 80
    max_target: int = 999
    aligned: tuple[str, ...] = ()


def pointers(dtype: torch.dtype, *names: str) -> dict[str, str]:
    """The signature of parameters that point to elements of ``dtype``."""
    return dict.fromkeys(names, f"*{TYPE_NAMES[dtype]}")
