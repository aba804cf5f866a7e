"""Bytes of the KV cache: per token, per block, per sequence; and the published formula beside the right one."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from math import ceil, prod

from engine.capacity.formats import kv_format
from engine.capacity.parallel import Stage, kv_heads_per_gpu, whole_model
from engine.capacity.spec import ModelSpec


def kv_bytes_per_token(spec: ModelSpec, kv_dtype: str = "auto", tp: int = 1, *, stage: Stage | None = None) -> int:
    """Bytes that one more token adds to one GPU's cache while no window is full.

    2 (keys and values) · layers · ceil(KV heads / TP) · bytes of a head (scales included).

    Args:
        spec: the model.
        kv_dtype: see :func:`engine.capacity.formats.kv_format`.
        tp: tensor-parallel GPUs.
        stage: the GPU's part of a pipeline; by default the whole model.

    >>> from engine.capacity.catalog import model_spec
    >>> kv_bytes_per_token(model_spec("Llama-3.1-8B"), "bf16")  # 128 KiB
    131072
    >>> kv_bytes_per_token(model_spec("Llama-2-7b"), "fp16")  # multi-head attention: 512 KiB
    524288
    """
    return ceil(_exact_bytes_per_token(spec, kv_dtype, tp, stage))


def kv_bytes_per_block(
    spec: ModelSpec, block_size: int, kv_dtype: str = "auto", tp: int = 1, *, stage: Stage | None = None
) -> int:
    """Bytes of one block of ``block_size`` tokens over all layers of one GPU.

    >>> from engine.capacity.catalog import model_spec
    >>> kv_bytes_per_block(model_spec("Llama-3.1-8B"), 16, "bf16")
    2097152
    """
    return ceil(block_size * _exact_bytes_per_token(spec, kv_dtype, tp, stage))


def kv_bytes_per_sequence(
    spec: ModelSpec,
    context: int,
    block_size: int,
    kv_dtype: str = "auto",
    tp: int = 1,
    *,
    stage: Stage | None = None,
    frees_windows: bool = True,
) -> int:
    """Bytes that one sequence of ``context`` tokens holds on one GPU, in whole blocks.

    Args:
        context: prompt and output together, tokens.
        frees_windows: the engine gives back blocks that have slid out of a layer's window.

    The other arguments are those of :func:`kv_bytes_per_block`.

    >>> from engine.capacity.catalog import model_spec
    >>> kv_bytes_per_sequence(model_spec("Llama-2-70b"), 4096, 16, "fp16")  # 1.34 GB, not the published 10.7
    1342177280
    >>> mistral = model_spec("Mistral-7B-v0.1")  # every layer slides over 4,096 tokens
    >>> kv_bytes_per_sequence(mistral, 32768, 16) == kv_bytes_per_sequence(mistral, 4096, 16)
    True
    """
    per_layer = _exact_bytes_per_layer(spec, kv_dtype, tp)
    groups = _layer_groups(spec, stage or whole_model(spec), frees_windows)
    blocks = sum(layers * blocks_for(_kept(context, window), block_size) for window, layers in groups)
    return ceil(blocks * block_size * per_layer)


def blocks_for(tokens: int, block_size: int) -> int:
    """Whole blocks that hold ``tokens``."""
    return -(-tokens // block_size)


def _kept(context: int, window: int | None) -> int:
    return context if window is None else min(context, window)


def _exact_bytes_per_layer(spec: ModelSpec, kv_dtype: str, tp: int) -> Fraction:
    head = kv_format(kv_dtype, spec.torch_dtype).bytes_per_head(spec.head_dim)
    return 2 * kv_heads_per_gpu(spec.num_kv_heads, tp) * head


def _exact_bytes_per_token(spec: ModelSpec, kv_dtype: str, tp: int, stage: Stage | None) -> Fraction:
    return (stage or whole_model(spec)).num_layers * _exact_bytes_per_layer(spec, kv_dtype, tp)


def _layer_groups(spec: ModelSpec, stage: Stage, frees_windows: bool) -> list[tuple[int | None, int]]:
    """(window, number of layers) of the stage, full attention first."""
    windows = spec.layer_windows[stage.start : stage.stop] if frees_windows else (None,) * stage.num_layers
    kinds = sorted(set(windows), key=lambda window: (window is not None, window or 0))
    return [(kind, windows.count(kind)) for kind in kinds]


@dataclasses.dataclass(frozen=True, slots=True)
class Factor:
    """One factor of a formula.

    Attributes:
        symbol: as the formula writes it (LaTeX).
        value: the number put in its place.
        unit: of the value, "" if it is a count.
        meaning: what it is, in words.
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
    """The formula as commonly published, the right one, and what the former gets wrong for this model.

    ``errors`` are sentences, each naming one error and how far it is off; empty where the two agree.
    """

    published: KVFormula
    corrected: KVFormula
    errors: tuple[str, ...]

    @property
    def ratio(self) -> float:
        """Published over corrected."""
        return self.published.bytes / self.corrected.bytes


