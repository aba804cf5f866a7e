"""Weight-only linear layers on the CPU: packing into panels, and the product; ``native/linear.h`` has the layout."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch.nn import functional as F

from kernels.cpu.attention import DTYPES
from kernels.cpu.build import native

MOST_GROUP = 128  # columns whose products are summed as integers
BYTE_GROUP = 32  # columns of W4A8 that share a scale
WEIGHT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.uint8: 3}
W4A8_TYPE = 5


@dataclasses.dataclass(frozen=True, slots=True)
class PanelWeight:
    """A weight [N, K] in panels of P outputs, which divides N.

    Attributes:
        panels: [N / P, K, P] in float32 or bfloat16; int8 [N / P, K / 2, P, 2], two columns of an output side by side;
            uint8 [N / P, K / 4, P / 2, 2, 2] for INT4: of column 4i + a + 2b (a and b the last two indices) output j
            in the low half and output j + P / 2 in the high half of a byte, both as q = 0 … 15.
        scales: INT8: bfloat16 [N]. None otherwise.
        grids: INT4: bfloat16 [N / P, K / group, 2, P]: scales, then zero points; w = (q - 8) · scale + zero.
        outputs, inputs: N and K.
        group: columns whose activations share a scale, and of INT4 also a grid; 0 where activations stay floats.
        activation_bits: to which activations are rounded where they do not stay floats: 16, or with INT4 8.
    """

    panels: torch.Tensor
    scales: torch.Tensor | None
    grids: torch.Tensor | None
    outputs: int
    inputs: int
    group: int = 0
    activation_bits: int = 16

    @property
    def type(self) -> int:
        """Number of the type, as the kernels know it."""
        return W4A8_TYPE if self.activation_bits == 8 else WEIGHT_TYPES[self.panels.dtype]

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Rows ``index`` (int64 [T], each below N) of the weight, float32 [T, K]: the lookup of a tied embedding."""
        index = index.contiguous()
        out = torch.empty(index.shape[0], self.inputs)
        native().functions.headroom_rows(
            *(self.type, self.panels.data_ptr(), _pointer(self.grids), _pointer(self.scales)),
            *(self.outputs, self.inputs, self.group or 1, index.data_ptr(), index.shape[0], out.data_ptr()),
        )
        return out

    def dequantize(self) -> torch.Tensor:
        """The weight that is multiplied with, float32 [N, K]."""
        return self.rows(torch.arange(self.outputs))


def to_panels(values: torch.Tensor) -> torch.Tensor:
    """[N, …] → [N / P, …, P]: P rows side by side."""
    return values.view(-1, native().panel, *values.shape[1:]).movedim(1, -1).contiguous()


def pack_float(weight: torch.Tensor) -> PanelWeight:
    """A float32 or bfloat16 weight [N, K] as it is."""
    return PanelWeight(to_panels(weight), None, None, *weight.shape)


