"""Verification of speculative drafts on the device: how many are accepted, and the token that follows them.

Two rules. ``verify``: a draft is accepted where it is the token that the target's own sampler chose at its position;
what follows is that sampler's token. The text is the one without speculation, whatever the temperature.
``verify_stochastic``: Leviathan et al. (2023), algorithm 1. A draft x is accepted with probability min(1, p(x) / q(x));
at the first refusal a token is drawn from the normalised max(p - q, 0), behind the last accepted draft from p. The text
has the target's distribution, and more drafts are accepted than by the first rule where q is a model's distribution.

Ragged: sequence i has n_i drafts, at ``draft_start[i] : draft_start[i + 1]``, and n_i + 1 rows of the target's, the row
of its draft j being ``draft_start[i] + i + j``.
"""

# ruff: noqa: ANN001
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# (the parameters of a Triton kernel are pointers and scalars of the launch: there is no Python type to write)

import itertools

import torch

from kernels.language import tl, triton
from kernels.philox import draw_uniform, uniform
from kernels.variant import Variant, pointers

_BLOCK = 1024
_MASK = 2**64 - 1
NO_TOKEN = -1


def verify_reference(
    sampled: torch.Tensor, draft_token_ids: torch.Tensor, draft_start: torch.Tensor, max_drafts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Accept drafts as long as they are what was sampled.

    Args:
        sampled: int64 [D + B], the target's token at every row.
        draft_token_ids: int64 [D].
        draft_start: int32 [B + 1].
        max_drafts: at least every n_i.

    Returns:
        Accepted drafts of each sequence, int32 [B], and its new tokens, int64 [B, max_drafts + 1]: the accepted ones
        and the one that follows them, then -1.
    """
    starts = draft_start.tolist()
    accepted = torch.zeros(len(starts) - 1, dtype=torch.int32)
    tokens = torch.full((len(starts) - 1, max_drafts + 1), NO_TOKEN, dtype=torch.int64)
    for index, (start, stop) in enumerate(itertools.pairwise(starts)):
        count = 0
        while start + count < stop and sampled[start + index + count] == draft_token_ids[start + count]:
            count += 1
        accepted[index] = count
        tokens[index, : count + 1] = sampled[start + index : start + index + count + 1]
    return accepted.to(sampled.device), tokens.to(sampled.device)


def verify_triton(
    sampled: torch.Tensor, draft_token_ids: torch.Tensor, draft_start: torch.Tensor, max_drafts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`verify_reference`, in one launch without a value read back; one program a sequence."""
    num_seqs = draft_start.shape[0] - 1
    _check(sampled.shape[0], draft_token_ids, num_seqs)
    accepted = torch.empty(num_seqs, dtype=torch.int32, device=sampled.device)
    tokens = torch.empty((num_seqs, max_drafts + 1), dtype=torch.int64, device=sampled.device)
    if num_seqs:
        _verify_kernel[(num_seqs,)](
            accepted,
            tokens,
            sampled,
            draft_token_ids,
            draft_start,
            WIDTH=max_drafts + 1,
            BLOCK=triton.next_power_of_2(max_drafts + 1),
            num_warps=1,
        )
    return accepted, tokens


def verify_stochastic_reference(
    target: torch.Tensor,
    draft: torch.Tensor | None,
    draft_token_ids: torch.Tensor,
    draft_start: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    max_drafts: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rejection sampling of drafts.

    Args:
        target: float32 [D + B, V], the target's distribution at every row, filters applied.
        draft: float32 [D, V], the proposer's; None where it proposes one token with certainty (n-gram).
        draft_token_ids: int64 [D].
        draft_start: int32 [B + 1].
        seeds: int64 [B]; positions: int64 [B], number of the first output token to be decided. Acceptance of draft j
            takes word 1 and the token that follows it word 0 of the counter ``position + j``.
        max_drafts: at least every n_i.

    Returns:
        As :func:`verify_reference`.
    """
    starts = draft_start.tolist()
    accepted = torch.zeros(len(starts) - 1, dtype=torch.int32)
    tokens = torch.full((len(starts) - 1, max_drafts + 1), NO_TOKEN, dtype=torch.int64)
    for index, (start, stop) in enumerate(itertools.pairwise(starts)):
        seed, position, count = int(seeds[index]) & _MASK, int(positions[index]), 0
        while start + count < stop:
            token = int(draft_token_ids[start + count])
            p = float(target[start + index + count, token])
            q = 1.0 if draft is None else float(draft[start + count, token])
            if uniform(seed, position + count, 1) * q >= p:
                break
            tokens[index, count] = token
            count += 1
        weights = target[start + index + count].double()
        if start + count < stop:  # refused: what the draft's distribution leaves of the target's
            if draft is None:
                weights = weights.clone()
                weights[int(draft_token_ids[start + count])] = 0.0
            else:
                weights = (weights - draft[start + count].double()).clamp(min=0.0)
        cumulative = weights.cumsum(0)
        draw = uniform(seed, position + count, 0) * cumulative[-1]
        tokens[index, count] = torch.searchsorted(cumulative, draw, right=True).clamp(max=len(weights) - 1)
        accepted[index] = count
    return accepted.to(target.device), tokens.to(target.device)


def verify_stochastic_triton(
    target: torch.Tensor,
    draft: torch.Tensor | None,
    draft_token_ids: torch.Tensor,
    draft_start: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    max_drafts: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`verify_stochastic_reference`, in one launch without a value read back; one program a sequence."""
    num_seqs = draft_start.shape[0] - 1
    _check(target.shape[0], draft_token_ids, num_seqs)
    if not target.is_contiguous() or (draft is not None and not draft.is_contiguous()):
        raise ValueError("target and draft must be contiguous")
    accepted = torch.empty(num_seqs, dtype=torch.int32, device=target.device)
    tokens = torch.empty((num_seqs, max_drafts + 1), dtype=torch.int64, device=target.device)
    if num_seqs:
        _verify_stochastic_kernel[(num_seqs,)](
            accepted,
            tokens,
            target,
            target if draft is None else draft,
            draft_token_ids,
            draft_start,
            seeds,
            positions,
            target.shape[1],
            HAS_DRAFT=draft is not None,
            WIDTH=max_drafts + 1,
            BLOCK=_BLOCK,
            num_warps=8,
        )
    return accepted, tokens


def _check(num_rows: int, draft_token_ids: torch.Tensor, num_seqs: int) -> None:
    if num_rows != draft_token_ids.shape[0] + num_seqs:
        raise ValueError(
            f"draft_token_ids has {draft_token_ids.shape[0]} drafts of {num_seqs} sequences: there must be "
            f"{draft_token_ids.shape[0] + num_seqs} rows, not {num_rows}"
        )


@triton.jit
def _verify_kernel(
    accepted_ptr,
    tokens_ptr,  # int64 [B, WIDTH]
    sampled_ptr,
    draft_token_ids_ptr,
    draft_start_ptr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0)
    start = tl.load(draft_start_ptr + sequence)
    count = tl.load(draft_start_ptr + sequence + 1) - start
    place = tl.arange(0, BLOCK)
    drafted = tl.load(draft_token_ids_ptr + start + place, mask=place < count, other=-1)
    sampled = tl.load(sampled_ptr + start + sequence + place, mask=place <= count, other=-1)
    # The first place that is no draft or not what was sampled: as many are accepted.
    accepted = tl.min(tl.where((place < count) & (drafted == sampled), BLOCK, place), axis=0)
    accepted = tl.minimum(accepted, count)
    tl.store(accepted_ptr + sequence, accepted)
    tl.store(tokens_ptr + sequence * WIDTH + place, tl.where(place <= accepted, sampled, -1), mask=place < WIDTH)


@triton.jit
def _weights(target_ptr, draft_ptr, token, vocab, refused, draft_token, HAS_DRAFT: tl.constexpr):
    """What a token is drawn from: p, or behind a refusal what q leaves of it."""
    p = tl.load(target_ptr + token, mask=token < vocab, other=0.0)
    if HAS_DRAFT:
        q = tl.load(draft_ptr + token, mask=(token < vocab) & refused, other=0.0)
        return tl.maximum(p - q, 0.0)
    return tl.where(refused & (token == draft_token), 0.0, p)


@triton.jit
def _draw(target_ptr, draft_ptr, vocab, refused, draft_token, uniform, HAS_DRAFT: tl.constexpr, BLOCK: tl.constexpr):
    """The token on which a uniform number falls, in the order of the vocabulary."""
    total = tl.full([], 0.0, tl.float64)
    for start in range(0, vocab, BLOCK):
        token = start + tl.arange(0, BLOCK)
        weight = _weights(target_ptr, draft_ptr, token, vocab, refused, draft_token, HAS_DRAFT)
        total += tl.sum(weight, axis=0).to(tl.float64)
    before = tl.full([], 0.0, tl.float64)
    found = 2147483647
    last = 0
    for start in range(0, vocab, BLOCK):
        token = start + tl.arange(0, BLOCK)
        weight = _weights(target_ptr, draft_ptr, token, vocab, refused, draft_token, HAS_DRAFT)
        reached = (weight > 0) & (before + tl.cumsum(weight, axis=0).to(tl.float64) > uniform * total)
        found = tl.minimum(found, tl.min(tl.where(reached, token, 2147483647), axis=0))
        last = tl.maximum(last, tl.max(tl.where(weight > 0, token, 0), axis=0))
        before += tl.sum(weight, axis=0).to(tl.float64)
    return tl.where(found == 2147483647, last, found)


@triton.jit
def _verify_stochastic_kernel(
    accepted_ptr,
    tokens_ptr,  # int64 [B, WIDTH]
    target_ptr,  # float32 [D + B, vocab]
    draft_ptr,  # float32 [D, vocab]
    draft_token_ids_ptr,
    draft_start_ptr,
    seeds_ptr,
    positions_ptr,
    vocab,
    HAS_DRAFT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0)
    start = tl.load(draft_start_ptr + sequence)
    count = tl.load(draft_start_ptr + sequence + 1) - start
    seed, position = tl.load(seeds_ptr + sequence), tl.load(positions_ptr + sequence)
    accepted = 0
    going = count > 0
    for place in range(WIDTH - 1):  # without a way to leave a loop early, what follows a refusal is passed over
        going = going & (place < count)
        token = tl.load(draft_token_ids_ptr + start + place, mask=going, other=0)
        row = (start + place).to(tl.int64)
        p = tl.load(target_ptr + (row + sequence) * vocab + token, mask=going, other=0.0).to(tl.float64)
        q = p * 0 + 1.0
        if HAS_DRAFT:
            q = tl.load(draft_ptr + row * vocab + token, mask=going, other=1.0).to(tl.float64)
        going = going & (draw_uniform(seed, position + place, 1) * q < p)
        tl.store(tokens_ptr + sequence * WIDTH + place, tl.where(going, token, -1))
        accepted += going.to(tl.int32)
    refused = accepted < count
    draft_token = tl.load(draft_token_ids_ptr + start + accepted, mask=refused, other=-1)
    row = (start + accepted).to(tl.int64)
    uniform = draw_uniform(seed, position + accepted, 0)
    following = _draw(
        target_ptr + (row + sequence) * vocab,
        draft_ptr + row * vocab,
        vocab,
        refused,
        draft_token,
        uniform,
        HAS_DRAFT,
        BLOCK,
    )
    tl.store(tokens_ptr + sequence * WIDTH + WIDTH - 1, tl.full([], -1, tl.int64))
    tl.debug_barrier()  # the place of the following token may be one that was just filled
    tl.store(tokens_ptr + sequence * WIDTH + accepted, following.to(tl.int64))
    tl.store(accepted_ptr + sequence, accepted)


def aot_variants() -> list[Variant]:
    """Both rules, with and without a proposer's distribution."""
    i64 = torch.int64
    both = {"accepted_ptr": "*i32", "draft_start_ptr": "*i32", **pointers(i64, "tokens_ptr", "draft_token_ids_ptr")}
    stochastic = {
        **both,
        **pointers(torch.float32, "target_ptr", "draft_ptr"),
        **pointers(i64, "seeds_ptr", "positions_ptr"),
        "vocab": "i32",
    }
    return [
        Variant(_verify_kernel, "", {**both, "sampled_ptr": "*i64"}, {"WIDTH": 9, "BLOCK": 16}, {"num_warps": 1}),
        *(
            Variant(
                _verify_stochastic_kernel,
                "with a draft model" if has_draft else "without probabilities",
                stochastic,
                {"HAS_DRAFT": has_draft, "WIDTH": 9, "BLOCK": _BLOCK},
                {"num_warps": 8},
            )
            for has_draft in (True, False)
        ),
    ]
