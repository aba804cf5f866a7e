"""Bytes of the KV cache: per token, per block, per sequence; and the published formula beside the right one."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from math import ceil, prod

from engine.capacity.memory.formats import DTYPE_BYTES, KVFormat, dtype_name, kv_format
from engine.capacity.memory.parallel import Stage, kv_heads_per_gpu, whole_model
from engine.capacity.model.layers import AnyMixer, Attention, LatentAttention, Layer
from engine.capacity.model.spec import ModelSpec

#: Recurrent states are kept in float32 (``mamba_ssm_cache_dtype`` of the published configurations).
_STATE_BYTES = 4


def kv_bytes_per_token(spec: ModelSpec, kv_dtype: str = "auto", tp: int = 1, *, stage: Stage | None = None) -> int:
    """Bytes that one more token adds to one GPU's cache while no window is full.

    Over the layers with attention: 2 (keys and values) · ceil(KV heads / TP) · bytes of a head (scales included); with
    latent attention one vector of kv_rank + rope_dim, which tensor parallelism does not divide.

    Args:
        spec: the model.
        kv_dtype: see :func:`engine.capacity.memory.formats.kv_format`.
        tp: tensor-parallel GPUs.
        stage: the GPU's part of a pipeline; by default the whole model.

    >>> from engine.capacity.model.catalog import model_spec
    >>> kv_bytes_per_token(model_spec("Llama-3.1-8B"), "bf16")  # 128 KiB
    131072
    >>> kv_bytes_per_token(model_spec("Llama-2-7b"), "fp16")  # multi-head attention: 512 KiB
    524288
    >>> kv_bytes_per_token(model_spec("DeepSeek-V3"), "bf16", tp=8)  # 61 · (512 + 64) · 2
    70272
    """
    return ceil(_exact_bytes_per_token(spec, kv_dtype, tp, stage))


def kv_bytes_per_block(
    spec: ModelSpec,
    block_size: int,
    kv_dtype: str = "auto",
    tp: int = 1,
    *,
    stage: Stage | None = None,
    grouped: bool = False,
) -> int:
    """Bytes of one block of ``block_size`` tokens over all layers of one GPU.

    Args:
        grouped: layers with and without a window are allocated in equal groups, see :func:`grouped_layers`.

    The other arguments are those of :func:`kv_bytes_per_token`.

    >>> from engine.capacity.model.catalog import model_spec
    >>> kv_bytes_per_block(model_spec("Llama-3.1-8B"), 16, "bf16")
    2097152
    """
    return ceil(block_size * _exact_bytes_per_token(spec, kv_dtype, tp, stage, grouped))


def kv_bytes_per_sequence(
    spec: ModelSpec,
    context: int,
    block_size: int,
    kv_dtype: str = "auto",
    tp: int = 1,
    *,
    stage: Stage | None = None,
    frees_windows: bool = True,
    grouped: bool = False,
) -> int:
    """Bytes that one sequence of ``context`` tokens holds on one GPU, in whole blocks.

    Args:
        context: prompt and output together, tokens.
        frees_windows: the engine gives back blocks that have slid out of a layer's window.

    The other arguments are those of :func:`kv_bytes_per_block`.

    >>> from engine.capacity.model.catalog import model_spec
    >>> kv_bytes_per_sequence(model_spec("Llama-2-70b"), 4096, 16, "fp16")  # 1.34 GB, not the published 10.7
    1342177280
    >>> mistral = model_spec("Mistral-7B-v0.1")  # every layer slides over 4,096 tokens
    >>> kv_bytes_per_sequence(mistral, 32768, 16) == kv_bytes_per_sequence(mistral, 4096, 16)
    True
    """
    total = Fraction(0)
    for layer, count in _attending(spec, stage or whole_model(spec), grouped):
        kept = _kept(context, layer.window if frees_windows else None)
        total += count * blocks_for(kept, block_size) * block_size * _layer_bytes(spec, layer, kv_dtype, tp)
        total += count * blocks_for(context, block_size) * block_size * layer.index_bytes
    return ceil(total)


def state_bytes_per_sequence(spec: ModelSpec, dtype: str, tp: int = 1, *, stage: Stage | None = None) -> int:
    """Bytes of constant state that one sequence holds on one GPU, whatever its length: recurrent state in float32, the
    convolutions' windows in ``dtype``. 0 for a model of attention alone.

    >>> from engine.capacity.model.catalog import model_spec
    >>> spec = model_spec("Nemotron-H-8B")
    >>> state_bytes_per_sequence(spec, "bfloat16")  # 24 layers · (1,048,576 · 4 B + 30,720 · 2 B)
    102137856
    """
    held = stage or whole_model(spec)
    small = DTYPE_BYTES[dtype_name(dtype)]
    total = 0
    for layer, count in spec.layer_counts(held.start, held.stop):
        recurrent, window = layer.mixer.state_elements(tp)
        total += count * (recurrent * _STATE_BYTES + window * small)
    return total


def blocks_for(tokens: int, block_size: int) -> int:
    """Whole blocks that hold ``tokens``."""
    return -(-tokens // block_size)


def _kept(context: int, window: int | None) -> int:
    return context if window is None else min(context, window)


def _attending(spec: ModelSpec, stage: Stage, grouped: bool = False) -> list[tuple[Layer, int]]:
    """(layer, how many of it are allocated) of those that keep keys and values, full attention first."""
    layers = [(layer, count) for layer, count in spec.layer_counts(stage.start, stage.stop) if layer.attends]
    layers.sort(key=lambda item: (item[0].window is not None, item[0].window or 0))
    if not grouped:
        return layers
    by_window: dict[int | None, int] = {}
    for layer, count in layers:
        by_window[layer.window] = by_window.get(layer.window, 0) + count
    padded = grouped_layers(tuple(by_window.values()))
    extra = {window: more - count for (window, count), more in zip(by_window.items(), padded, strict=True)}
    return [(layer, count + extra.pop(layer.window, 0)) for layer, count in layers]


def grouped_layers(counts: tuple[int, ...]) -> tuple[int, ...]:
    """Layers of each kind (full attention, each window) as vLLM's hybrid cache manager allocates them.

    Groups of one size share a pool of blocks: the size is the smallest count, or the largest where that is less than a
    quarter above it; each kind is filled up to whole groups.

    >>> grouped_layers((10, 52))  # Gemma-3-27b: 52 sliding layers take six groups of 10
    (10, 60)
    >>> grouped_layers((12, 12)), grouped_layers((32,))  # gpt-oss-20b; a model of one kind
    ((12, 12), (32,))
    """
    if len(counts) < 2:
        return counts
    size = max(counts) if max(counts) < 1.25 * min(counts) else min(counts)
    return tuple(-(-count // size) * size for count in counts)


def _layer_bytes(spec: ModelSpec, layer: Layer, kv_dtype: str, tp: int) -> Fraction:
    vectors, width = layer.mixer.cached_heads(tp)
    return vectors * kv_format(kv_dtype, spec.torch_dtype).bytes_per_head(width)


def _exact_bytes_per_token(
    spec: ModelSpec, kv_dtype: str, tp: int, stage: Stage | None, grouped: bool = False
) -> Fraction:
    layers = _attending(spec, stage or whole_model(spec), grouped)
    sizes = (count * (_layer_bytes(spec, layer, kv_dtype, tp) + layer.index_bytes) for layer, count in layers)
    return sum(sizes, Fraction(0))


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
    """The formula as commonly published, the right one, and what the previous gets wrong for this model.

    ``errors`` are sentences, each naming one error and how far it is off; empty where the two agree.
    """

    published: KVFormula
    corrected: KVFormula
    errors: tuple[str, ...]

    @property
    def ratio(self) -> float:
        """Published over corrected."""
        return self.published.bytes / self.corrected.bytes if self.corrected.bytes else 1.0


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

    >>> from engine.capacity.model.catalog import model_spec
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
    mixer = spec.attention
    width = mixer.nope_dim + mixer.rope_dim if isinstance(mixer, LatentAttention) else spec.head_dim
    factors = (
        Factor("2", 2, "", "keys and values"),
        Factor("L", spec.num_layers, "", "layers"),
        Factor("n_{heads}", spec.num_heads, "", "attention heads"),
        Factor("d_{head}", width, "", "values per head"),
        Factor("s", context, "tokens", "tokens of context"),
        Factor("b", size, "B", "bytes per value"),
    )
    return KVFormula("As commonly published", (factors,), ceil(prod(factor.value for factor in factors)))


def _corrected(
    spec: ModelSpec, context: int, block_size: int, kv_dtype: str, tp: int, frees_windows: bool
) -> KVFormula:
    total = kv_bytes_per_sequence(spec, context, block_size, kv_dtype, tp, frees_windows=frees_windows)
    merged: dict[tuple[int | None, AnyMixer], int] = {}
    for layer, count in _attending(spec, whole_model(spec)):
        # Layers that differ in their MLP only are the same here.
        key = (layer.window if frees_windows else None, dataclasses.replace(layer.mixer, window=None))  # type: ignore
        merged[key] = merged.get(key, 0) + count
    products = tuple(
        _product(mixer, window, count, context, block_size, kv_format(kv_dtype, spec.torch_dtype), tp)
        for (window, mixer), count in merged.items()
    )
    index: dict[int, int] = {}
    for layer, count in _attending(spec, whole_model(spec)):
        if layer.index_bytes:
            index[layer.index_bytes] = index.get(layer.index_bytes, 0) + count
    tokens = blocks_for(context, block_size) * block_size
    products += tuple(_index_product(size, count, tokens) for size, count in index.items())
    return KVFormula("As it is", products, total)


def _index_product(size: int, layers: int, tokens: int) -> tuple[Factor, ...]:
    """The index of sparse layers, by which they pick what they attend to."""
    return (
        Factor("L_{index}", layers, "", "layers with an index"),
        Factor(r"\hat{s}", tokens, "tokens", "tokens of context, in whole blocks"),
        Factor("b_{index}", size, "B", "bytes of the index a token"),
    )


def _product(
    mixer: AnyMixer, window: int | None, layers: int, context: int, block_size: int, form: KVFormat, tp: int
) -> tuple[Factor, ...]:
    slides = window is not None
    vectors, width = mixer.cached_heads(tp)
    tokens = blocks_for(_kept(context, window), block_size) * block_size
    held = f"tokens of context, at most the window of {window:,}" if slides else "tokens of context"
    factors = [Factor("L_{window}" if slides else "L", layers, "", "sliding-window layers" if slides else "layers")]
    if isinstance(mixer, Attention):
        heads = "n_{kv}" if tp == 1 else r"\lceil n_{kv}/TP \rceil"
        words = "key/value heads" if tp == 1 else f"key/value heads on each of {tp} GPUs"
        factors.insert(0, Factor("2", 2, "", "keys and values"))
        factors += [Factor(heads, vectors // 2, "", words), Factor("d_{head}", width, "", "values per head")]
    else:
        factors.append(Factor("(r_{kv} + d_{rope})", width, "", "values of the latent that all heads share"))
    factors.append(Factor(r"\hat{s}_{window}" if slides else r"\hat{s}", tokens, "tokens", f"{held}, in whole blocks"))
    bytes_each = float(form.bytes_per_head(width) / width)
    factors.append(Factor("b", bytes_each, "B", _value_words(form.head_overhead_bytes)))
    return tuple(factors)


def _value_words(overhead: int) -> str:
    return "bytes per value, scales included" if overhead else "bytes per value"


def _errors(spec: ModelSpec, context: int, block_size: int, kv_dtype: str, tp: int, frees_windows: bool) -> list[str]:
    form = kv_format(kv_dtype, spec.torch_dtype)
    errors = []
    without = spec.num_layers - spec.num_attention_layers
    if without:
        why = "their state has a constant size" if spec.is_recurrent else "they have none of their own"
        errors.append(f"{without:,} of {spec.num_layers:,} layers keep no keys and values: {why}.")
    if spec.is_latent:
        errors.append(
            f"Keys and values of all {spec.num_heads:,} heads are cached as one latent of {spec.head_dim:,} values, on "
            "every GPU."
        )
    elif spec.group_queries > 1:
        errors.append(
            f"It counts {spec.num_heads:,} attention heads, but groups of {spec.group_queries} share one key/value "
            f"head: only {spec.num_kv_heads:,} are cached. {spec.group_queries}× too much."
        )
    if tp > 1 and not spec.is_latent and spec.num_kv_heads:
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
