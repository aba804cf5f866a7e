"""Choosing the next token of every row on the device: penalties, temperature, top-k, top-p, min-p, and the draw.

A row is sampled by one program in passes over its logits; nothing is sorted. Logits are looked at through their *keys*,
whole numbers in the order of the floats. A threshold (the k-th largest logit, the logit at which the probability
reaches top-p, the logit on which the draw falls) is the largest key t with ``measure(key ≥ t) ≥ target``, the measure
being a count or a mass. Four bits of t are found in a pass, by 16 thresholds at once: eight passes find it exactly.

    passes over the vocabulary       greedy 2 · plain or min-p 4 · top-k or top-p 23 · both 32

The candidates of a row are those of the host's sampler in the same order (descending, equals by their token id;
vocabulary order where neither top-k nor top-p is asked for), and the draw is the same number, so the token is the same,
except where a sum's rounding decides. Sums of a block are float32 trees, sums of blocks float64, in a fixed order: a
row's token does not depend on the others.
"""

# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"
# (the parameters of a Triton kernel are pointers and scalars of the launch: there is no Python type to write)

import dataclasses

import torch

from kernels.language import tl, triton
from kernels.philox import draw_uniform, uniform_reference
from kernels.variant import TYPE_NAMES, Variant, pointers

_BLOCK = 1024


@dataclasses.dataclass(frozen=True, slots=True)
class SamplingTensors:
    """What is asked of each of R rows, on the device of the logits.

    Attributes:
        temperature: float32 [R]; 0 is greedy.
        top_k: int32 [R]; 0 keeps all.
        top_p: float32 [R]; 1 keeps all.
        min_p: float32 [R]; 0 keeps all.
        seeds: int64 [R], the bits of the unsigned seed.
        positions: int64 [R], number of the output token.
        penalty: float32 [R] repetition penalties, or None where nobody has any.
        seen: uint8 [R, V], 1 for tokens of prompt and output so far; with ``penalty``.
        forbidden: uint8 [R, V], 1 for tokens that must not be chosen, or None.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    seeds: torch.Tensor
    positions: torch.Tensor
    penalty: torch.Tensor | None = None
    seen: torch.Tensor | None = None
    forbidden: torch.Tensor | None = None


def sample_reference(logits: torch.Tensor, asked: SamplingTensors) -> torch.Tensor:
    """One token a row by sorting, in float64.

    Penalty (Keskar et al. 2019), then temperature, top-k, top-p on what top-k left, min-p (Nguyen et al. 2024), then
    the inverse of the cumulative distribution at :func:`kernels.philox.uniform`.

    Args:
        logits: [R, V], any float type.
        asked: of R rows.

    Returns:
        int64 [R].
    """
    scaled = adjusted_reference(logits, asked)
    tokens = scaled.argmax(dim=-1)
    draws = uniform_reference(asked.seeds, asked.positions)
    for row in (asked.temperature > 0).nonzero()[:, 0].tolist():
        top_k, top_p = int(asked.top_k[row]), float(asked.top_p[row])
        filtered = top_k > 0 or top_p < 1.0
        order = torch.arange(logits.shape[1], device=logits.device)
        values = scaled[row]
        if filtered:
            values, order = values.sort(descending=True, stable=True)
            if top_k > 0:
                values, order = values[:top_k], order[:top_k]
        probabilities = values.double().softmax(dim=-1)
        if top_p < 1.0:
            before = probabilities.cumsum(dim=-1) - probabilities
            probabilities = probabilities.masked_fill(before >= top_p, 0.0)
        keep = probabilities >= float(asked.min_p[row]) * probabilities.max()
        cumulative = (probabilities * keep).cumsum(dim=-1)
        place = torch.searchsorted(cumulative, draws[row].to(cumulative.device) * cumulative[-1], right=True)
        tokens[row] = order[place.clamp(max=len(order) - 1)]
    return tokens


def adjusted_reference(logits: torch.Tensor, asked: SamplingTensors) -> torch.Tensor:
    """Logits after penalty and temperature, float32 [R, V]; a greedy row's are not divided."""
    adjusted = logits.float()
    if asked.penalty is not None and asked.seen is not None:
        factor = asked.penalty[:, None]
        punished = torch.where(adjusted > 0, adjusted / factor, adjusted * factor)
        adjusted = torch.where(asked.seen.bool(), punished, adjusted)
    if asked.forbidden is not None:
        adjusted = adjusted.masked_fill(asked.forbidden.bool(), -torch.inf)
    return adjusted / torch.where(asked.temperature > 0, asked.temperature, 1.0)[:, None]


