"""CUDA graphs: decode batches of a few sizes are captured once and replayed, each by a single launch.

The largest bucket is captured first, one between two steps, all from one memory pool: the smaller ones fit into what
the largest left. Fused layers serve, and are what is captured, where they are supported.
"""

from __future__ import annotations

import time

from engine.attention.base import AttentionBackend
from engine.execution.base import Decision, Progress, Step, TokenRange
from engine.execution.captured_graph import CapturedGraph, CudaGraphCapture, GraphCapture, StaticBuffers
from engine.execution.eager import EagerMode
from engine.execution.environment import NEEDS_OWN_DECODER, ExecutionEnvironment, Kernels, Unsupported
from engine.execution.fused import FusedMode
from engine.execution.shaped import ShapedMode, ShapeNews

ATTENTION = "triton"  # the others plan on the host at every step, which a captured graph would not repeat
BUCKETS = (1, 2, 4, 8)
BUCKET_STEP = 16


def graph_buckets(max_num_seqs: int) -> tuple[int, ...]:
    """Batch sizes to capture, ascending: 1, 2, 4, 8, 16, 24, 32, 48, 64, 80 … and ``max_num_seqs``."""
    regular = (*BUCKETS, 16, 24, *range(32, max_num_seqs, BUCKET_STEP))
    return (*(size for size in regular if size < max_num_seqs), max_num_seqs)


def bucket_ranges(max_num_seqs: int) -> tuple[TokenRange, ...]:
    """The batch sizes that each captured graph serves, padded up to the last of the range."""
    sizes = graph_buckets(max_num_seqs)
    return tuple(TokenRange(low + 1, high) for low, high in zip((0, *sizes), sizes, strict=False))


class GraphsMode(ShapedMode):
    """A graph for each bucket of :func:`bucket_ranges`."""

    name = "graphs"
    uses_attention = True

    def __init__(self, environment: ExecutionEnvironment) -> None:
        super().__init__(environment)
        self._to_capture: list[TokenRange] = []
        self._attention: AttentionBackend | None = None
        self._capture: GraphCapture | None = None

    @classmethod
    def unsupported_reason(cls, environment: ExecutionEnvironment, kernels: Kernels) -> Unsupported | None:
        """As :meth:`ExecutionMode.unsupported_reason`."""
        if environment.own_decoder is None:
            return NEEDS_OWN_DECODER
        if environment.device.type != "cuda":
            return Unsupported(
                f"these are CUDA graphs, and the model is on {environment.device}.",
                "Choose compiled or eager, or load the model on a CUDA device.",
            )
        if kernels.attention != ATTENTION:
            return Unsupported(
                f"it needs attention={ATTENTION}: {kernels.attention} plans on the host at every step.",
                f"Set attention to {ATTENTION} in the same change.",
            )
        return None

    def prepare(self, attention: AttentionBackend) -> None:
        """As :meth:`ExecutionMode.prepare`."""
        environment = self.environment
        self._to_capture = sorted(bucket_ranges(environment.max_num_seqs), key=lambda tokens: tokens.high, reverse=True)
        self._attention, self._capture = attention, self.make_capture()
        if FusedMode.unsupported_reason(environment, environment.present_kernels(attention.name)) is None:
            self.fallback = FusedMode(environment)
            self.fallback.prepare(attention)

    def make_capture(self) -> GraphCapture:
        """What records this engine's graphs."""
        return CudaGraphCapture()

    def poll(self) -> None:
        """As :meth:`ExecutionMode.poll`: first what the fallback has to do, for that is what will be captured."""
        if self.fallback.has_work:
            self.fallback.poll()
        elif self._to_capture:
            self._capture_next(self._to_capture.pop(0))

    def _capture_next(self, tokens: TokenRange) -> None:
        began, environment = time.perf_counter(), self.environment
        assert self._capture is not None
        assert self._attention is not None
        cache = environment.cache
        try:
            buffers = StaticBuffers(
                tokens.high,
                -(-environment.max_model_len // cache.block_size),
                cache.num_blocks - 1,
                cache.block_size,
                environment.device,
            )
            shape = CapturedGraph(self.fallback, environment, self._attention, buffers, self._capture, tokens)
        except Exception as error:  # out of memory, or an operation that cannot be captured
            text = f"{type(error).__name__}: {error}"
            self.take_over(ShapeNews(tokens, None, time.perf_counter() - began, error=text))
            return
        self.take_over(ShapeNews(tokens, shape, time.perf_counter() - began, "captured"))

    @property
    def has_work(self) -> bool:
        """As :attr:`ExecutionMode.has_work`."""
        return self.fallback.has_work or bool(self._to_capture)

    def progress(self) -> Progress:
        """As :meth:`ExecutionMode.progress`; the fallback's pieces count along."""
        before = self.fallback.progress()
        done = before.done + len(self.prepared()) + len(self.failed())
        left = before.total - before.done + len(self._to_capture)
        current = before.current or (self._to_capture[0].label() if self._to_capture else "")
        return Progress(done, done + left, current)

    def decide(self, step: Step) -> Decision:
        """As :meth:`ExecutionMode.decide`."""
        if step.backend.name != ATTENTION:
            reason = f"a graph needs attention {ATTENTION}, not {step.backend.name}"
            return Decision(EagerMode(self.environment), reason)
        if not step.pure_decode:
            return Decision(self.fallback, "a graph holds pure decode batches only")
        return super().decide(step)

    def close(self) -> None:
        """As :meth:`ExecutionMode.close`."""
        self._to_capture, self._capture = [], None
        super().close()
