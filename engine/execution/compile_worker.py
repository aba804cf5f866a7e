"""The compiler, in a process of its own: ``python -m engine.execution.compile_worker``.

Tracing and code generation are minutes of Python; in the serving process they would hold its interpreter lock while
requests wait. Here they take a core at low priority, can be ended at any moment, and whatever goes wrong in a compiler
stays out of the engine. No weight is needed: a program takes them as inputs, and tensors of their shapes stand in.

    standard input    length (8 bytes), pickled :class:`CompileRequest`; then a line "low high" for each shape wanted
    standard output   a line of JSON for each: {"low", "high", "seconds"}, or {"error"}

A shape may come out shorter than wanted: where the code for few and for many tokens differs (a quantized product with
two ways), a program is right for one of them. The caller asks for the rest.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import pickle
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

import torch

from engine.attention import operator as attend_op
from engine.execution.base import TokenRange
from engine.execution.blueprint import LayerKind, fill_tree, put_together, tree_specs
from engine.execution.packages import UNBOUNDED, mark_complete, program_path
from engine.paths import private_dir

EXAMPLE_TOKENS = 8  # what a program for a range is traced with, where the range holds it: a small decode batch
NICENESS = 10


@dataclasses.dataclass(frozen=True, slots=True)
class CompileRequest:
    """What to compile.

    Attributes:
        kinds: the different layers of the decoder.
        device: where they will run.
        folder: where the programs are to be put.
    """

    kinds: tuple[LayerKind, ...]
    device: torch.device
    folder: Path


class _LayerProgram(torch.nn.Module):
    """A layer as a function of everything that can change: hidden states, angles, its address and its weights."""

    def __init__(self, kind: LayerKind) -> None:
        super().__init__()
        self._kind = kind

    def forward(self, arguments: list[torch.Tensor], where: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
        layer = put_together(self._kind.structure, weights)

        def attend(_: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            return attend_op.attend(query, key, value, where)

        result: torch.Tensor = layer(*fill_tree(self._kind.arguments, iter(arguments), attend))
        return result


def compile_shape(request: CompileRequest, wanted: TokenRange) -> TokenRange:
    """Compile every kind of layer for ``wanted`` or, where the code differs within it, for its first part.

    Returns:
        The numbers of tokens that the programs serve, from ``wanted.low`` on: often more than wanted.

    Raises:
        Exception: whatever tracing or the compiler has to say.
    """
    programs = [_trace(kind, wanted, request.device) for kind in request.kinds]
    tokens = TokenRange(wanted.low, min(high for _, high in programs))
    private_dir(request.folder)
    for number, (program, _) in enumerate(programs):
        final = program_path(request.folder, tokens, number)
        partial = final.with_suffix(f".{os.getpid()}.pt2")
        torch._inductor.aoti_compile_and_package(program, package_path=str(partial))
        partial.replace(final)
    mark_complete(request.folder, tokens)
    return tokens


def _trace(kind: LayerKind, wanted: TokenRange, device: torch.device) -> tuple[Any, int]:
    """The layer as a graph, and the largest number of tokens it is right for."""
    example = EXAMPLE_TOKENS if EXAMPLE_TOKENS in wanted else wanted.low
    program, low, high = _export(kind, example, device, static=wanted.low == wanted.high)
    if low > wanted.low:  # other code runs for fewer tokens: that comes first
        program, low, high = _export(kind, wanted.low, device, static=False)
    if low > wanted.low or (high == low and wanted.high > wanted.low):
        raise ValueError(f"the code of a layer depends on the very number of tokens ({low} to {high})")
    return program, high


def _export(kind: LayerKind, num_tokens: int, device: torch.device, *, static: bool) -> tuple[Any, int, int]:
    """Trace with ``num_tokens`` tokens: the program, and the range of token counts for which it is the same."""
    specs = list(tree_specs(kind.arguments))
    arguments = [spec.empty(device, num_tokens) for spec in specs]
    weights = [spec.empty(device) for spec in kind.weights]
    where = torch.zeros(2, dtype=torch.int64)
    dynamic: Any = None
    if not static:
        auto = torch.export.Dim.AUTO
        marks = [{dim: auto for dim, size in enumerate(spec.shape) if size == -1} for spec in specs]
        dynamic = (marks, {}, [{} for _ in weights])
    with torch.no_grad():
        program = torch.export.export(
            _LayerProgram(kind), (arguments, where, weights), dynamic_shapes=dynamic, strict=False
        )
    symbol = next(node for node in program.graph.nodes if node.op == "placeholder").meta["val"].shape[0]
    if isinstance(symbol, int):
        return program, symbol, symbol
    bounds = program.range_constraints[symbol.node.expr]
    high = int(bounds.upper) if bounds.upper.is_Integer else UNBOUNDED
    return program, int(bounds.lower), high


def _configure(num_threads: int) -> None:
    from torch._inductor import config

    # Loops are made for several threads; how many run is read from torch at each call.
    config.cpp.dynamic_threads = True
    config.cpp.threads = max(2, num_threads)
    config.compile_threads = 1  # one core is ours, the rest serves requests
    torch.set_num_threads(1)


def _respond(request: CompileRequest, line: str) -> dict[str, Any]:
    began = time.perf_counter()
    low, high = map(int, line.split())
    try:
        tokens = compile_shape(request, TokenRange(low, high))
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return {"error": f"{type(error).__name__}: {lines[0][:300]}"}
    return {"low": tokens.low, "high": tokens.high, "seconds": time.perf_counter() - began}


def _serve(inbox: IO[bytes], outbox: IO[str]) -> None:
    request: CompileRequest = pickle.loads(inbox.read(int.from_bytes(inbox.read(8), "little")))
    lines: list[str] = []
    arrived = threading.Condition()

    def listen() -> None:  # in a thread, to notice at once that the engine has gone
        for line in inbox:
            with arrived:
                lines.append(line.decode())
                arrived.notify()
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    for _ in itertools.count():
        with arrived:
            while not lines:
                arrived.wait()
            line = lines.pop(0)
        print(json.dumps(_respond(request, line)), file=outbox, flush=True)


def main() -> None:
    """Compile what standard input asks for until it ends."""
    os.nice(NICENESS)
    os.umask(0o077)  # what it writes is loaded as code, and only where nobody else can write
    # Compilers print what they like: the answers get a descriptor of their own, the rest goes to standard error.
    outbox = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _configure(os.cpu_count() or 1)
    _serve(sys.stdin.buffer, outbox)


if __name__ == "__main__":
    main()
