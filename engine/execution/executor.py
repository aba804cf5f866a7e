"""An engine's executor: makes the mode that the knob asks for, has it decide at every step, tells how far it is.

    Executor ── one at a time, from MODES ──> ExecutionMode ── decides ──> itself | a prepared shape | eager
       └── WeightsWatch: other weights, another mode object

Everything here runs in the stepping thread, except :meth:`Executor.check`, which only looks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from engine.attention.base import AttentionBackend
from engine.attention.operator import AttendContext
from engine.cache.kv_cache import KVCache
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.execution.base import Decision, Step
from engine.execution.eager import EagerMode
from engine.execution.environment import AddEvent, AnyDecoder, ExecutionEnvironment, Kernels
from engine.execution.mode import ExecutionMode
from engine.execution.modes import MODES
from engine.execution.weights_watch import WeightsWatch
from kernels.dispatch import choose

_SWAPPED = "the weights were swapped; nothing is prepared for the new ones yet"


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

    Attributes:
        environment: what the modes work on.
        mode: the current one; eager until :meth:`configure`.
        last: what ran the last step, and why.
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
        scales = [decoder.attention_scale(layer) for layer in range(decoder.num_layers)]
        self.environment = ExecutionEnvironment(
            decoder=decoder,
            cache=cache,
            device=device,
            context=AttendContext(scales, decoder.layer_windows),
            max_tokens=max_tokens,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            add_event=add_event,
            warm_up_sampler=warm_up_sampler,
        )
        self._eager = EagerMode(self.environment)
        self.mode: ExecutionMode = self._eager
        self.last = Decision(self._eager, "asked for")
        self._weights = WeightsWatch(decoder)
        self._prepared_for = self._weights.label()
        self._attention: AttentionBackend | None = None
        self._began = time.perf_counter()

    # -- the knob --------------------------------------------------------------------------------------

    def check(self, config: EngineConfig, attention: AttentionBackend) -> None:
        """Refuse what this machine or model cannot do; any thread.

        Raises:
            ConfigError: naming the remedy.
        """
        kernels = Kernels(attention.name, self._linear_kernels(config), config.weights)
        unsupported = MODES[config.execution].unsupported_reason(self.environment, kernels)
        if unsupported is not None:
            text = f"{config.execution!r} execution cannot run here: {unsupported.reason}"
            raise ConfigError(text, field="execution", remedy=unsupported.remedy)

    def _linear_kernels(self, config: EngineConfig) -> str:
        """The kernels that the knob `linear` means here: "native", "triton", "torch" or, if there are none, "none"."""
        decoder = self.environment.own_decoder
        if decoder is None:
            return "torch"
        chosen = choose("linear", config.linear, device=self.environment.device, dtype=decoder.dtype)
        return (chosen.path or "none").partition(" ")[0]

    def configure(self, config: EngineConfig, attention: AttentionBackend) -> None:
        """Apply knobs between two steps. Returns at once; what must be prepared takes over as it becomes ready."""
        same_attention = self._attention is not None and self._attention.name == attention.name
        self._attention = attention
        mode = MODES[config.execution]
        if config.execution != self.mode.name or (mode.uses_attention and not same_attention):
            self._change_to(mode)

    def close(self) -> None:
        """Cancel what is being prepared and drop what is."""
        self._change_to(EagerMode)

    def _change_to(self, mode: type[ExecutionMode]) -> None:
        """Cancel, drop, and begin to prepare the mode for the present weights."""
        self.mode.close()
        self._prepared_for = self._weights.label()
        self._began = time.perf_counter()
        self.mode = mode(self.environment)
        if self._attention is not None:
            self.mode.prepare(self._attention)

    # -- stepping --------------------------------------------------------------------------------------

    def poll(self) -> None:
        """Between two steps: take over what has become ready, begin again after a swap of weights."""
        if self._swapped:
            self._change_to(type(self.mode))
        self.mode.poll()

    def forward(self, step: Step) -> torch.Tensor:
        """Hidden states [T, hidden_size] of a step, by what the mode decides; :attr:`last` tells what that was.

        Asks for the weights' state first: nothing prepared for other weights can run.
        """
        self.environment.enter(step)
        self.last = Decision(self._eager, _SWAPPED) if self._swapped else self.mode.decide(step)
        return self.last.execution.forward(step)

    def forward_over(self, cache: KVCache, step: Step) -> torch.Tensor:
        """As :meth:`forward` over another cache than the engine's, by eager execution."""
        self.environment.context.enter(step.backend, cache, step.batch)  # every step enters its own again
        return self._eager.forward(step)

    @property
    def _swapped(self) -> bool:
        return self._weights.label() != self._prepared_for

    # -- looking at it ---------------------------------------------------------------------------------

    @property
    def preparing(self) -> bool:
        """True while something is still to come."""
        return self.mode.preparing

    @property
    def has_work(self) -> bool:
        """True while there is something that :meth:`poll` does itself, one piece a call."""
        return self.mode.has_work

    def path(self) -> str:
        """What runs, for the record: the mode, the token counts it is prepared for, what failed."""
        return (self._eager if self._swapped else self.mode).path()

    def status(self) -> dict[str, Any]:
        """For :class:`engine.outputs.EngineStatus`, JSON-ready; see there."""
        mode = self.mode
        return {
            "asked": mode.name,
            "last": self.last.mode,
            "reason": self.last.reason,
            "prepared": [str(tokens) for tokens in mode.prepared()],
            "failed": [{"tokens": str(tokens), "error": error} for tokens, error in mode.failed()],
            "preparing": self._progress() if mode.preparing else None,
        }

    def _progress(self) -> dict[str, Any]:
        progress = self.mode.progress()
        seconds = round(time.perf_counter() - self._began, 1)
        return {"done": progress.done, "total": progress.total, "current": progress.current, "seconds": seconds}
