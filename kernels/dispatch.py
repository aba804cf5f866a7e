"""The one place that decides which implementation of an operation runs, and says why.

Nothing falls back in silence: a request that cannot be met yields a :class:`Choice` without a path, with the reason and
the remedy, and the caller refuses it. The path that ran is shown on the Live page and kept in every run's record.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from typing import Literal, get_args

import torch

from kernels.cpu import build
from kernels.cpu.attention import MAX_HEAD_DIM
from kernels.device import capability as gpu_capability
from kernels.kv_formats import KV_FORMATS

Op = Literal[
    "paged_attention",
    "linear",
    "kv_write",
    "rotary_kv_write",
    "weight_only_linear",
    "scaled_linear",
    "quantize_rows",
    "expert_linear",
    "rms_norm",
    "gated_mul",
    "sample",
]
"""Every operation. Those of Triton lie in the file of their name (see :func:`kernel_files`)."""

_OTHER_IMPLEMENTATIONS: dict[Op, tuple[str, ...]] = {
    "paged_attention": ("sdpa", "reference", "native", "triton"),
    "linear": ("torch", "native", "triton"),
    "sample": ("torch", "triton"),
}
IMPLEMENTATIONS: dict[Op, tuple[str, ...]] = {
    op: _OTHER_IMPLEMENTATIONS.get(op, ("reference", "triton")) for op in get_args(Op)
}
#: ``linear`` is weight_only_linear or scaled_linear, by the weight's format.
_OTHER_FILES: dict[Op, str | None] = {"linear": None, "sample": "sampling"}
_OF_HEADS = ("paged_attention", "kv_write", "rotary_kv_write")
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FP8_CAPABILITY = (8, 9)
TRITON_MAX_HEAD_DIM = 256  # a tile of queries, keys and values must fit into registers and shared memory


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """Which implementation of an operation runs.

    Attributes:
        op: the operation.
        path: what will run, e.g. ``"sdpa"`` or ``"triton (interpreter)"``; None if the request cannot be met.
        reason: why this path, or why none.
        remedy: what to do if ``path`` is None, else empty.
    """

    op: Op
    path: str | None
    reason: str
    remedy: str = ""


def kernel_files() -> tuple[str, ...]:
    """Files of this folder with the operations' Triton kernels, by name."""
    return tuple(file for op in IMPLEMENTATIONS if (file := _OTHER_FILES.get(op, op)) is not None)


def choose(
    op: Op, asked: str, *, device: torch.device | str, dtype: torch.dtype, head_dim: int | None = None
) -> Choice:
    """Decide how ``op`` runs.

    Args:
        op: the operation.
        asked: the implementation asked for, one of ``IMPLEMENTATIONS[op]``, or ``auto`` for the best that runs.
        device: where the tensors live.
        dtype: of the tensors (for attention: of queries and cache).
        head_dim: of one attention head, where the operation has heads.

    Returns:
        The choice; ``path`` is None where what was asked for cannot run.
    """
    known = IMPLEMENTATIONS[op]
    if asked not in (*known, "auto"):
        return Choice(op, None, f"there is no implementation {asked!r} of {op}.", f"Choose one of: {', '.join(known)}.")
    if asked == "auto":
        return _choose_best(op, torch.device(device), dtype, head_dim)
    if asked == "native":
        return _choose_native(op, known[0], torch.device(device), dtype, head_dim)
    if asked == "torch":
        return Choice(op, "torch", "torch's own operators run on every device.")
    if asked == "sdpa":
        return Choice(op, "sdpa", "torch's fused attention over gathered blocks runs on every device.")
    if asked == "reference":
        return Choice(op, "reference", "plain torch runs on every device.")
    return _choose_triton(op, known[0], torch.device(device), dtype, head_dim if op in _OF_HEADS else None)


def _choose_best(op: Op, device: torch.device, dtype: torch.dtype, head_dim: int | None) -> Choice:
    """The quickest implementation that runs here; its reason says why the quicker ones do not."""
    passed_over: list[str] = []
    for name in _BY_SPEED.get(op, ("triton", "reference")):
        choice = choose(op, name, device=device, dtype=dtype, head_dim=head_dim)
        if choice.path is not None and not choice.path.endswith("(interpreter)"):
            return dataclasses.replace(choice, reason=" ".join([choice.reason, *passed_over]))
        passed_over.append(f"Not {name}: {choice.reason}")
    raise AssertionError(f"nothing runs {op} on {device}")  # the last of each row runs everywhere