def compare_kv_formulas(
    spec: ModelSpec,
    context: int,
    block_size: int,
    kv_dtype: str = "auto",
    tp: int = 1,
    *,
    frees_windows: bool = True,
) -> KVComparison:
    """Published and corrected KV bytes of one sequence of ``context`` tokens, with every number substituted.

    >>> from engine.capacity.catalog import model_spec
    >>> both = compare_kv_formulas(model_spec("Llama-2-70b"), 4096, 16, "fp16")
    >>> both.published.bytes, both.corrected.bytes, both.ratio  # the published example's 10.7 GB, and the truth
    (10737418240, 1342177280, 8.0)
    """
    published = _published(spec, context, kv_dtype)
    corrected = _corrected(spec, context, block_size, kv_dtype, tp, frees_windows)
    errors = _errors(spec, context, block_size, kv_dtype, tp, frees_windows)
    return KVComparison(published, corrected, tuple(errors))


def _published(spec: ModelSpec, context: int, kv_dtype: str) -> KVFormula:
    size = kv_format(kv_dtype, spec.torch_dtype).bits / 8
    factors = (
        Factor("2", 2, "", "keys and values"),
        Factor("L", spec.num_layers, "", "layers"),
        Factor("n_{heads}", spec.num_heads, "", "attention heads"),
        Factor("d_{head}", spec.head_dim, "", "values per head"),
        Factor("s", context, "tokens", "tokens of context"),
        Factor("b", size, "B", "bytes per value"),
    )
    return KVFormula("As commonly published", (factors,), ceil(prod(factor.value for factor in factors)))


def _corrected(
    spec: ModelSpec, context: int, block_size: int, kv_dtype: str, tp: int, frees_windows: bool
) -> KVFormula:
    form = kv_format(kv_dtype, spec.torch_dtype)
    head = form.bytes_per_head(spec.head_dim)
    local = kv_heads_per_gpu(spec.num_kv_heads, tp)
    heads = "n_{kv}" if tp == 1 else r"\lceil n_{kv}/TP \rceil"
    words = "key/value heads" if tp == 1 else f"key/value heads on each of {tp} GPUs"
    products = []
    for window, layers in _layer_groups(spec, whole_model(spec), frees_windows):
        slides = window is not None
        tokens = blocks_for(_kept(context, window), block_size) * block_size
        held = f"tokens of context, at most the window of {window:,}" if slides else "tokens of context"
        factors = [
            Factor("2", 2, "", "keys and values"),
            Factor("L_{window}" if slides else "L", layers, "", "sliding-window layers" if slides else "layers"),
            Factor(heads, local, "", words),
            Factor("d_{head}", spec.head_dim, "", "values per head"),
            Factor(r"\hat{s}_{window}" if slides else r"\hat{s}", tokens, "tokens", f"{held}, in whole blocks"),
            Factor("b", float(head / spec.head_dim), "B", _value_words(form.head_overhead_bytes)),
        ]
        products.append(tuple(factors))
    total = kv_bytes_per_sequence(spec, context, block_size, kv_dtype, tp, frees_windows=frees_windows)
    return KVFormula("As it is", tuple(products), total)


def _value_words(overhead: int) -> str:
    return "bytes per value, scales included" if overhead else "bytes per value"


def _errors(spec: ModelSpec, context: int, block_size: int, kv_dtype: str, tp: int, frees_windows: bool) -> list[str]:
    form = kv_format(kv_dtype, spec.torch_dtype)
    errors = []
    if spec.group_queries > 1:
        errors.append(
            f"It counts {spec.num_heads:,} attention heads, but groups of {spec.group_queries} share one key/value "
            f"head: only {spec.num_kv_heads:,} are cached. {spec.group_queries}× too much."
        )
    if tp > 1:
        local = kv_heads_per_gpu(spec.num_kv_heads, tp)
        copies = " (replicated: there are more GPUs than key/value heads)" if tp > spec.num_kv_heads else ""
        errors.append(f"It ignores that {tp} GPUs share the heads: each keeps {local:,}{copies}.")
    window = spec.sliding_window
    if window is not None and context > window and frees_windows:
        errors.append(
            f"{spec.num_sliding_layers:,} of {spec.num_layers:,} layers see only the last {window:,} tokens; it keeps "
            f"all {context:,}."
        )
    if form.head_overhead_bytes:
        errors.append(
            f"It leaves out the scales of {form.name.upper()}: {form.head_overhead_bytes} B per head and token, for "
            "keys and values each."
        )
    if context % block_size:
        rounded = blocks_for(context, block_size) * block_size
        errors.append(f"Memory comes in blocks of {block_size} tokens: {context:,} tokens occupy {rounded:,}.")
    return errors
