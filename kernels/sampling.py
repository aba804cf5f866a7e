"""Choosing the next token of every row on the device: penalties, temperature, top-k, top-p, min-p, and the draw.

Three launches, and nothing is sorted. Two run over all of the vocabulary with many programs a row: the first adjusts
the logits and finds each block's largest; the second surveys the row: the mass of each block and, where top-k or top-p
is asked for, count and mass of the logits within 0.5, 1, … 16 of the largest. In the third one program a row chooses:

    greedy            the first token that has the largest logit
    no top-k, top-p   the block on which the draw falls, by the masses of the survey; then the token in it
    top-k or top-p    the logits within a surveyed distance that is sure to hold all candidates are collected, and the
                      search runs over them; over the whole row where they are too many (a flat distribution)

The search looks at logits through their *keys*, whole numbers in the order of the floats. A threshold (the k-th largest
logit, the logit at which the probability reaches top-p) is the largest key t with ``measure(key ≥ t) ≥ target``, the
measure being a count or a mass. Four bits of t are found in a pass, by 16 thresholds at once: eight passes find it
exactly. What is above it is kept, and of its equals the first in the vocabulary; one more pass, in the order of the
vocabulary, finds the token on which the draw falls.

The candidates of a row are those of the host's sampler in the same order, and the draw is the same number, so the token
is the same, except where a sum's rounding decides. Sums of a block are float32 trees, sums of blocks float64, in a
fixed order: a row's token does not depend on the others. A row that leaves no token to choose (NaN or infinity among
its logits, every one excluded) gives -1.
"""

# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# (the parameters of a Triton kernel are pointers and scalars of the launch: there is no Python type to write)

import dataclasses

import torch

from kernels.language import tl, triton
from kernels.philox import draw_uniform, uniform_reference
from kernels.variant import TYPE_NAMES, Variant, pointers

_BLOCK = 1024
_WIDE_BLOCK = 2048  # of the one pass in which a single program reads a whole row
CANDIDATES = 1024
"""As many collected logits are searched in one block; where top-k and top-p keep more, the whole row is."""
_MARGIN = 1.0001  # a surveyed mass is that much above its target: float32 sums are added in another order later


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

    Penalty (Keskar et al. 2019), then temperature, top-k, top-p on what top-k left (both by rank, of equals the lowest
    ids), min-p (Nguyen et al. 2024), then the inverse of the cumulative distribution, in the order of the vocabulary,
    at :func:`kernels.philox.uniform`.

    Args:
        logits: [R, V], any float type.
        asked: of R rows.

    Returns:
        int64 [R]; -1 where the largest logit is no finite number.
    """
    scaled = adjusted_reference(logits, asked)
    largest, tokens = scaled.max(dim=-1)  # NaN if there is one in the row
    fit = largest.isfinite()
    draws = uniform_reference(asked.seeds, asked.positions)
    for row in (fit & (asked.temperature > 0)).nonzero()[:, 0].tolist():
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
        tokens_kept, place = order[keep].sort()
        cumulative = probabilities[keep][place].cumsum(dim=-1)
        drawn = torch.searchsorted(cumulative, draws[row].to(cumulative.device) * cumulative[-1], right=True)
        tokens[row] = tokens_kept[drawn.clamp(max=len(tokens_kept) - 1)]
    return tokens.masked_fill(~fit, -1)


def adjusted_reference(logits: torch.Tensor, asked: SamplingTensors) -> torch.Tensor:
    """Logits after penalty and temperature, float32 [R, V]; a greedy row's are not divided."""
    adjusted = logits.float()
    if asked.penalty is not None and asked.seen is not None:
        factor = asked.penalty[:, None]
        penalized = torch.where(adjusted > 0, adjusted / factor, adjusted * factor)
        adjusted = torch.where(asked.seen.bool(), penalized, adjusted)
    if asked.forbidden is not None:
        adjusted = adjusted.masked_fill(asked.forbidden.bool(), -torch.inf)
    return adjusted / torch.where(asked.temperature > 0, asked.temperature, 1.0)[:, None]


