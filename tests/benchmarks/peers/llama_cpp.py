"""llama.cpp as a peer, through the low-level functions of llama-cpp-python.

The binding's high-level class and server run one sequence at a time; ``llama_decode`` itself takes batches of several
sequences, which is how llama.cpp's own server works. :class:`SteppedLlama` steps as that server does: one token of
every sequence past its prompt, then as many prompt tokens as fit the batch.

Options: slots (sequences at once), unified (one KV buffer for all sequences instead of one each), flash_attention; and
``weights``, which names what the file holds.
"""

from __future__ import annotations

import abc
import importlib.metadata
from collections import deque
from typing import Any, ClassVar

from tests.benchmarks.peers.protocol import Order, Request, Timing, UnsupportedError, Work, drive, serve, shared_prefix

BATCH_TOKENS = 2048
MICRO_BATCH_TOKENS = 512
MAX_SLOTS = 64
PREFIX_SLOT = 0
"""The sequence that holds a shared prefix; requests use the others."""


class _Sequence:
    """One request in flight."""

    def __init__(self, request: Request, slot: int, num_cached: int) -> None:
        self.request = request
        self.slot = slot
        self.computed = num_cached
        self.produced = 0
        self.next_token: int | None = None


class SteppedLlama(abc.ABC):
    """A context with a slot for each sequence, stepped in batches; what llama.cpp and its forks have in common.

    Args:
        binding: module with the library's functions.
    """

    package: str
    defaults: ClassVar[dict[str, Any]]

    def __init__(self, order: Order, binding: Any) -> None:
        import numpy

        if not order.gguf:
            raise UnsupportedError("it reads GGUF files, and there is none of this shape")
        self._lib = binding
        self._numpy: Any = numpy
        self.options = self.defaults | order.options
        self.threads = order.threads
        binding.llama_backend_init()
        self.model = self._load_model(order.gguf)
        if not self.model:
            raise RuntimeError(f"{order.gguf} cannot be loaded")
        self.vocabulary = binding.llama_vocab_n_tokens(binding.llama_model_get_vocab(self.model))
        self.context: Any = None
        self._shape: tuple[int, int] | None = None
        self.batch = binding.llama_batch_init(BATCH_TOKENS, 0, 1)
        self.waiting: deque[Request] = deque()
        self.running: list[_Sequence] = []
        self.prefix: list[int] = []

    def versions(self) -> dict[str, str]:
        return {self.package: importlib.metadata.version(self.package)}

    def path(self) -> dict[str, str]:
        options = {name: str(value) for name, value in self.options.items()}
        known = {"system": self._system().strip(), "threads": str(self.threads)}
        return options | known | {"weights_bytes": str(self._model_size())}

    def warm_up(self, work: Work) -> None:
        """A context as large as the workload needs, and the shared prefix in it where there is one."""
        tokens = max(
            len(request.prompt_token_ids) + request.output_tokens for request in (*work.requests, *work.warmup)
        )
        slots = 1 if work.one_by_one else min(self.options.get("slots", MAX_SLOTS), len(work.requests))
        self._open_context(slots + 1, tokens)
        drive(self, work.warmup, one_by_one=slots == 1)
        self._forget_all()
        self.prefix = shared_prefix(work)
        if self.prefix:
            self._compute_prefix()

    def run(self, work: Work) -> list[Timing]:
        if work.changes:
            raise UnsupportedError("its settings are fixed when it is loaded")
        return drive(self, work.requests, one_by_one=work.one_by_one)

    # -- Stepper -----------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def unfinished(self) -> bool:
        return bool(self.waiting or self.running)

    def step(self) -> list[tuple[int, int]]:
        self._admit()
        self.batch.n_tokens = 0
        sampling: list[tuple[_Sequence, int]] = []  # sequence, row of the batch whose logits it needs
        for sequence in self.running:
            if sequence.next_token is not None:
                sampling.append((sequence, self._put(sequence.next_token, sequence.computed, sequence.slot, True)))
                sequence.computed += 1
        for sequence in self.running:
            if sequence.next_token is None:
                row = self._put_prompt(sequence)
                if row is not None:
                    sampling.append((sequence, row))
        self._decode()
        return [self._take(sequence, row) for sequence, row in sampling]

    def _admit(self) -> None:
        used = {sequence.slot for sequence in self.running}
        for slot in range(1, self._slots):
            if slot not in used and self.waiting:
                request = self.waiting.popleft()
                self.running.append(_Sequence(request, slot, self._reuse_prefix(request, slot)))

    def _put_prompt(self, sequence: _Sequence) -> int | None:
        """As much of the prompt as fits; the row of its last token once that is in."""
        prompt = sequence.request.prompt_token_ids
        count = min(BATCH_TOKENS - self.batch.n_tokens, len(prompt) - sequence.computed)
        row = None
        for position in range(sequence.computed, sequence.computed + count):
            last = position == len(prompt) - 1
            placed = self._put(prompt[position], position, sequence.slot, last)
            row = placed if last else None
        sequence.computed += count
        return row

    def _take(self, sequence: _Sequence, row: int) -> tuple[int, int]:
        logits = self._lib.llama_get_logits_ith(self.context, row)
        sequence.next_token = int(self._numpy.ctypeslib.as_array(logits, (self.vocabulary,)).argmax())
        sequence.produced += 1
        if sequence.produced == sequence.request.output_tokens:
            self.running.remove(sequence)
            self._forget(sequence.slot)
        return sequence.request.index, 1

    # -- the library -------------------------------------------------------------------------------------------

    def _open_context(self, slots: int, tokens: int) -> None:
        if self._shape == (slots, tokens):
            self._forget_all()
            return
        if self.context is not None:
            self._lib.llama_free(self.context)
        parameters = self._context_parameters(slots, -(-tokens // 256) * 256)
        self.context = self._lib.llama_init_from_model(self.model, parameters)
        if not self.context:
            raise RuntimeError(f"no context of {slots} sequences of {tokens} tokens")
        self._shape, self._slots = (slots, tokens), slots

    def _put(self, token: int, position: int, slot: int, wants_logits: bool) -> int:
        row, batch = self.batch.n_tokens, self.batch
        batch.token[row], batch.pos[row] = token, position
        batch.n_seq_id[row], batch.seq_id[row][0] = 1, slot
        batch.logits[row] = wants_logits
        batch.n_tokens = row + 1
        return row

    def _decode(self) -> None:
        status = self._lib.llama_decode(self.context, self.batch)
        if status != 0:
            raise RuntimeError(f"llama_decode: {status}")

    def _compute_prefix(self) -> None:
        self.batch.n_tokens = 0
        for position, token in enumerate(self.prefix):
            self._put(token, position, PREFIX_SLOT, position == len(self.prefix) - 1)
        self._decode()

    def _reuse_prefix(self, request: Request, slot: int) -> int:
        """Prompt tokens that the slot has already, copied from the shared prefix."""
        count = len(self.prefix)
        if not count or request.prompt_token_ids[:count] != self.prefix or count == len(request.prompt_token_ids):
            return 0
        self._copy(PREFIX_SLOT, slot)
        return count

    # -- what a fork may do otherwise --------------------------------------------------------------------------

    @abc.abstractmethod
    def _load_model(self, path: str) -> Any:
        """Handle of the model in that GGUF file; null if it cannot be read."""

    @abc.abstractmethod
    def _context_parameters(self, slots: int, tokens: int) -> Any:
        """The library's parameters of a context for so many slots of so many tokens each."""

    @abc.abstractmethod
    def _model_size(self) -> int:
        """Bytes of the weights."""

    @abc.abstractmethod
    def _system(self) -> str:
        """Instruction sets, as the library names them."""

    @abc.abstractmethod
    def _forget_all(self) -> None:
        """Empty the cache."""

    @abc.abstractmethod
    def _forget(self, slot: int) -> None:
        """Drop what the cache holds of a slot."""

    @abc.abstractmethod
    def _copy(self, source: int, target: int) -> None:
        """Let a slot hold what another one does."""


class LlamaCpp(SteppedLlama):
    """llama.cpp itself."""

    package = "llama-cpp-python"
    defaults: ClassVar[dict[str, Any]] = {"unified": False, "flash_attention": "auto"}

    def __init__(self, order: Order) -> None:
        import llama_cpp

        super().__init__(order, llama_cpp)

    def _load_model(self, path: str) -> Any:
        return self._lib.llama_model_load_from_file(path.encode(), self._lib.llama_model_default_params())

    def _context_parameters(self, slots: int, tokens: int) -> Any:
        parameters = self._lib.llama_context_default_params()
        parameters.n_ctx = slots * tokens
        parameters.n_batch, parameters.n_ubatch, parameters.n_seq_max = BATCH_TOKENS, MICRO_BATCH_TOKENS, slots
        parameters.n_threads = parameters.n_threads_batch = self.threads
        parameters.kv_unified = self.options["unified"]
        parameters.flash_attn_type = {"auto": -1, "off": 0, "on": 1}[self.options["flash_attention"]]
        return parameters

    def _model_size(self) -> int:
        return int(self._lib.llama_model_size(self.model))

    def _system(self) -> str:
        return str(self._lib.llama_print_system_info().decode())

    def _forget_all(self) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self.context), True)

    def _forget(self, slot: int) -> None:
        self._lib.llama_memory_seq_rm(self._lib.llama_get_memory(self.context), slot, -1, -1)

    def _copy(self, source: int, target: int) -> None:
        self._lib.llama_memory_seq_cp(self._lib.llama_get_memory(self.context), source, target, -1, -1)


if __name__ == "__main__":
    serve(LlamaCpp)