def sample_triton(logits: torch.Tensor, asked: SamplingTensors) -> torch.Tensor:
    """As :func:`sample_reference`, in two launches and without a value read back.

    Raises:
        ValueError: naming the argument whose shape does not fit.
    """
    num_rows, vocab = logits.shape
    _check(logits, asked)
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if not num_rows:
        return tokens
    scaled = torch.empty((num_rows, vocab), dtype=torch.float32, device=logits.device)
    _adjust_kernel[(num_rows, triton.cdiv(vocab, _BLOCK))](
        scaled,
        logits,
        asked.temperature,
        asked.temperature if asked.penalty is None else asked.penalty,
        logits if asked.seen is None else asked.seen,
        logits if asked.forbidden is None else asked.forbidden,
        vocab,
        logits.stride(0),
        HAS_PENALTY=asked.penalty is not None,
        HAS_FORBIDDEN=asked.forbidden is not None,
        BLOCK=_BLOCK,
        num_warps=4,
    )
    _sample_kernel[(num_rows,)](
        tokens,
        scaled,
        asked.temperature,
        asked.top_k,
        asked.top_p,
        asked.min_p,
        asked.seeds,
        asked.positions,
        vocab,
        BLOCK=_BLOCK,
        num_warps=8,
    )
    return tokens


def _check(logits: torch.Tensor, asked: SamplingTensors) -> None:
    num_rows, vocab = logits.shape
    if logits.stride(1) != 1:
        raise ValueError("logits must be contiguous in their last dimension")
    for name in ("temperature", "top_k", "top_p", "min_p", "seeds", "positions", "penalty"):
        tensor = getattr(asked, name)
        if tensor is not None and (tensor.shape != (num_rows,) or not tensor.is_contiguous()):
            raise ValueError(f"{name} must be contiguous [{num_rows}], not {list(tensor.shape)}")
    if (asked.penalty is None) != (asked.seen is None):
        raise ValueError("penalty and seen go together")
    for name in ("seen", "forbidden"):
        tensor = getattr(asked, name)
        if tensor is not None and (tensor.shape != (num_rows, vocab) or not tensor.is_contiguous()):
            raise ValueError(f"{name} must be contiguous [{num_rows}, {vocab}], not {list(tensor.shape)}")


# -- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _adjust_kernel(
    scaled_ptr,  # float32 [R, vocab]
    logits_ptr,
    temperature_ptr,
    penalty_ptr,
    seen_ptr,
    forbidden_ptr,
    vocab,
    logits_stride,
    HAS_PENALTY: tl.constexpr,
    HAS_FORBIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocab
    value = tl.load(logits_ptr + row * logits_stride + token, mask=inside, other=0.0).to(tl.float32)
    if HAS_PENALTY:
        penalty = tl.load(penalty_ptr + row)
        seen = tl.load(seen_ptr + row * vocab + token, mask=inside, other=0) != 0
        value = tl.where(seen, tl.where(value > 0, value / penalty, value * penalty), value)
    if HAS_FORBIDDEN:
        value = tl.where(tl.load(forbidden_ptr + row * vocab + token, mask=inside, other=0) != 0, float("-inf"), value)
    temperature = tl.load(temperature_ptr + row)
    value = value / tl.where(temperature > 0, temperature, 1.0)
    tl.store(scaled_ptr + row * vocab + token, value, mask=inside)


@triton.jit
def ordered_key(value):
    """uint32 in the order of the floats."""
    bits = value.to(tl.int32, bitcast=True)
    flipped = tl.where(bits < 0, ~bits, bits | -2147483648)
    return flipped.to(tl.uint32, bitcast=True)


@triton.jit
def key_value(key):
    """The float32 of a key."""
    bits = key.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits & 2147483647, ~bits).to(tl.float32, bitcast=True)


@triton.jit
def _largest(row_ptr, vocab, BLOCK: tl.constexpr):
    """(largest value, the first token that has it)."""
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    place = tl.full([BLOCK], 2147483647, tl.int32)
    for start in range(0, vocab, BLOCK):
        token = start + tl.arange(0, BLOCK)
        value = tl.load(row_ptr + token, mask=token < vocab, other=float("-inf"))
        better = (value > best) | ((place == 2147483647) & (token < vocab))
        best = tl.where(better, value, best)
        place = tl.where(better, token, place)
    largest = tl.max(best, axis=0)
    return largest, tl.min(tl.where(best == largest, place, 2147483647), axis=0)


