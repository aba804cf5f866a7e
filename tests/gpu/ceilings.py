"""What the device can do at best, measured in the same run as the kernels: everything is told as a fraction of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from tests.gpu.case import Size
from tests.gpu.timing import seconds


@dataclasses.dataclass(frozen=True, slots=True)
class Ceilings:
    """Measured rates.

    Attributes:
        copy_bytes_s: bytes read plus bytes written of a copy, per second.
        flops_s: operations per second of a square matrix product, by element type; a type that torch cannot multiply
            here is absent.
        absent: ``{type: why}``.
    """

    copy_bytes_s: float
    flops_s: dict[str, float]
    absent: dict[str, str]

    def floor_s(self, moved_bytes: int, flops: int, flop_unit: str) -> float | None:
        """Least time of a kernel: the roofline. None if the matrix rate that it needs is not known."""
        by_bytes = moved_bytes / self.copy_bytes_s
        if not flops:
            return by_bytes
        rate = self.flops_s.get(flop_unit)
        return None if rate is None else max(by_bytes, flops / rate)


def measure(device: torch.device, size: Size) -> Ceilings:
    """Copy a buffer far above the caches, multiply large square matrices of each type."""
    count, edge = (2**30, 8192) if size == "full" else (2**20, 64)
    source = torch.ones(count // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copy_s = seconds(lambda: target.copy_(source), device)
    flops_s: dict[str, float] = {}
    absent: dict[str, str] = {}
    for name, prepare in PRODUCTS.items():
        try:
            flops_s[name] = 2 * edge**3 / seconds(prepare(edge, device), device)
        except (RuntimeError, NotImplementedError, AttributeError) as error:
            absent[name] = str(error).splitlines()[0]
    return Ceilings(2 * source.nbytes / copy_s, flops_s, absent)


Product = Callable[[], torch.Tensor]


def _float_product(dtype: torch.dtype) -> Callable[[int, torch.device], Product]:
    def prepare(edge: int, device: torch.device) -> Product:
        x, y = (torch.randn(edge, edge, device=device).to(dtype) for _ in range(2))
        return lambda: x @ y

    return prepare


def _int8_product(edge: int, device: torch.device) -> Product:
    x, y = (torch.randint(-127, 128, (edge, edge), dtype=torch.int8, device=device) for _ in range(2))
    return lambda: torch._int_mm(x, y.t())


def _float8_product(edge: int, device: torch.device) -> Product:
    x, y = (torch.randn(edge, edge, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=device)
    return lambda: torch._scaled_mm(x, y.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)


PRODUCTS: dict[str, Callable[[int, torch.device], Product]] = {
    "bfloat16": _float_product(torch.bfloat16),
    "float16": _float_product(torch.float16),
    "int8": _int8_product,
    "float8": _float8_product,
}
