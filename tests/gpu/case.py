"""What the proof on a GPU measures of one kernel at one shape.

Each kernel has a file ``cases_<kernel>.py`` beside this one with ``cases(device, size)``. ``size`` is ``"full"``, the
shapes that the bars are about, or ``"tiny"``, for the interpreter: so ``make test`` runs every case without a GPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Literal, Protocol

import torch

Size = Literal["full", "tiny"]
Run = Callable[[], torch.Tensor | tuple[torch.Tensor, ...] | None]


@dataclasses.dataclass(frozen=True, slots=True)
class Bar:
    """What a case must reach.

    Attributes:
        of: ``"bandwidth"`` (of the copy measured in the same run), ``"flops"`` (of the matrix product in ``flop_unit``
            measured in the same run), or the name of a peer (a ratio of times: how many times as fast).
        at_least: the fraction or ratio.
    """

    of: str
    at_least: float


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """One kernel at one shape, on tensors that are already there.

    Attributes:
        kernel: the operation, a row of ``kernels.dispatch.IMPLEMENTATIONS``.
        label: the shape in words, e.g. ``"decode bf16, batch 64, context 8192, 32/8 heads of 128"``.
        run: launches the kernel once.
        reference: computes the same with plain torch; None at shapes too large for it (a smaller case covers it).
        result: reads what ``run`` leaves behind, where it returns nothing to compare (a cache that is written).
        tolerance: largest absolute difference allowed, as a fraction of the reference's largest absolute value.
        moved_bytes: least traffic with the GPU's memory: what must be read and written once.
        flops: multiplications and additions.
        flop_unit: whose peak they are held to: ``"bfloat16"``, ``"float8"``, ``"int8"``.
        peers: the same computation by others, by name; one that cannot run here is left out.
        bars: what must be reached on an H200.
    """

    kernel: str
    label: str
    run: Run
    reference: Run | None
    tolerance: float
    moved_bytes: int
    flops: int = 0
    flop_unit: str = "bfloat16"
    peers: dict[str, Run] = dataclasses.field(default_factory=dict)
    bars: tuple[Bar, ...] = ()
    result: Run | None = None


class Cases(Protocol):
    """``cases`` of a ``cases_<kernel>.py``: one after another, so that a case's tensors go before the next's come."""

    def __call__(self, device: torch.device, size: Size) -> Iterator[Case]:
        """Cases of one kernel on a device."""
        ...