@triton.jit
def _measures(
    row_ptr,
    vocab,
    largest,
    thresholds,  # uint32 [16], ascending
    cut,  # uint32: only keys above it count …
    at_cut,  # float64: … and this much at it
    least,  # weights below it do not count
    COUNT: tl.constexpr,  # else masses exp(value - largest)
    BLOCK: tl.constexpr,
):
    """float64 [16]: measure of the candidates whose key is at least each threshold."""
    sums = tl.zeros([16], tl.float64)
    for start in range(0, vocab, BLOCK):
        token = start + tl.arange(0, BLOCK)
        inside = token < vocab
        value = tl.load(row_ptr + token, mask=inside, other=float("-inf"))
        weight = tl.exp(value - largest)
        key = ordered_key(value)
        counts = inside & (key > cut) & (weight >= least)
        part = tl.where(counts, 1.0, 0.0) if COUNT else tl.where(counts, weight, 0.0)
        above = key[:, None] >= thresholds[None, :]
        sums += tl.sum(tl.where(above, part[:, None], 0.0), axis=0).to(tl.float64)
    return sums + tl.where(thresholds <= cut, at_cut, 0.0)


@triton.jit
def _search(
    row_ptr,
    vocab,
    largest,
    cut,
    at_cut,
    least,
    target,
    STRICT: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(largest key t with measure(key ≥ t) ≥ target (STRICT: >), measure(key > t)). It must hold for t = 0."""
    step = tl.arange(0, 16).to(tl.uint32)
    found = tl.full([], 0, tl.uint32)
    width = tl.full([], 1 << 28, tl.uint32)
    for _ in range(8):
        thresholds = found + step * width
        sums = _measures(row_ptr, vocab, largest, thresholds, cut, at_cut, least, COUNT, BLOCK)
        holds = sums > target if STRICT else sums >= target
        most = tl.max(tl.where(holds, step.to(tl.int32), 0), axis=0)
        found += most.to(tl.uint32) * width
        width = width >> 4
    behind = tl.full([16], 0, tl.uint32) + found + 1
    above = tl.max(_measures(row_ptr, vocab, largest, behind, cut, at_cut, least, COUNT, BLOCK), axis=0)
    return found, above


@triton.jit
def _total(row_ptr, vocab, largest, cut, at_cut, least, BLOCK: tl.constexpr):
    """Mass of all candidates."""
    zeros = tl.full([16], 0, tl.uint32)
    return tl.max(_measures(row_ptr, vocab, largest, zeros, cut, at_cut, least, False, BLOCK), axis=0)


@triton.jit
def _nth_with_key(row_ptr, vocab, key, number, BLOCK: tl.constexpr):
    """The token that is the ``number``-th (from 0) of those with a key; the last of them if there are fewer."""
    before = 0
    found = 2147483647
    last = 0
    for start in range(0, vocab, BLOCK):
        token = start + tl.arange(0, BLOCK)
        value = tl.load(row_ptr + token, mask=token < vocab, other=float("-inf"))
        equal = (ordered_key(value) == key) & (token < vocab)
        rank = before + tl.cumsum(equal.to(tl.int32), axis=0) - 1
        found = tl.minimum(found, tl.min(tl.where(equal & (rank == number), token, 2147483647), axis=0))
        last = tl.maximum(last, tl.max(tl.where(equal, token, 0), axis=0))
        before += tl.sum(equal.to(tl.int32), axis=0)
    return tl.where(found == 2147483647, last, found)


@triton.jit
def _first_beyond(row_ptr, vocab, largest, least, target, BLOCK: tl.constexpr):
    """The first token, in the order of the vocabulary, at which the mass exceeds ``target``."""
    before = tl.full([], 0.0, tl.float64)
    found = 2147483647
    last = 0
    for start in range(0, vocab, BLOCK):
        token = start + tl.arange(0, BLOCK)
        value = tl.load(row_ptr + token, mask=token < vocab, other=float("-inf"))
        weight = tl.exp(value - largest)
        counts = (token < vocab) & (weight >= least) & (weight > 0)
        weight = tl.where(counts, weight, 0.0)
        reached = counts & (before + tl.cumsum(weight, axis=0).to(tl.float64) > target)
        found = tl.minimum(found, tl.min(tl.where(reached, token, 2147483647), axis=0))
        last = tl.maximum(last, tl.max(tl.where(counts, token, 0), axis=0))
        before += tl.sum(weight, axis=0).to(tl.float64)
    return tl.where(found == 2147483647, last, found)


@triton.jit
def _filtered_draw(row_ptr, vocab, largest, top_k, top_p, min_p, draw, BLOCK: tl.constexpr):
    """The token of a row with top-k or top-p."""
    cut = tl.full([], 0, tl.uint32)  # below every key
    at_cut = tl.full([], 0.0, tl.float64)
    if (top_k > 0) & (top_k < vocab):
        target = top_k.to(tl.float64)
        cut, above = _search(row_ptr, vocab, largest, cut, at_cut, 0.0, target, False, True, BLOCK)
        at_cut = (target - above) * tl.exp(key_value(cut) - largest).to(tl.float64)  # of equals the first ones
    if top_p < 1.0:
        target = top_p.to(tl.float64) * _total(row_ptr, vocab, largest, cut, at_cut, 0.0, BLOCK)
        level, above = _search(row_ptr, vocab, largest, cut, at_cut, 0.0, target, False, False, BLOCK)
        weight = tl.exp(key_value(level) - largest).to(tl.float64)
        kept = tl.ceil((target - above) / weight) * weight  # of equals as many as are needed to reach it
        at_cut = tl.where(level == cut, tl.minimum(kept, at_cut), kept)
        cut = level
    at_cut = tl.where(tl.exp(key_value(cut) - largest) >= min_p, at_cut, 0.0)
    target = draw * _total(row_ptr, vocab, largest, cut, at_cut, min_p, BLOCK)
    level, above = _search(row_ptr, vocab, largest, cut, at_cut, min_p, target, True, False, BLOCK)
    number = tl.floor((target - above) / tl.exp(key_value(level) - largest).to(tl.float64))
    return _nth_with_key(row_ptr, vocab, level, number.to(tl.int32), BLOCK)


@triton.jit
def _sample_kernel(
    tokens_ptr,  # int64 [R]
    scaled_ptr,  # float32 [R, vocab]
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seeds_ptr,
    positions_ptr,
    vocab,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    row_ptr = scaled_ptr + row.to(tl.int64) * vocab
    largest, token = _largest(row_ptr, vocab, BLOCK)
    if (tl.load(temperature_ptr + row) > 0) & (largest > float("-inf")):
        draw = draw_uniform(tl.load(seeds_ptr + row), tl.load(positions_ptr + row), 0)
        top_k, top_p, min_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)
        if (top_k > 0) | (top_p < 1.0):
            token = _filtered_draw(row_ptr, vocab, largest, top_k, top_p, min_p, draw, BLOCK)
        else:
            cut, at_cut = tl.full([], 0, tl.uint32), tl.full([], 0.0, tl.float64)
            target = draw * _total(row_ptr, vocab, largest, cut, at_cut, min_p, BLOCK)
            token = _first_beyond(row_ptr, vocab, largest, min_p, target, BLOCK)
    tl.store(tokens_ptr + row, token.to(tl.int64))


def aot_variants() -> list[Variant]:
    """As a model of 8 billion parameters launches them."""
    bf16, fp32 = torch.bfloat16, torch.float32
    names = ("temperature_ptr", "penalty_ptr")
    types = {**pointers(fp32, "scaled_ptr", *names), "logits_ptr": "*bf16", "vocab": "i32", "logits_stride": "i32"}
    types |= pointers(torch.uint8, "seen_ptr", "forbidden_ptr")
    adjust: dict[str, int | bool | float | None] = {"HAS_PENALTY": True, "HAS_FORBIDDEN": True, "BLOCK": _BLOCK}
    row = {
        **pointers(torch.int64, "tokens_ptr", "seeds_ptr", "positions_ptr"),
        **pointers(fp32, "scaled_ptr", "temperature_ptr", "top_p_ptr", "min_p_ptr"),
        "top_k_ptr": "*i32",
        "vocab": "i32",
    }
    return [
        Variant(_adjust_kernel, f"{TYPE_NAMES[bf16]} penalties", types, adjust, {"num_warps": 4}),
        Variant(_sample_kernel, "all filters", row, {"BLOCK": _BLOCK}, {"num_warps": 8}),
    ]
