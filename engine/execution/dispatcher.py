"""The only truth about what is prepared: for every step it says which shape runs, or that eager runs and why."""

from __future__ import annotations

from collections.abc import Sequence

from engine.execution.base import Answer, PreparedShape, TokenRange

GRAPHS_ATTENTION = "triton"  # the others plan on the host at every step, which a captured graph would not repeat
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


class Dispatcher:
    """What is prepared, by the weights it was prepared for; asked once a step.

    Args:
        mode: value of the knob ``execution``.
    """

    def __init__(self, mode: str = "eager") -> None:
        self.mode = mode
        self._shapes: dict[str, list[PreparedShape]] = {}
        self._failed: dict[str, list[tuple[TokenRange, str]]] = {}

    def answer(self, num_tokens: int, *, pure_decode: bool, attention: str, weights: str) -> Answer:
        """What runs a step.

        Args:
            num_tokens: T.
            pure_decode: every sequence computes exactly one token.
            attention: the backend's name.
            weights: the weights in force, as :meth:`add` was told.
        """
        if self.mode == "eager":
            return Answer("eager", None, "asked for")
        if self.mode == "graphs" and attention != GRAPHS_ATTENTION:
            return Answer("eager", None, f"a graph needs attention {GRAPHS_ATTENTION}, not {attention}")
        reason = self._why_not(num_tokens, weights)
        if self.mode == "graphs" and not pure_decode:
            reason = "a graph holds pure decode batches only"
        for shape in self._shapes.get(weights, ()):
            if num_tokens in shape.tokens and (pure_decode or not shape.decode_only):
                asked = shape.mode == self.mode or self.mode == "auto"
                return Answer(shape.mode, shape, f"prepared for {shape.tokens} tokens" if asked else reason)
        return Answer("eager", None, reason)

    def _why_not(self, num_tokens: int, weights: str) -> str:
        for tokens, error in self._failed.get(weights, ()):
            if num_tokens in tokens:
                return error if self.mode == "auto" else f"preparing {tokens} tokens failed: {error}"
        if self._shapes and weights not in self._shapes:
            return "the weights were swapped; nothing is prepared for the new ones yet"
        return f"{num_tokens} tokens are not prepared"

    def add(self, weights: str, shape: PreparedShape) -> None:
        """A shape is ready for these weights. One that serves decode only is asked before one that serves any step."""
        shapes = self._shapes.setdefault(weights, [])
        shapes.append(shape)
        shapes.sort(key=lambda shape: not shape.decode_only)  # stable

    def fail(self, weights: str, tokens: TokenRange, error: str) -> None:
        """A shape cannot be had for these weights."""
        self._failed.setdefault(weights, []).append((tokens, error))

    def forget(self) -> None:
        """Drop everything: the mode or the weights have changed."""
        self._shapes, self._failed = {}, {}

    def prepared(self, weights: str) -> Sequence[TokenRange]:
        """Token counts that are ready in the mode asked for (auto: in any), ascending."""
        shapes = (shape for shape in self._shapes.get(weights, ()) if self.mode in ("auto", shape.mode))
        return sorted((shape.tokens for shape in shapes), key=lambda tokens: tokens.low)

    def direct(self, weights: str) -> str | None:
        """Mode of the shape that serves any step, if there is one."""
        return next((shape.mode for shape in self._shapes.get(weights, ()) if not shape.decode_only), None)

    def failed(self, weights: str) -> Sequence[tuple[TokenRange, str]]:
        """Token counts that failed, and why."""
        return tuple(self._failed.get(weights, ()))
