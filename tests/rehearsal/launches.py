"""Launches of Triton kernels on simulated GPUs: the launching code runs as it is, the kernel's reference computes.

Every ``…_triton`` function runs up to the launch, which is looked at and then does nothing: all tensors must be on one
GPU, that GPU must be the thread's current one, addresses must be multiples of 16 (Triton would compile the kernel again
for another), the grid must be one that CUDA takes, and the element types must be those of a variant that the kernel's
module declares for ahead-of-time compilation. What the kernel would have written, the reference beside it computes.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import BaseBackend
from triton.runtime.jit import JITFunction

from kernels import aot
from kernels.variant import TYPE_NAMES
from tests.rehearsal.runtime import SimulatedRuntime
from tests.rehearsal.simulated_gpu import SimulatedTensor, Simulation, bare

_GRID = (2**31 - 1, 65535, 65535)
_ONLY_TRITON = ("config", "num_splits", "counters", "candidates")  # how, not what
#: Module → its functions that launch; the reference has the same name but for the ending.
OPERATIONS = {
    "expert_linear": ("expert_linear",),
    "gated_mul": ("gated_mul",),
    "kv_write": ("kv_write",),
    "paged_attention": ("paged_attention",),
    "quantize_rows": ("quantize_rows", "rms_norm_quantize", "gated_mul_quantize"),
    "rms_norm": ("rms_norm",),
    "rotary_kv_write": ("rotary_kv_write",),
    "sampling": ("sample",),
    "scaled_linear": ("scaled_linear",),
    "weight_only_linear": ("weight_only_linear", "dequantize"),
}


class LaunchPad:
    """Takes the place of Triton's launcher.

    Args:
        simulation, runtime: of the GPUs.
        model_dtype: of the model; the variants declared are those of bfloat16.
    """

    def __init__(self, simulation: Simulation, runtime: SimulatedRuntime) -> None:
        self.simulation, self.runtime = simulation, runtime

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """From now on nothing is launched."""
        pad = self
        patch.setattr(
            JITFunction, "run", lambda kernel, *args, grid, warmup, **named: pad.launch(kernel, grid, args, named)
        )
        for module_name, operations in OPERATIONS.items():
            module = importlib.import_module(f"kernels.{module_name}")
            for operation in operations:
                launcher = getattr(module, f"{operation}_triton")
                reference = getattr(module, f"{operation}_reference", _dequantize)
                _replace(patch, launcher, pad.rehearsed(launcher, reference))

    def rehearsed(self, launcher: Callable[..., Any], reference: Callable[..., Any]) -> Callable[..., Any]:
        """``launcher``, its results filled in by ``reference``."""

        @functools.wraps(launcher)
        def run(*args: Any, **named: Any) -> Any:
            result = launcher(*args, **named)
            given = {name: bare(value) for name, value in named.items() if name not in _ONLY_TRITON}
            expected = reference(*map(bare, args), **given)
            for made, right in zip(tree_leaves(result), tree_leaves(expected), strict=True):
                if made is None:
                    continue
                if made.dtype is not right.dtype or made.shape != right.shape:
                    self.simulation.fail(f"{launcher.__name__} made {made}, its reference {right.shape} {right.dtype}")
                made.inner.copy_(right)
            return result

        return run

    def launch(self, kernel: JITFunction, grid: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Look at a launch."""
        name, fail = kernel.__name__, self.simulation.fail
        bound = {**dict(zip(kernel.arg_names, args, strict=False)), **named}
        missing = [parameter for parameter in kernel.arg_names if parameter not in bound]
        if missing:
            fail(f"{name} is launched without {missing}")
        tensors = {key: value for key, value in bound.items() if isinstance(value, torch.Tensor)}
        for key, tensor in tensors.items():
            if not isinstance(tensor, SimulatedTensor):
                fail(f"{name} is given {key} on {tensor.device}")
            if tensor.numel() and tensor.data_ptr() % 16:
                fail(f"{name} is given {key} at an address that is no multiple of 16")
        devices = {tensor.device for tensor in tensors.values()}
        if len(devices) != 1:
            fail(f"{name} is given tensors of {devices}")
        if devices != {self.runtime.current_device}:
            fail(f"{name} is launched on {self.runtime.current_device} with tensors of {devices.pop()}")
        if any(size < 0 or size > most for size, most in zip(grid, _GRID, strict=False)):
            fail(f"{name} is launched on a grid of {grid}")
        check_types(self.simulation, kernel, tensors)
        self.runtime.compiled.add(specialization(kernel, bound))
        self.simulation.note("launch", name)


def specialization(kernel: JITFunction, bound: dict[str, Any]) -> tuple[Any, ...]:
    """What Triton compiles a kernel for: its name, its constants and options, and what it looks at in the rest."""
    ways: list[Any] = [kernel.__name__]
    for parameter in kernel.params:
        value = bound[parameter.name]
        if parameter.is_constexpr:
            ways.append((parameter.name, str(value)))
        else:
            looked_at = not parameter.do_not_specialize
            value = bare(value) if isinstance(value, torch.Tensor) else value
            ways.append((parameter.name, *native_specialize_impl(BaseBackend, value, False, looked_at, looked_at)))
    options = {key: value for key, value in bound.items() if key not in kernel.arg_names}
    return (*ways, *sorted(options.items()))


def check_types(simulation: Simulation, kernel: JITFunction, tensors: dict[str, torch.Tensor]) -> None:
    """The element types must be those of a declared variant; what stands in for an absent tensor may be any.

    Variants are declared for models in bfloat16 (some in float32 too), so that stands for any 16-bit or 32-bit type.
    """
    counts: dict[int, int] = {}
    for tensor in tensors.values():
        counts[tensor.data_ptr()] = counts.get(tensor.data_ptr(), 0) + 1
    given = {key: f"*{TYPE_NAMES[tensor.dtype]}" for key, tensor in tensors.items() if counts[tensor.data_ptr()] == 1}
    variants = _declared().get(kernel.__name__, [])
    if not any(_fits(given, variant) for variant in variants):
        simulation.fail(f"{kernel.__name__} is launched with {given}; declared are {variants}")


def _fits(given: dict[str, str], declared: dict[str, str]) -> bool:
    """True if the types agree, one float type standing for the model's throughout."""
    models = {kind for key, kind in given.items() if declared.get(key) == "*bf16"}
    if len(models) > 1 or not models <= {"*bf16", "*fp16", "*fp32"}:
        return False
    return all(key not in declared or declared[key] in ("*bf16", kind) for key, kind in given.items())


@functools.cache
def _declared() -> dict[str, list[dict[str, str]]]:
    """Pointer types of every declared variant, by kernel."""
    found: dict[str, list[dict[str, str]]] = {}
    for module in aot.MODULES:
        for variant in aot.declared(module):
            types = {name: kind for name, kind in variant.types.items() if kind.startswith("*")}
            known = found.setdefault(variant.kernel.__name__, [])
            if types not in known:
                known.append(types)
    return found


def _dequantize(weight: Any, dtype: torch.dtype) -> torch.Tensor:
    return weight.dequantize().to(dtype)


def _replace(patch: pytest.MonkeyPatch, original: Any, replacement: Any) -> None:
    """Wherever a module of the engine has the function under its name."""
    for name, module in list(sys.modules.items()):
        if name.startswith(("engine.", "kernels.")) and getattr(module, original.__name__, None) is original:
            patch.setattr(module, original.__name__, replacement)
