"""Preparing compiled shapes alongside the running engine.

A thread describes the layers, takes each shape from disk or has it compiled in a process of its own, loads it, and puts
news into a queue. The stepping thread reads the queue between two steps; nothing else is shared.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence

import torch

from engine.attention.operator import AttendContext
from engine.execution.base import PreparedShape, TokenRange
from engine.execution.blueprint import DecoderBlueprint, draw
from engine.execution.compile_worker import CompileRequest
from engine.execution.compiled_shape import load_shape
from engine.execution.compiler import CompileError, CompilerProcess
from engine.execution.packages import compiler_cache_dir, find_shape, packages_dir
from engine.execution.shaped import ShapeNews
from engine.models.decoder import Decoder
from engine.paths import private_dir
from kernels.trust import why_not_trusted


class Preparation:
    """One run through the wanted shapes.

    Args:
        decoder: read, never changed. If its weights are swapped meanwhile, what comes out is discarded by the caller.
        context: of the engine.
        device: where the model lives.
        wanted: numbers of tokens to prepare for, in order; the code may split them further.
    """

    def __init__(
        self, decoder: Decoder, context: AttendContext, device: torch.device, wanted: Sequence[TokenRange]
    ) -> None:
        self._decoder, self._context, self._device = decoder, context, device
        self._wanted = list(wanted)
        self._compiler: CompilerProcess | None = None
        self._cancelled = threading.Event()
        self._lock = threading.Lock()
        self.news: queue.SimpleQueue[ShapeNews] = queue.SimpleQueue()
        self.current: TokenRange | None = None
        self._thread = threading.Thread(target=self._run, name="prepare-execution", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    @property
    def running(self) -> bool:
        """True until all shapes are there or have failed."""
        return self._thread.is_alive()

    @property
    def num_left(self) -> int:
        """Shapes not yet begun, the present one not counted."""
        return len(self._wanted)

    def cancel(self) -> None:
        """Stop as soon as possible; the compiling process ends at once."""
        self._cancelled.set()
        with self._lock:
            if self._compiler is not None:
                self._compiler.close()

    def join(self, timeout: float) -> None:
        """Wait for the thread."""
        self._thread.join(timeout)

    def _run(self) -> None:
        try:
            blueprint = draw(self._decoder, self._device)
        except Exception as error:
            for tokens in self._wanted:
                self.news.put(ShapeNews(tokens, None, 0.0, error=f"{type(error).__name__}: {error}"))
            return
        folder = packages_dir(blueprint, self._device)
        with self._lock:
            self._compiler = CompilerProcess(CompileRequest(blueprint.kinds, self._device, folder))
        try:
            while self._wanted and not self._cancelled.is_set():
                self.current = self._wanted.pop(0)
                self._prepare(self.current, blueprint)
        finally:
            self.current = None
            self._compiler.close()

    def _prepare(self, tokens: TokenRange, blueprint: DecoderBlueprint) -> None:
        """Prepare one shape; what the code splits off is put back in front."""
        began = time.perf_counter()
        try:
            shape, origin = self._load_or_compile(tokens, blueprint)
        except Exception as error:
            text = str(error) if isinstance(error, CompileError) else f"{type(error).__name__}: {error}"
            self._tell(ShapeNews(tokens, None, time.perf_counter() - began, error=text))
            return
        if shape.tokens.high < tokens.high:
            self._wanted.insert(0, TokenRange(shape.tokens.high + 1, tokens.high))
        self._tell(ShapeNews(shape.tokens, shape, time.perf_counter() - began, origin))

    def _load_or_compile(self, tokens: TokenRange, blueprint: DecoderBlueprint) -> tuple[PreparedShape, str]:
        folder = private_dir(packages_dir(blueprint, self._device))
        for place in (folder, private_dir(compiler_cache_dir())):
            if reason := why_not_trusted(place):
                raise CompileError(reason)
        packaged, origin = find_shape(folder, tokens.low, len(blueprint.kinds)), "from disk"
        if packaged is None:
            assert self._compiler is not None
            self._compiler.compile(tokens)
            packaged, origin = find_shape(folder, tokens.low, len(blueprint.kinds)), "compiled"
        if packaged is None:
            raise CompileError("the compiled programs have disappeared from the cache folder")
        return load_shape(packaged, tokens, self._decoder, blueprint, self._context, self._device), origin

    def _tell(self, news: ShapeNews) -> None:
        if not self._cancelled.is_set():
            self.news.put(news)
