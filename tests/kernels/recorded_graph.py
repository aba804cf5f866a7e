"""A stand-in for CUDA graphs that runs on the CPU and is as strict as they are.

While work is captured, every operation of torch and every launch of an interpreted kernel is recorded with the very
tensors and numbers that it was given. A replay repeats these and nothing else: Python is not asked again, so whatever
the host decided during the capture is baked in, as on a GPU. What a capture on a GPU refuses is refused: reading a
value back, and tensors made from the host's numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor

from engine.execution.captured_graph import GraphCapture

#: Operators that wait for the device, or copy from memory that is not pinned: both break a capture.
FORBIDDEN = {
    "aten::item": "reads a value back",
    "aten::_local_scalar_dense": "reads a value back",
    "aten::is_nonzero": "reads a value back",
    "aten::equal": "reads a value back",
    "aten::argwhere": "has a size that only the device knows",
    "aten::where": "has a size that only the device knows",
    "aten::nonzero": "has a size that only the device knows",
    "aten::masked_select": "has a size that only the device knows",
    "aten::bincount": "has a size that only the device knows",
    "aten::_unique2": "has a size that only the device knows",
    "aten::unique_consecutive": "has a size that only the device knows",
    "aten::repeat_interleave.Tensor": "has a size that only the device knows",
    "aten::lift_fresh": "copies numbers of the host",
}


class CaptureError(RuntimeError):
    """What a GPU would have refused."""


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Callable[[], None]] = []
        self.kept: list[Any] = []  # a captured address stays its tensor's for as long as the graph lives

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        reason = FORBIDDEN.get(func.name())
        if reason is not None:
            raise CaptureError(f"{func.name()} {reason}")
        masks = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.bool]
        if func.name().startswith("aten::index") and masks:
            raise CaptureError(f"{func.name()} by a mask has a size that only the device knows")
        result = func(*args, **kwargs)
        self.kept.append((args, kwargs, result))
        given = {_address(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor) and _address(leaf) not in given]
        if func.name().startswith("aten::empty"):
            self.steps.append(lambda: _spoil(made))
        elif made:
            self.steps.append(lambda: _repeat(func, args, kwargs, result))
        elif func._schema.is_mutable:
            self.steps.append(lambda: _discard(func(*args, **kwargs)))
        return result  # otherwise a view: the same memory at every replay

    def launch(self, launched: GridExecutor, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        """An interpreted kernel is launched with these arguments."""
        self.kept.append((arguments, named))
        self.steps.append(lambda: _LAUNCH(launched, *arguments, **named))

    def replay(self) -> None:
        """Repeat what was recorded."""
        with torch.inference_mode():
            for step in self.steps:
                step()


_LAUNCH = GridExecutor.__call__


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _repeat(func: Any, args: Any, kwargs: Any, result: Any) -> None:
    """Compute again what an operator computed, into the memory of its first result."""
    for target, again in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
        if isinstance(target, torch.Tensor):
            target.copy_(again)


def _discard(result: Any) -> None:
    """What was asked for is done in place."""


def _spoil(tensors: list[torch.Tensor]) -> None:
    """Memory that is not yet written may hold anything."""
    for tensor in tensors:
        tensor.fill_(float("nan") if tensor.is_floating_point() else 99)


class RecordedCapture(GraphCapture):
    """See the module."""

    sizes: list[int]

    def __init__(self) -> None:
        self.sizes = []

    def capture(self, work: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        """As :meth:`GraphCapture.capture`; warmed up as on a GPU."""
        work()
        recording = _Recording()

        def launch(executor: GridExecutor, *arguments: Any, **named: Any) -> None:
            recording.launch(executor, arguments, named)
            with _disable_current_modes():
                _LAUNCH(executor, *arguments, **named)

        with pytest.MonkeyPatch.context() as patch, recording:
            patch.setattr(GridExecutor, "__call__", launch)
            result = work()
        self.sizes.append(result.shape[0])
        return recording.replay, result