_BY_SPEED: dict[Op, tuple[str, ...]] = {
    "paged_attention": ("triton", "native", "sdpa"),
    "linear": ("triton", "native", "torch"),
    "sample": ("triton", "torch"),
}


def _choose_native(op: Op, other: str, device: torch.device, dtype: torch.dtype, head_dim: int | None) -> Choice:
    instead = f"Choose {other}."
    if device.type != "cpu":
        return Choice(op, None, f"the C++ kernels run on the CPU, the model is on {device}.", instead)
    if dtype not in (torch.float32, torch.bfloat16):
        remedy = f"Load the model in float32 or bfloat16, or {instead[0].lower()}{instead[1:]}"
        return Choice(op, None, f"the C++ kernels have no {dtype} form.", remedy)
    reason = build.why_not()
    if reason is not None:
        return Choice(op, None, reason, f"{instead} Or install a C++ compiler (g++ or clang++).")
    library = build.native()
    if head_dim is not None and (head_dim % library.lanes or head_dim > MAX_HEAD_DIM):
        reason = f"the C++ kernel takes heads of a multiple of {library.lanes} up to {MAX_HEAD_DIM}, not {head_dim}."
        return Choice(op, None, reason, instead)
    return Choice(op, f"native ({library.isa})", "built for this machine.")


def _choose_triton(op: Op, other: str, device: torch.device, dtype: torch.dtype, head_dim: int | None) -> Choice:
    instead = f"Choose {other}."
    if not triton_installed():
        return Choice(op, None, "Triton is not installed on this platform.", f"{instead} Triton needs Linux.")
    if dtype not in TRITON_DTYPES:
        return Choice(op, None, f"the Triton kernel has no {dtype} form.", f"Load the model in bfloat16, or {instead}")
    if head_dim is not None and head_dim > TRITON_MAX_HEAD_DIM:
        reason = f"the Triton kernel takes heads of up to {TRITON_MAX_HEAD_DIM} dimensions, this model has {head_dim}."
        return Choice(op, None, reason, instead)
    if triton_interpreted():
        return Choice(op, "triton (interpreter)", "TRITON_INTERPRET=1: kernels run in Triton's interpreter, slowly.")
    if device.type != "cuda":
        remedy = f"{instead} To check the kernel without a GPU, start the process with TRITON_INTERPRET=1."
        return Choice(op, None, f"the Triton kernel needs a CUDA device, the model is on {device}.", remedy)
    capability = gpu_capability(device)
    if capability < (8, 0):
        reason = f"the Triton kernel needs compute capability 8.0, this GPU has {capability[0]}.{capability[1]}."
        return Choice(op, None, reason, instead)
    return Choice(op, "triton", f"compiled for sm_{capability[0]}{capability[1]}.")


def cache_unsupported_reason(path: str, kv_format: str, device: torch.device | str, head_dim: int) -> Choice | None:
    """Why attention on ``path`` cannot have its cache in a format of :mod:`kernels.kv_formats`; None if it can."""
    packed = KV_FORMATS[kv_format].values_per_element
    if head_dim % packed:
        reason = f"{kv_format} packs {packed} dimensions into a byte, heads of this model have {head_dim}."
        return Choice("kv_write", None, reason, "Choose int8 or fp8.")
    if kv_format == "fp8" and path == "triton":
        capability = gpu_capability(device)
        if capability < FP8_CAPABILITY:
            reason = (
                f"Triton converts FP8 from compute capability 8.9 on, this GPU has {capability[0]}.{capability[1]}."
            )
            return Choice("kv_write", None, reason, "Choose int8, which takes the same memory, or attention=sdpa.")
    return None


@functools.cache
def triton_installed() -> bool:
    """True if Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def triton_interpreted() -> bool:
    """True if kernels run in Triton's interpreter.

    Triton reads ``TRITON_INTERPRET`` when a kernel is defined, so what counts once a kernel is imported is its kind.
    """
    if not triton_installed():
        return False
    from triton.runtime.interpreter import InterpretedFunction

    from kernels.kv_write import _kv_write_kernel

    return isinstance(_kv_write_kernel, InterpretedFunction)