def pack_int8(q: torch.Tensor, scales: torch.Tensor) -> PanelWeight:
    """w = q · scale: q int8 [N, K], K even, scales bfloat16 [N]."""
    outputs, inputs = q.shape
    pairs = to_panels(q).view(-1, inputs // 2, 2, native().panel).transpose(2, 3).contiguous()
    return PanelWeight(pairs, scales, None, outputs, inputs, math.gcd(inputs, MOST_GROUP))


def pack_int4(q: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> PanelWeight:
    """w = (q - 8) · scale + zero: q uint8 [N, K] in 0 … 15; scales and zeros bfloat16 [N, K / group]."""
    outputs, inputs = q.shape
    width = native().panel
    values = to_panels(q).view(-1, inputs // 4, 2, 2, width)  # columns 4i + 2b + a
    halves = values[..., : width // 2] | (values[..., width // 2 :] << 4)
    panels = halves.permute(0, 1, 4, 3, 2).contiguous()
    grids = torch.stack((to_panels(scales), to_panels(zeros)), dim=2)
    return PanelWeight(panels, None, grids.contiguous(), outputs, inputs, inputs // scales.shape[1])


def pack_w4a8(q: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> PanelWeight:
    """As :func:`pack_int4` with groups of :data:`BYTE_GROUP` columns, in which activations are rounded to 8 bits.

    Raises:
        ValueError: if the groups have another size.
    """
    if q.shape[1] != BYTE_GROUP * scales.shape[1]:
        raise ValueError(f"scales must be of groups of {BYTE_GROUP} columns: {list(scales.shape)} of {list(q.shape)}")
    return dataclasses.replace(pack_int4(q, scales, zeros), activation_bits=8)


def round_to_bytes(x: torch.Tensor) -> torch.Tensor:
    """What W4A8 multiplies with: x [M, K] rounded to 8 bits in groups of :data:`BYTE_GROUP` columns, in its dtype."""
    groups = x.float().reshape(x.shape[0], -1, BYTE_GROUP)
    largest = groups.abs().amax(-1, keepdim=True)
    quotient = torch.full_like(largest, 127.0) / largest  # `127.0 / largest` would round twice
    factor = torch.where(largest > 0, quotient, 0.0)
    whole = (groups.double() * factor.double()).round()  # the exact product is rounded, as a fused multiply-add does
    return (whole.float() * (largest / 127.0)).flatten(1).to(x.dtype)


def linear(x: torch.Tensor, weight: PanelWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """x Wᵀ + bias, in a fixed order whatever the number of threads.

    Float weights: products and sums in float32. INT8 and INT4: x is rounded to 16 bits in groups of columns, by
    1.5e-5 of a group's largest value (W4A8: to 8 bits, by a 254th); sums within a group are exact, a row's result
    depends on no other row.

    Args:
        x: float32 or bfloat16 [M, K].
        weight: as packed here.
        bias: [N] or None.

    Returns:
        [M, N] in the dtype of ``x``.
    """
    if torch.compiler.is_compiling():
        y: torch.Tensor = torch.ops.headroom.cpu_linear(
            *(x, weight.panels, weight.scales, weight.grids, bias),
            *(weight.outputs, weight.group, weight.type),
        )
        return y
    return _linear(x, weight.panels, weight.scales, weight.grids, bias, weight.outputs, weight.group, weight.type)


def linear_reference(x: torch.Tensor, weight: PanelWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """The same in plain torch; 16-bit activations as they are."""
    x = round_to_bytes(x.float()) if weight.activation_bits == 8 else x
    return F.linear(x.float(), weight.dequantize(), None if bias is None else bias.float()).to(x.dtype)


def _linear(
    x: torch.Tensor,
    panels: torch.Tensor,
    scales: torch.Tensor | None,
    grids: torch.Tensor | None,
    bias: torch.Tensor | None,
    outputs: int,
    group: int,
    type: int,
) -> torch.Tensor:
    x = x.contiguous()
    y = torch.empty(x.shape[0], outputs, dtype=x.dtype)
    if not x.shape[0]:
        return y
    wide = None if bias is None else bias.float()  # bound to a name: its memory must outlive the call
    native().functions.headroom_linear(
        *(x.data_ptr(), DTYPES[x.dtype], x.shape[0], type, panels.data_ptr()),
        *(_pointer(grids), _pointer(scales), _pointer(wide), outputs, x.shape[1], group or 1),
        *(y.data_ptr(), torch.get_num_threads()),
    )
    return y


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


# The same call as an operator that torch.compile can keep as one opaque step of its graph.
_OPS = torch.library.Library("headroom", "FRAGMENT")  # type: ignore[no-untyped-call]
_OPS.define(  # type: ignore[no-untyped-call]
    "cpu_linear(Tensor x, Tensor panels, Tensor? scales, Tensor? grids, Tensor? bias, int outputs, int group, int type)"
    " -> Tensor"
)
_OPS.impl("cpu_linear", _linear, "CPU")  # type: ignore[no-untyped-call]


@torch.library.register_fake("headroom::cpu_linear")  # type: ignore[untyped-decorator]
def _linear_fake(
    x: torch.Tensor,
    panels: torch.Tensor,
    scales: torch.Tensor | None,
    grids: torch.Tensor | None,
    bias: torch.Tensor | None,
    outputs: int,
    group: int,
    type: int,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], outputs)
