"""The published formula for the KV cache next to the right one, with every number substituted."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from math import ceil, prod

from engine.capacity.memory.kv import CacheLayout, attending_layers, blocks_for, kv_bytes_per_sequence, tokens_kept
from engine.capacity.memory.parallel import kv_heads_per_gpu
from engine.capacity.model.mixers import AnyMixer, Attention, LatentAttention
from engine.capacity.model.sharding import Shard
from engine.capacity.model.spec import ModelSpec


@dataclasses.dataclass(frozen=True, slots=True)
class Factor:
    """One factor of a formula.

    Attributes:
        symbol: as the formula writes it (LaTeX).
        value: the number put in its place.
        unit: of the value, "" if it is a count.
        meaning: what it is.
    """

    symbol: str
    value: float
    unit: str
    meaning: str


@dataclasses.dataclass(frozen=True, slots=True)
class KVFormula:
    """A formula for the KV cache of one sequence on one GPU: a sum of products.

    Attributes:
        title: which formula it is.
        products: each product's factors; the bytes are the sum of the products, rounded up.
        bytes: the result.
    """

    title: str
    products: tuple[tuple[Factor, ...], ...]
    bytes: int

    @property
    def factors(self) -> tuple[Factor, ...]:
        """Every factor once, in order of appearance."""
        return tuple(dict.fromkeys(factor for product in self.products for factor in product))


@dataclasses.dataclass(frozen=True, slots=True)
class KVComparison:
    """The formula as commonly published, the right one, and what the published one gets wrong for this model.

    ``errors`` are sentences, each naming one error and how far it is off; empty where the two agree.
    """

    published: KVFormula
    corrected: KVFormula
    errors: tuple[str, ...]

    @property
    def ratio(self) -> float:
        """Published over corrected."""
        return self.published.bytes / self.corrected.bytes if self.corrected.bytes else 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class _Sequence:
    """One sequence of ``context`` tokens of a model on ``tp`` GPUs."""

    spec: ModelSpec
    layout: CacheLayout
    context: int
    tp: int

    @property
    def block_tokens(self) -> int:
        """Tokens of the context, in whole blocks."""
        return self.tokens_in_blocks(self.context)

    def tokens_in_blocks(self, tokens: int) -> int:
        """The same of a part of them."""
        return blocks_for(tokens, self.layout.block_size) * self.layout.block_size


def compare_kv_formulas(spec: ModelSpec, layout: CacheLayout, context: int, tp: int = 1) -> KVComparison:
    """Published and corrected KV bytes of one sequence of ``context`` tokens, with every number substituted.

    >>> from engine.capacity.formats import FLOAT16
    >>> from engine.capacity.model.catalog import model_spec
    >>> both = compare_kv_formulas(model_spec("Llama-2-70b"), CacheLayout(FLOAT16.as_kv), 4096)
    >>> both.published.bytes, both.corrected.bytes, both.ratio  # the published example's 10.7 GB, and the truth
    (10737418240, 1342177280, 8.0)
    """
    sequence = _Sequence(spec, layout, context, tp)
    return KVComparison(_published(sequence), _corrected(sequence), tuple(_errors(sequence)))


def _published(sequence: _Sequence) -> KVFormula:
    spec, mixer = sequence.spec, sequence.spec.attention
    width = mixer.nope_dim + mixer.rope_dim if isinstance(mixer, LatentAttention) else spec.head_dim
    factors = (
        Factor("2", 2, "", "keys and values"),
        Factor("L", spec.num_layers, "", "layers"),
        Factor("n_{heads}", spec.num_heads, "", "attention heads"),
        Factor("d_{head}", width, "", "values per head"),
        Factor("s", sequence.context, "tokens", "tokens of context"),
        Factor("b", sequence.layout.precision.bits / 8, "B", "bytes per value"),
    )
    return KVFormula("As commonly published", (factors,), ceil(prod(factor.value for factor in factors)))


def _corrected(sequence: _Sequence) -> KVFormula:
    spec, layout = sequence.spec, sequence.layout
    total = kv_bytes_per_sequence(spec, layout, sequence.context, Shard(sequence.tp))
    merged: dict[tuple[int | None, AnyMixer], int] = {}
    index: dict[int, int] = {}
    for layer, count in attending_layers(spec):
        # Layers that differ in their MLP only are the same here.
        key = (layer.window if layout.frees_windows else None, dataclasses.replace(layer.mixer, window=None))  # type: ignore
        merged[key] = merged.get(key, 0) + count
        if layer.index_bytes:
            index[layer.index_bytes] = index.get(layer.index_bytes, 0) + count
    products = [_product(sequence, mixer, window, count) for (window, mixer), count in merged.items()]
    products += [_index_product(size, count, sequence.block_tokens) for size, count in index.items()]
    return KVFormula("As it is", tuple(products), total)


def _index_product(size: int, layers: int, tokens: int) -> tuple[Factor, ...]:
    """The index of sparse layers, by which they pick what they attend to."""
    return (
        Factor("L_{index}", layers, "", "layers with an index"),
        Factor(r"\hat{s}", tokens, "tokens", "tokens of context, in whole blocks"),
        Factor("b_{index}", size, "B", "bytes of the index a token"),
    )


def _product(sequence: _Sequence, mixer: AnyMixer, window: int | None, layers: int) -> tuple[Factor, ...]:
    slides, tp = window is not None, sequence.tp
    vectors, width = mixer.cached_heads(tp)
    tokens = sequence.tokens_in_blocks(tokens_kept(sequence.context, window))
    held = f"tokens of context, at most the window of {window:,}" if slides else "tokens of context"
    factors = [Factor("L_{window}" if slides else "L", layers, "", "sliding-window layers" if slides else "layers")]
    if isinstance(mixer, Attention):
        heads = "n_{kv}" if tp == 1 else r"\lceil n_{kv}/TP \rceil"
        label = "key/value heads" if tp == 1 else f"key/value heads on each of {tp} GPUs"
        factors.insert(0, Factor("2", 2, "", "keys and values"))
        factors += [Factor(heads, vectors // 2, "", label), Factor("d_{head}", width, "", "values per head")]
    else:
        factors.append(Factor("(r_{kv} + d_{rope})", width, "", "values of the latent that all heads share"))
    factors.append(Factor(r"\hat{s}_{window}" if slides else r"\hat{s}", tokens, "tokens", f"{held}, in whole blocks"))
    precision = sequence.layout.precision
    bytes_each = float(precision.bytes_per_head(width) / width)
    label = "bytes per value, scales included" if precision.head_overhead_bytes else "bytes per value"
    factors.append(Factor("b", bytes_each, "B", label))
    return tuple(factors)


def _errors(sequence: _Sequence) -> Iterator[str]:
    yield from _errors_of_layers(sequence.spec)
    spec, tp = sequence.spec, sequence.tp
    if tp > 1 and not spec.is_latent and spec.num_kv_heads:
        local = kv_heads_per_gpu(spec.num_kv_heads, tp)
        copies = " (replicated: there are more GPUs than key/value heads)" if tp > spec.num_kv_heads else ""
        yield f"It ignores that {tp} GPUs share the heads: each keeps {local:,}{copies}."
    yield from _errors_of_tokens(sequence)


def _errors_of_layers(spec: ModelSpec) -> Iterator[str]:
    without = spec.num_layers - spec.num_attention_layers
    if without:
        why = "their state has a constant size" if spec.is_recurrent else "they have none of their own"
        yield f"{without:,} of {spec.num_layers:,} layers keep no keys and values: {why}."
    if spec.is_latent:
        yield (
            f"Keys and values of all {spec.num_heads:,} heads are cached as one latent of {spec.head_dim:,} values, on "
            "every GPU."
        )
    elif spec.group_queries > 1:
        yield (
            f"It counts {spec.num_heads:,} attention heads, but groups of {spec.group_queries} share one key/value "
            f"head: only {spec.num_kv_heads:,} are cached. {spec.group_queries}× too much."
        )


def _errors_of_tokens(sequence: _Sequence) -> Iterator[str]:
    spec, layout, context = sequence.spec, sequence.layout, sequence.context
    window = spec.sliding_window
    if window is not None and context > window and layout.frees_windows:
        yield (
            f"{spec.num_sliding_layers:,} of {spec.num_layers:,} layers see only the last {window:,} tokens; it keeps "
            f"all {context:,}."
        )
    overhead = layout.precision.head_overhead_bytes
    if overhead:
        yield (
            f"It leaves out the scales of {layout.precision.name.upper()}: {overhead} B per head and token, for "
            "keys and values each."
        )
    if context % layout.block_size:
        yield (
            f"Memory comes in blocks of {layout.block_size} tokens: {context:,} tokens occupy "
            f"{sequence.block_tokens:,}."
        )
