"""An engine's executor: asks the dispatcher at every step, prepares what is asked for, tells how far it is.

Everything here runs in the stepping thread, except :meth:`Executor.check`, which only looks.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from typing import Any

import torch

from engine.attention.base import AttentionBackend
from engine.attention.operator import AttendContext
from engine.cache.kv_cache import KVCache
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.execution.base import Answer, Execution, Step, TokenRange
from engine.execution.compiler import check_compiler
from engine.execution.dispatcher import GRAPHS_ATTENTION, Dispatcher, bucket_ranges
from engine.execution.eager import EagerExecution
from engine.execution.fused import FusedExecution, fused_unsupported_reason
from engine.execution.graphs import CudaGraphCapture, GraphCapture, GraphExecution, StaticBuffers
from engine.execution.native import NativeExecution, linear_kernels, native_unsupported_reason
from engine.execution.preparation import Preparation, ShapeNews
from engine.execution.warm_up import WarmUp, warm_up_step, warm_ups
from engine.layers.linear import Linear
from engine.models.decoder import Decoder
from engine.models.fallback import TransformersDecoder
from kernels.dispatch import choose

_BY_ATTENTION = ("auto", "native", "fused", "graphs")  # what is prepared depends on the attention backend

AnyDecoder = Decoder | TransformersDecoder
AddEvent = Callable[[str, str, dict[str, Any]], None]


class Executor:
    """How the forward passes of one engine run.

    Args:
        decoder: of the model; its weights may be swapped between two steps.
        cache: of the engine. For graphs its last block is scratch: the pool must not know it.
        device: where both live.
        max_tokens: the largest step.
        max_num_seqs: the largest decode batch.
        max_model_len: the longest context.
        add_event: writes into the engine's event log.
        warm_up_sampler: has the kernels compiled that choose a token from logits [1, vocab].
    """

    def __init__(
        self,
        decoder: AnyDecoder,
        cache: KVCache,
        device: torch.device,
        *,
        max_tokens: int,
        max_num_seqs: int,
        max_model_len: int,
        add_event: AddEvent,
        warm_up_sampler: Callable[[torch.Tensor], None] = lambda _: None,
    ) -> None:
        self.decoder, self.cache, self.device = decoder, cache, device
        scales = [decoder.attention_scale(layer) for layer in range(decoder.num_layers)]
        self.context = AttendContext(scales, decoder.layer_windows)
        self.dispatcher = Dispatcher()
        self.last = Answer("eager", None, "asked for")
        self._max_tokens, self._max_num_seqs, self._max_model_len = max_tokens, max_num_seqs, max_model_len
        self._add_event, self._warm_up_sampler = add_event, warm_up_sampler
        self._eager = EagerExecution(decoder)
        self._weights = WeightsWatch(decoder)
        self._attention: AttentionBackend | None = None
        self._preparation: Preparation | None = None
        self._began = time.perf_counter()
        self._to_capture: list[TokenRange] = []
        self._to_warm_up: list[WarmUp] = []
        self._num_warmed_up = 0
        self.make_capture: Callable[[], GraphCapture] = CudaGraphCapture
        self._capture: GraphCapture | None = None
        self._direct: Execution = self._eager  # what serves where no graph does

    @property
    def compiles_at_launch(self) -> bool:
        """Triton compiles here, each kernel when it is first launched."""
        return self.device.type == "cuda"

    # -- the knob --------------------------------------------------------------------------------------

    def check(self, config: EngineConfig, attention: AttentionBackend) -> None:
        """Refuse what this machine or model cannot do; any thread.

        Raises:
            ConfigError: naming the remedy.
        """
        if config.execution in ("auto", "eager"):
            return
        if not isinstance(self.decoder, Decoder):
            raise ConfigError(
                f"{config.execution!r} needs a family of our own decoder; this model runs through a fallback.",
                field="execution",
                remedy="Choose auto or eager.",
            )
        if config.execution == "compiled":
            check_compiler()
            # The compiler sees torch's operators; a kernel of ours that is launched from Python is none.
            launched = config.weights != "model" and self._linear_kernels(config) == "triton"
            reason = "the kernels of the quantized linear layers are launched, not compiled." if launched else None
            _refuse(config, reason, "Choose fused or graphs, or set linear to torch in the same change.")
            return
        if config.execution == "native":
            reason = native_unsupported_reason(self.decoder, self.device, attention.name, self._linear_kernels(config))
            _refuse(config, reason, "Choose auto or eager, or set attention and linear to native in the same change.")
            return
        if config.execution == "fused":
            reason = fused_unsupported_reason(self.decoder, self.device, attention.name)
            _refuse(config, reason, "Choose auto or eager, or set attention to triton in the same change.")
            return
        if self.device.type != "cuda":
            raise ConfigError(
                f"'graphs' are CUDA graphs, and the model is on {self.device}.",
                field="execution",
                remedy="Choose compiled or eager, or load the model on a CUDA device.",
            )
        if attention.name != GRAPHS_ATTENTION:
            raise ConfigError(
                f"'graphs' need attention={GRAPHS_ATTENTION}: {attention.name} plans on the host at every step.",
                field="execution",
                remedy=f"Set attention to {GRAPHS_ATTENTION} in the same change.",
            )

    def _linear_kernels(self, config: EngineConfig) -> str:
        """The kernels that the knob `linear` means here: "native", "triton", "torch" or, if there are none, "none"."""
        assert isinstance(self.decoder, Decoder), "checked before"
        chosen = choose("linear", config.linear, device=self.device, dtype=self.decoder.dtype)
        return (chosen.path or "none").partition(" ")[0]

    def configure(self, config: EngineConfig, attention: AttentionBackend) -> None:
        """Put knobs into force between two steps. Returns at once; shapes take over as they become ready."""
        same_attention = self._attention is not None and self._attention.name == attention.name
        self._attention = attention
        changed = config.execution != self.dispatcher.mode
        if changed or (config.execution in _BY_ATTENTION and not same_attention):
            self._start_over(config.execution)

    def close(self) -> None:
        """Cancel what is being prepared and drop what is."""
        self._start_over("eager")

    def _start_over(self, mode: str) -> None:
        """Cancel, forget, and begin to prepare for ``mode`` and the present weights."""
        self._cancel()
        self.dispatcher.forget()
        self.dispatcher.mode = mode
        self._weights.changed()  # whatever was swapped before is what will be prepared for
        self._prepare()

    def _cancel(self) -> None:
        if self._preparation is not None and self._preparation.running:
            self._preparation.cancel()
            self._add_event("execution", "preparation cancelled", {})
        self._preparation, self._to_capture, self._capture = None, [], None
        self._to_warm_up, self._num_warmed_up = [], 0

    def _prepare(self) -> None:
        self._began = time.perf_counter()
        if self.dispatcher.mode == "eager":
            return
        if self.dispatcher.mode in ("auto", "native", "fused"):
            self._go_direct()
            return
        assert isinstance(self.decoder, Decoder), "checked before"
        if self.dispatcher.mode == "compiled":
            wanted = [TokenRange(1, 1)]
            if self._max_tokens > 1:
                wanted.append(TokenRange(2, self._max_tokens))
            self._preparation = Preparation(self.decoder, self.context, self.device, wanted)
            weakref.finalize(self, self._preparation.cancel)  # an engine that is dropped leaves no compiler behind
            self._preparation.start()
        else:
            self._go_capturing()

    def _go_direct(self) -> None:
        """Nothing to wait for: the kernels take the weights as they lie. `auto` is eager where neither can run."""
        assert self._attention is not None
        mode, weights, name = self.dispatcher.mode, self._weights.label(), self._attention.name
        reasons = []
        if mode in ("auto", "native"):
            reason = native_unsupported_reason(self.decoder, self.device, name, linear_kernels(self.decoder))
            if reason is None:
                assert isinstance(self.decoder, Decoder), "said the unsupported"
                self.dispatcher.add(weights, NativeExecution(self.decoder, self.context, self.cache, self._max_tokens))
                return
            reasons.append(f"native execution is not had: {reason}")
        if mode == "fused" or (mode == "auto" and self.device.type == "cuda"):
            reason = fused_unsupported_reason(self.decoder, self.device, name)
            if reason is None:
                self._direct = self._add_fused()
                return
            reasons.append(f"fused execution is not had: {reason}")
        self.dispatcher.fail(weights, TokenRange(1, self._max_tokens), " ".join(reasons))

    def _add_fused(self) -> FusedExecution:
        """Fused layers serve from now on; where Triton compiles, it is to do so before a request needs it."""
        assert isinstance(self.decoder, Decoder), "said the unsupported"
        fused = FusedExecution(self.decoder, self.context, self._max_tokens)
        self.dispatcher.add(self._weights.label(), fused)
        if self.compiles_at_launch:
            self._to_warm_up = warm_ups(self._max_tokens, self._max_num_seqs, self._max_model_len)
        return fused

    def _go_capturing(self) -> None:
        """What is captured, and what serves the steps that no graph holds: fused layers where they can be had."""
        assert self._attention is not None
        self._to_capture = sorted(bucket_ranges(self._max_num_seqs), key=lambda tokens: tokens.high, reverse=True)
        self._capture = self.make_capture()
        self._direct = self._eager
        if fused_unsupported_reason(self.decoder, self.device, self._attention.name) is None:
            self._direct = self._add_fused()

    # -- stepping --------------------------------------------------------------------------------------

    def poll(self) -> None:
        """Between two steps: take over what has become ready, begin again after a swap of weights."""
        if self._weights.changed() and self.dispatcher.mode != "eager":
            self._cancel()
            self.dispatcher.forget()
            self._prepare()
        if self._preparation is not None:
            while not self._preparation.news.empty():
                self._take_over(self._preparation.news.get())
        if self._to_warm_up:
            self._warm_up_next(self._to_warm_up.pop(0))
        elif self._to_capture:
            self._capture_next(self._to_capture.pop(0))

    def forward(self, step: Step) -> torch.Tensor:
        """Hidden states [T, hidden_size] of a step, by what the dispatcher says; :attr:`last` tells what that was.

        Asks for the weights' state first: nothing prepared for other weights can run.
        """
        weights = self._weights.label()
        self.last = self.dispatcher.answer(
            step.num_tokens, pure_decode=step.pure_decode, attention=step.context.backend.name, weights=weights
        )
        return (self.last.shape or self._eager).forward(step)

    def _take_over(self, news: ShapeNews) -> None:
        weights = self._weights.label()
        detail = {"low": news.tokens.low, "high": news.tokens.high, "seconds": round(news.seconds, 2)}
        if news.shape is None:
            self.dispatcher.fail(weights, news.tokens, news.error)
            summary = f"{self.dispatcher.mode}: {news.tokens} tokens stay eager: {news.error}"
            self._add_event("execution", summary, {**detail, "error": news.error})
            return
        self.dispatcher.add(weights, news.shape)
        summary = f"{self.dispatcher.mode}: {news.tokens} tokens ready ({news.origin}, {news.seconds:.1f} s)"
        self._add_event("execution", summary, {**detail, "origin": news.origin})

    def _warm_up_next(self, size: WarmUp) -> None:
        """Compute a step for nobody."""
        assert self._attention is not None
        try:
            with torch.inference_mode():
                step = warm_up_step(size, self.cache, self.context, self._attention, self.device)
                hidden = self._direct.forward(step)
                # The head over as many rows as tokens are chosen in a step of that size: of a prompt one.
                logits = self.decoder.logits(hidden if step.pure_decode else hidden[-1:])
                if logits.shape[0] == 1:
                    self._warm_up_sampler(logits)
        except Exception as error:  # requests go on, and what fails for them is told there
            self._to_warm_up = []
            words = f"{type(error).__name__}: {error}"
            self._add_event("execution", f"warm-up stopped at {size.words()}: {words}", {"error": words})
            return
        self._num_warmed_up += 1
        if not self._to_warm_up:
            seconds = time.perf_counter() - self._began
            summary = f"kernels ready: {self._num_warmed_up} sizes of a step in {seconds:.1f} s"
            self._add_event("execution", summary, {"seconds": round(seconds, 2)})

    def _capture_next(self, tokens: TokenRange) -> None:
        began = time.perf_counter()
        assert self._capture is not None
        assert self._attention is not None
        size = self.cache.block_size
        try:
            buffers = StaticBuffers(
                tokens.high, -(-self._max_model_len // size), self.cache.num_blocks - 1, size, self.device
            )
            shape = GraphExecution(
                self._direct, self.context, self._attention, self.cache, buffers, self._capture, tokens
            )
        except Exception as error:  # out of memory, or an operation that cannot be captured
            words = f"{type(error).__name__}: {error}"
            self._take_over(ShapeNews(tokens, None, time.perf_counter() - began, error=words))
            return
        self._take_over(ShapeNews(tokens, shape, time.perf_counter() - began, "captured"))

    # -- looking at it ---------------------------------------------------------------------------------

    @property
    def preparing(self) -> bool:
        """True while shapes are still to come."""
        return self.has_work or (self._preparation is not None and self._preparation.running)

    @property
    def has_work(self) -> bool:
        """True while there is something that :meth:`poll` does itself, one piece a call."""
        return bool(self._to_warm_up or self._to_capture)

    def path(self) -> str:
        """What runs, for the record: the mode, the token counts it is prepared for, what failed."""
        mode, weights = self.dispatcher.mode, self._weights.label()
        if mode == "eager":
            return "eager"
        if mode in ("auto", "native", "fused"):
            return self.dispatcher.direct(weights) or "eager"
        ready = ", ".join(map(str, self.dispatcher.prepared(weights)))
        parts = [f"{mode} ({ready} tokens)" if ready else "eager"]
        if self.preparing:
            parts.append(f"preparing {mode}")
        parts += [f"{tokens} tokens eager: {error}" for tokens, error in self.dispatcher.failed(weights)]
        return "; ".join(parts)

    def status(self) -> dict[str, Any]:
        """For :class:`engine.outputs.EngineStatus`, JSON-ready; see there."""
        weights = self._weights.label()
        prepared = [str(tokens) for tokens in self.dispatcher.prepared(weights)]
        failed = [{"tokens": str(tokens), "error": error} for tokens, error in self.dispatcher.failed(weights)]
        failed = [] if self.dispatcher.mode == "auto" else failed  # auto has no wish that could fail
        return {
            "asked": self.dispatcher.mode,
            "last": self.last.mode,
            "reason": self.last.reason,
            "prepared": prepared,
            "failed": failed,
            "preparing": self._progress(len(prepared) + len(failed)),
        }

    def _progress(self, done: int) -> dict[str, Any] | None:
        if not self.preparing:
            return None
        if self._preparation is None:
            waiting: list[WarmUp | TokenRange] = [*self._to_warm_up, *self._to_capture]
            captured = done if self.dispatcher.mode == "graphs" else 0
            current, left, done = waiting[0].words(), len(waiting), captured + self._num_warmed_up
        else:
            tokens = self._preparation.current
            current, left = tokens.words() if tokens else "", self._preparation.num_left + (tokens is not None)
        seconds = round(time.perf_counter() - self._began, 1)
        return {"done": done, "total": done + left, "current": current, "seconds": seconds}


def _refuse(config: EngineConfig, reason: str | None, remedy: str) -> None:
    if reason is not None:
        words = f"{config.execution!r} execution cannot run here: {reason}"
        raise ConfigError(words, field="execution", remedy=remedy)


class WeightsWatch:
    """Knows when the weights of a decoder are no longer the ones they were.

    A prepared shape holds the very tensors it computes with. Who swaps them need not tell: two engines may share a
    model. So the layers are looked at whenever any layer of the process was given another format.
    """

    def __init__(self, decoder: AnyDecoder) -> None:
        self._linears = [linear for _, linear, _ in (*decoder.linears(), *decoder.tables())]
        self._formats = [linear.format for linear in self._linears]
        self._swaps = Linear.swaps
        self._generation = 0
        self._seen = 0
        self._label = self._make_label()

    def label(self) -> str:
        """Names the weights in force now: another name after every swap."""
        if self._swaps != Linear.swaps:
            self._swaps = Linear.swaps
            formats = [linear.format for linear in self._linears]
            if any(format is not known for format, known in zip(formats, self._formats, strict=True)):
                self._formats = formats
                self._generation += 1
                self._label = self._make_label()
        return self._label

    def _make_label(self) -> str:
        names = dict.fromkeys(format.name for format in self._formats)
        return f"{'+'.join(names)}#{self._generation}"

    def changed(self) -> bool:
        """True once after every swap."""
        self.label()
        changed, self._seen = self._generation != self._seen, self._generation
        return changed
