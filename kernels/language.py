"""Triton and its language, or stand-ins where Triton has no build, so that the torch references import everywhere.

A kernel's module must not use ``from __future__ import annotations``: Triton reads ``tl.constexpr`` from the signature.
"""

from __future__ import annotations

from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows: kernels are defined but never launched, kernels.dispatch refuses them

    class _Absent:
        """Takes the place of the module: any annotation is accepted, a decorated function stays as it is."""

        constexpr = Any

        @staticmethod
        def jit(function: Any = None, **_: Any) -> Any:
            return (lambda decorated: decorated) if function is None else function

    triton = _Absent()
    tl = _Absent()

__all__ = ["tl", "triton"]