def sample_triton(logits: torch.Tensor, asked: SamplingTensors, *, candidates: int = CANDIDATES) -> torch.Tensor:
    """As :func:`sample_reference`, in three launches and without a value read back.

    Args:
        candidates: how many logits are collected at most (tests make it small).

    Raises:
        ValueError: naming the argument whose shape does not fit.
    """
    num_rows, vocab = logits.shape
    _check(logits, asked)
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if not num_rows:
        return tokens
    device, blocks = logits.device, triton.cdiv(vocab, _BLOCK)
    scaled = torch.empty((num_rows, vocab + candidates), dtype=torch.float32, device=device)
    collected = torch.empty((num_rows, candidates), dtype=torch.int32, device=device)
    # Each its own: halves of one tensor lie at any multiple of 4, and Triton compiles again for one that is none of 16.
    largest, totals = (torch.empty((num_rows, blocks), dtype=torch.float32, device=device) for _ in range(2))
    masses = torch.empty((num_rows, blocks, 16), dtype=torch.float32, device=device)
    counts = torch.empty((num_rows, blocks, 16), dtype=torch.int32, device=device)
    _adjust_kernel[(num_rows, blocks)](
        scaled,
        largest,
        logits,
        asked.temperature,
        asked.temperature if asked.penalty is None else asked.penalty,
        logits if asked.seen is None else asked.seen,
        logits if asked.forbidden is None else asked.forbidden,
        vocab,
        logits.stride(0),
        scaled.stride(0),
        HAS_PENALTY=asked.penalty is not None,
        HAS_FORBIDDEN=asked.forbidden is not None,
        BLOCK=_BLOCK,
        num_warps=4,
    )
    survey = (scaled, largest, totals, masses, counts)
    filters = (asked.temperature, asked.top_k, asked.top_p, asked.min_p)
    sizes = {"BLOCK": _BLOCK, "BLOCKS": triton.next_power_of_2(blocks), "num_warps": 8}
    _survey_kernel[(num_rows, blocks)](*survey, *filters, vocab, scaled.stride(0), **sizes)
    _sample_kernel[(num_rows,)](
        tokens,
        collected,
        *survey,
        *filters,
        asked.seeds,
        asked.positions,
        vocab,
        blocks,
        scaled.stride(0),
        CANDIDATES=candidates,
        WIDE_BLOCK=_WIDE_BLOCK,
        MARGIN=_MARGIN,
        **sizes,
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
    scaled_ptr,  # float32 [R, vocab + candidates]: behind the row is room for what the last kernel collects
    largest_ptr,  # float32 [R, blocks]
    logits_ptr,
    temperature_ptr,
    penalty_ptr,
    seen_ptr,
    forbidden_ptr,
    vocab,
    logits_stride,
    scaled_stride,
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
    tl.store(scaled_ptr + row * scaled_stride + token, value, mask=inside)
    largest = tl.max(tl.where(inside & (value == value), value, float("-inf")), axis=0)
    unfit = tl.max((inside & (value != value)).to(tl.int32), axis=0)  # a maximum may overlook a NaN
    largest = tl.where(unfit > 0, float("inf"), largest)
    tl.store(largest_ptr + row * tl.num_programs(1) + tl.program_id(1), largest)


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
def _of_blocks(values_ptr, blocks, other, BLOCKS: tl.constexpr):
    """[BLOCKS]: a number of each block of a row."""
    block = tl.arange(0, BLOCKS)
    return tl.load(values_ptr + block, mask=block < blocks, other=other)


@triton.jit
def _distances():
    """float32 [16]: from the largest logit, 0.5, 1, 1.5 … 4, 5, 6, 7, 8, 10, 12, 14, 16."""
    step = tl.arange(0, 16).to(tl.float32)
    return tl.where(step < 8, 0.5 * step + 0.5, tl.where(step < 12, step - 3.0, 2.0 * step - 14.0))


@triton.jit
def _survey_kernel(
    scaled_ptr,  # float32 [R, scaled_stride]
    largest_ptr,  # float32 [R, blocks]
    totals_ptr,  # float32 [R, blocks]
    masses_ptr,  # float32 [R, blocks, 16]
    counts_ptr,  # int32 [R, blocks, 16]
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    vocab,
    scaled_stride,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Masses exp(value - largest) of a block: of what min-p keeps; with top-k or top-p of all, and by distance."""
    row, block, blocks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    if tl.load(temperature_ptr + row) > 0:
        largest = tl.max(_of_blocks(largest_ptr + row * blocks, blocks, float("-inf"), BLOCKS), axis=0)
        token = block * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(scaled_ptr + row * scaled_stride + token, mask=token < vocab, other=float("-inf"))
        weight = tl.exp(value - largest)
        filtered = (tl.load(top_k_ptr + row) > 0) | (tl.load(top_p_ptr + row) < 1.0)
        least = tl.where(filtered, 0.0, tl.load(min_p_ptr + row))
        place = row * blocks + block
        tl.store(totals_ptr + place, tl.sum(tl.where(weight >= least, weight, 0.0), axis=0))
        if filtered:
            within = value[:, None] >= (largest - _distances())[None, :]
            target = place * 16 + tl.arange(0, 16)
            tl.store(masses_ptr + target, tl.sum(tl.where(within, weight[:, None], 0.0), axis=0))
            tl.store(counts_ptr + target, tl.sum(within.to(tl.int32), axis=0))


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
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(largest key t with measure(key ≥ t) ≥ target, measure(key > t)). It must hold for t = 0."""
    step = tl.arange(0, 16).to(tl.uint32)
    found = tl.full([], 0, tl.uint32)
    width = tl.full([], 1 << 28, tl.uint32)
    for _ in range(8):
        thresholds = found + step * width
        sums = _measures(row_ptr, vocab, largest, thresholds, cut, at_cut, least, COUNT, BLOCK)
        most = tl.max(tl.where(sums >= target, step.to(tl.int32), 0), axis=0)
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
def _draw_in_order(row_ptr, vocab, largest, cut, number_at_cut, least, target, BLOCK: tl.constexpr):
    """The first place at which the mass of the candidates up to it exceeds ``target``; the last candidate if none does.

    Candidates are the keys above the cut and the first ``number_at_cut`` at it, of a weight of at least ``least``.
    """
    before = tl.full([], 0.0, tl.float64)
    equals = 0
    found = 2147483647
    last = 0
    for start in range(0, vocab, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < vocab
        value = tl.load(row_ptr + place, mask=inside, other=float("-inf"))
        key = ordered_key(value)
        equal = inside & (key == cut)
        rank = equals + tl.cumsum(equal.to(tl.int32), axis=0) - 1
        weight = tl.exp(value - largest)
        counts = inside & ((key > cut) | (equal & (rank < number_at_cut))) & (weight >= least) & (weight > 0)
        weight = tl.where(counts, weight, 0.0)
        reached = counts & (before + tl.cumsum(weight, axis=0).to(tl.float64) > target)
        found = tl.minimum(found, tl.min(tl.where(reached, place, 2147483647), axis=0))
        last = tl.maximum(last, tl.max(tl.where(counts, place, 0), axis=0))
        before += tl.sum(weight, axis=0).to(tl.float64)
        equals += tl.sum(equal.to(tl.int32), axis=0)
    return tl.where(found == 2147483647, last, found)


@triton.jit
def _plain_draw(row_ptr, totals_ptr, vocab, blocks, largest, least, draw, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """The first token, in the order of the vocabulary, at which the mass exceeds the draw's part of all of it."""
    mass = _of_blocks(totals_ptr, blocks, 0.0, BLOCKS).to(tl.float64)
    block = tl.arange(0, BLOCKS)
    target = draw * tl.sum(mass, axis=0)
    beyond = tl.min(tl.where((mass > 0) & (tl.cumsum(mass, axis=0) > target), block, BLOCKS), axis=0)
    chosen = tl.minimum(beyond, tl.max(tl.where(mass > 0, block, 0), axis=0))  # the last where rounding leaves none
    before = tl.sum(tl.where(block < chosen, mass, 0.0), axis=0)
    token = chosen * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(row_ptr + token, mask=token < vocab, other=float("-inf"))
    weight = tl.exp(value - largest)
    counts = (weight >= least) & (weight > 0)
    weight = tl.where(counts, weight, 0.0)
    reached = counts & (before + tl.cumsum(weight, axis=0).to(tl.float64) > target)
    found = tl.min(tl.where(reached, token, 2147483647), axis=0)
    return tl.where(found == 2147483647, tl.max(tl.where(counts, token, 0), axis=0), found)


@triton.jit
def _surveyed(masses_ptr, counts_ptr, blocks):
    """(float64 [16] masses, int32 [16] counts) of a row within the surveyed distances."""
    masses, counts = tl.zeros([16], tl.float64), tl.zeros([16], tl.int32)
    for start in range(0, blocks, 64):
        block = start + tl.arange(0, 64)
        place = block[:, None] * 16 + tl.arange(0, 16)[None, :]
        inside = (block < blocks)[:, None]
        masses += tl.sum(tl.load(masses_ptr + place, mask=inside, other=0.0).to(tl.float64), axis=0)
        counts += tl.sum(tl.load(counts_ptr + place, mask=inside, other=0), axis=0)
    return masses, counts


@triton.jit
def _collect(row_ptr, collected_ptr, vocab, least, BLOCK: tl.constexpr):
    """Copy the logits from ``least`` on behind their row, and their tokens, in the order of the vocabulary."""
    before = 0
    for start in range(0, vocab, BLOCK):
        token = start + tl.arange(0, BLOCK)
        value = tl.load(row_ptr + token, mask=token < vocab, other=float("-inf"))
        wanted = value >= least
        place = before + tl.cumsum(wanted.to(tl.int32), axis=0) - 1
        tl.store(row_ptr + vocab + place, value, mask=wanted)
        tl.store(collected_ptr + place, token, mask=wanted)
        before += tl.sum(wanted.to(tl.int32), axis=0)
    tl.debug_barrier()  # what other threads have written is read next


@triton.jit
def _search_draw(values_ptr, count, largest, total, limited, top_k, top_p, min_p, draw, BLOCK: tl.constexpr):
    """The place among ``count`` logits on which the draw falls. ``total``: their mass where top-k does not limit it."""
    cut = tl.full([], 0, tl.uint32)  # below every key
    number = tl.full([], 0.0, tl.float64)  # how many of those at the cut are kept: the first ones
    at_cut = tl.full([], 0.0, tl.float64)  # and their mass
    if limited:
        target = top_k.to(tl.float64)
        cut, above = _search(values_ptr, count, largest, cut, at_cut, 0.0, target, True, BLOCK)
        number = target - above
        at_cut = number * tl.exp(key_value(cut) - largest).to(tl.float64)
        total = _total(values_ptr, count, largest, cut, at_cut, 0.0, BLOCK)
    if top_p < 1.0:
        target = top_p.to(tl.float64) * total
        level, above = _search(values_ptr, count, largest, cut, at_cut, 0.0, target, False, BLOCK)
        weight = tl.exp(key_value(level) - largest).to(tl.float64)
        needed = tl.ceil((target - above) / weight)  # of equals as many as are needed to reach it
        number = tl.where(level == cut, tl.minimum(needed, number), needed)
        at_cut = number * weight
        cut = level
    at_cut = tl.where(tl.exp(key_value(cut) - largest) >= min_p, at_cut, 0.0)
    target = draw * _total(values_ptr, count, largest, cut, at_cut, min_p, BLOCK)
    return _draw_in_order(values_ptr, count, largest, cut, number, min_p, target, BLOCK)


@triton.jit
def _filtered_draw(
    row_ptr,
    collected_ptr,
    totals_ptr,
    masses_ptr,
    counts_ptr,
    vocab,
    blocks,
    largest,
    top_k,
    top_p,
    min_p,
    draw,
    CANDIDATES: tl.constexpr,
    WIDE_BLOCK: tl.constexpr,
    MARGIN: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """The token of a row with top-k or top-p."""
    total = tl.sum(_of_blocks(totals_ptr, blocks, 0.0, BLOCKS).to(tl.float64), axis=0)
    masses, counts = _surveyed(masses_ptr, counts_ptr, blocks)
    limited = (top_k > 0) & (top_k < vocab)
    # The first distance within which lie the k largest, of which top-p then takes some, or enough of the mass.
    enough = tl.where(limited, counts >= top_k, masses >= top_p.to(tl.float64) * total * MARGIN)
    step = tl.arange(0, 16)
    first = tl.min(tl.where(enough, step, 16), axis=0)
    number = tl.sum(tl.where(step == first, counts, 0), axis=0)
    fits = (first < 16) & (number <= CANDIDATES)
    if fits:
        distance = tl.sum(tl.where(step == first, _distances(), 0.0), axis=0)
        _collect(row_ptr, collected_ptr, vocab, largest - distance, WIDE_BLOCK)
    values_ptr = row_ptr + tl.where(fits, vocab, 0)
    count = tl.where(fits, number, vocab)
    place = _search_draw(values_ptr, count, largest, total, limited, top_k, top_p, min_p, draw, BLOCK)
    return tl.where(fits, tl.load(collected_ptr + place, mask=fits, other=0), place)


@triton.jit
def _sample_kernel(
    tokens_ptr,  # int64 [R]
    collected_ptr,  # int32 [R, CANDIDATES]
    scaled_ptr,  # float32 [R, vocab + CANDIDATES]
    largest_ptr,  # float32 [R, blocks]
    totals_ptr,  # float32 [R, blocks]
    masses_ptr,  # float32 [R, blocks, 16]
    counts_ptr,  # int32 [R, blocks, 16]
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seeds_ptr,
    positions_ptr,
    vocab,
    blocks,
    scaled_stride,
    CANDIDATES: tl.constexpr,
    WIDE_BLOCK: tl.constexpr,
    MARGIN: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr, totals_ptr = scaled_ptr + row * scaled_stride, totals_ptr + row * blocks
    of_block = _of_blocks(largest_ptr + row * blocks, blocks, float("-inf"), BLOCKS)
    largest = tl.max(of_block, axis=0)
    fit = (largest > float("-inf")) & (largest < float("inf"))
    if (tl.load(temperature_ptr + row) > 0) & fit:
        draw = draw_uniform(tl.load(seeds_ptr + row), tl.load(positions_ptr + row), 0)
        top_k, top_p, min_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)
        if (top_k > 0) | (top_p < 1.0):
            token = _filtered_draw(
                row_ptr, collected_ptr + row * CANDIDATES, totals_ptr, masses_ptr + row * blocks * 16,
                counts_ptr + row * blocks * 16, vocab, blocks, largest, top_k, top_p, min_p, draw, CANDIDATES,
                WIDE_BLOCK, MARGIN, BLOCK, BLOCKS,
            )  # fmt: skip
        else:
            token = _plain_draw(row_ptr, totals_ptr, vocab, blocks, largest, min_p, draw, BLOCK, BLOCKS)
    else:  # the first of the largest: it is in the first block that has it
        block = tl.arange(0, BLOCKS)
        first = tl.min(tl.where((of_block == largest) & (block < blocks), block, BLOCKS), axis=0)
        place = first * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(row_ptr + place, mask=place < vocab, other=float("-inf"))
        token = tl.min(tl.where((value == largest) & (place < vocab), place, 2147483647), axis=0)
    tl.store(tokens_ptr + row, tl.where(fit, token, -1).to(tl.int64))


def aot_variants() -> list[Variant]:
    """As a model of 8 billion parameters launches them."""
    bf16, fp32 = torch.bfloat16, torch.float32
    sizes = {"vocab": "i32", "scaled_stride": "i32"}
    adjust_types = {
        **pointers(fp32, "scaled_ptr", "largest_ptr", "temperature_ptr", "penalty_ptr"),
        **pointers(torch.uint8, "seen_ptr", "forbidden_ptr"),
        **sizes,
        "logits_ptr": "*bf16",
        "logits_stride": "i32",
    }
    adjust: dict[str, int | bool | float | None] = {"HAS_PENALTY": True, "HAS_FORBIDDEN": True, "BLOCK": _BLOCK}
    survey_types = {
        **pointers(fp32, "scaled_ptr", "largest_ptr", "totals_ptr", "masses_ptr"),
        **pointers(fp32, "temperature_ptr", "top_p_ptr", "min_p_ptr"),
        **pointers(torch.int32, "counts_ptr", "top_k_ptr"),
        **sizes,
    }
    types = {**survey_types, **pointers(torch.int64, "tokens_ptr", "seeds_ptr", "positions_ptr"), "blocks": "i32"}
    survey: dict[str, int | bool | float | None] = {"BLOCK": _BLOCK, "BLOCKS": 128}  # a vocabulary of 128 thousand
    sample = survey | {"CANDIDATES": CANDIDATES, "WIDE_BLOCK": _WIDE_BLOCK, "MARGIN": _MARGIN}
    return [
        Variant(_adjust_kernel, f"{TYPE_NAMES[bf16]} penalties", adjust_types, adjust, {"num_warps": 4}),
        Variant(_survey_kernel, "all filters", survey_types, survey, {"num_warps": 8}),
        Variant(_sample_kernel, "all filters", types | {"collected_ptr": "*i32"}, sample, {"num_warps": 8}),
    ]
