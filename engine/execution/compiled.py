"""Compiled execution: every layer is one call of a program that torch's compiler made of it.

Shapes are compiled in a process of their own, or come from disk, alongside the running engine
(:mod:`engine.execution.preparation`).
"""

from __future__ import annotations

import weakref

from engine.attention.base import AttentionBackend
from engine.execution.base import Progress, TokenRange
from engine.execution.compiler import missing_compiler
from engine.execution.environment import NEEDS_OWN_DECODER, ExecutionEnvironment, Kernels, Unsupported
from engine.execution.preparation import Preparation
from engine.execution.shaped import ShapedMode


class CompiledMode(ShapedMode):
    """Two shapes, one token and more, unless the code of the layers needs more of them."""

    name = "compiled"

    def __init__(self, environment: ExecutionEnvironment) -> None:
        super().__init__(environment)
        self.preparation: Preparation | None = None

    @classmethod
    def unsupported_reason(cls, environment: ExecutionEnvironment, kernels: Kernels) -> Unsupported | None:
        """As :meth:`ExecutionMode.unsupported_reason`."""
        if environment.own_decoder is None:
            return NEEDS_OWN_DECODER
        if (compiler := missing_compiler()) is not None:
            return Unsupported(
                f"it needs a C++ compiler, and there is no {compiler!r} on this machine.",
                "Install g++ (Debian: apt install g++), or set CXX to your compiler; eager needs none.",
            )
        # The compiler sees torch's operators; a kernel of ours that is launched from Python is none.
        if kernels.weights != "model" and kernels.linear == "triton":
            return Unsupported(
                "the kernels of the quantized linear layers are launched, not compiled.",
                "Choose fused or graphs, or set linear to torch in the same change.",
            )
        return None

    def prepare(self, attention: AttentionBackend) -> None:
        """As :meth:`ExecutionMode.prepare`."""
        environment, decoder = self.environment, self.environment.own_decoder
        assert decoder is not None, "checked before"
        wanted = [TokenRange(1, 1)]
        if environment.max_tokens > 1:
            wanted.append(TokenRange(2, environment.max_tokens))
        self.preparation = Preparation(decoder, environment.context, environment.device, wanted)
        weakref.finalize(self, self.preparation.cancel)  # an engine that is dropped leaves no compiler behind
        self.preparation.start()

    def poll(self) -> None:
        """As :meth:`ExecutionMode.poll`."""
        while self.preparation is not None and not self.preparation.news.empty():
            self.take_over(self.preparation.news.get())

    @property
    def preparing(self) -> bool:
        """As :attr:`ExecutionMode.preparing`."""
        if self.preparation is None:
            return False
        return self.preparation.running or not self.preparation.news.empty()  # in this order: the news come first

    def progress(self) -> Progress:
        """As :meth:`ExecutionMode.progress`."""
        done = len(self.prepared()) + len(self.failed())
        if self.preparation is None:
            return Progress(done, done, "")
        current = self.preparation.current
        left = self.preparation.num_left + (current is not None)
        return Progress(done, done + left, "" if current is None else current.label())

    def close(self) -> None:
        """As :meth:`ExecutionMode.close`; the compiling process ends at once."""
        if self.preparation is not None and self.preparation.running:
            self.preparation.cancel()
            self.environment.add_event("execution", "preparation cancelled", {})
        self.preparation = None
        super().close()
