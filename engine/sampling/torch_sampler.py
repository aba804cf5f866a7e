"""The sampler of a batch by torch's own operators, on every device."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from engine.device import to_device
from engine.outputs import TokenLogprob
from engine.sampling.params import NO_TOKEN, SamplingParams, SamplingRow

# Up to this k the k largest logits are selected instead of sorting the whole vocabulary.
_TOPK_WITHOUT_SORT = 256


def sample(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> tuple[list[int], list[TokenLogprob | None]]:
    """Choose one token a row.

    Penalty, then temperature, then top-k, top-p on what top-k left, then min-p: the order of transformers. What is kept
    is decided by rank, of equals the lowest ids first; the draw walks through it in the order of the vocabulary, so
    that two neighbours in rank that rounding lets change places are drawn all the same.

    Args:
        logits: [R, vocab], any float dtype; not modified.
        rows: R rows.

    Returns:
        The R chosen token ids, :data:`NO_TOKEN` where the logits leave none, and for each row its log-probabilities or
        None where none were asked for.
    """
    adjusted = _penalize(logits, rows)
    largest, token_ids = adjusted.max(dim=-1)  # NaN if there is one in the row
    drawn = [index for index, row in enumerate(rows) if not row.params.greedy]
    if drawn:
        token_ids[drawn] = _draw(adjusted[drawn].float(), [rows[index] for index in drawn])
    # On a device in what comes back anyway: nobody waits for the answer to a question of its own. Where nobody waits
    # the sum answers for nearly every batch.
    if logits.device.type != "cpu" or not math.isfinite(largest.sum()):
        token_ids.masked_fill_(~largest.isfinite(), NO_TOKEN)
    chosen: list[int] = token_ids.tolist()
    return chosen, logprobs_of(logits, rows, chosen)


def _penalize(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """Apply repetition penalties and forbidden tokens; copies only if there is something to apply."""
    touched = [i for i, row in enumerate(rows) if row.forbidden or row.params.repetition_penalty != 1.0]
    if not touched:
        return logits
    adjusted = logits.float().clone()
    for index in touched:
        row = rows[index]
        penalty = row.params.repetition_penalty
        if penalty != 1.0:
            seen = torch.tensor(sorted(set(row.history)), device=logits.device)
            values = adjusted[index, seen]
            adjusted[index, seen] = torch.where(values > 0, values / penalty, values * penalty)
        if row.forbidden:
            adjusted[index, list(row.forbidden)] = -torch.inf
    return adjusted


def _draw(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """Draw from [S, vocab] float32 logits of rows that are not greedy; int64 [S].

    Rows are grouped by the way their candidates are found, which depends on their own parameters alone: a row's
    draw must not change with its neighbours.
    """
    temperatures = torch.tensor([row.params.temperature for row in rows], device=logits.device)
    scaled = logits / temperatures[:, None]
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(_candidate_search(row.params, logits.device), []).append(index)
    tokens = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
    for search, members in groups.items():
        tokens[members] = _draw_group(scaled[members], [rows[i] for i in members], search)
    return tokens


def _candidate_search(params: SamplingParams, device: torch.device) -> str:
    if 0 < params.top_k <= _TOPK_WITHOUT_SORT and device.type == "cpu":  # elsewhere looking for equals would wait
        return "topk"
    return "sort" if params.top_k > 0 or params.top_p < 1.0 else "all"


def _draw_group(logits: torch.Tensor, rows: Sequence[SamplingRow], search: str) -> torch.Tensor:
    """Inverse-CDF draw from [S, vocab] tempered logits; int64 [S]."""
    token_ids: torch.Tensor | None = None
    vocab = logits.shape[-1]
    ks = [min(row.params.top_k, vocab) if row.params.top_k > 0 else vocab for row in rows]
    if search == "topk":
        token_ids = _largest(logits, ks)
        logits = logits.gather(-1, token_ids)
    probabilities = logits.double().softmax(dim=-1) if search == "all" else _cut_by_rank(logits, rows, ks)
    min_p = _column([row.params.min_p for row in rows], logits)
    largest = probabilities.amax(dim=-1, keepdim=True)
    probabilities = probabilities.masked_fill(probabilities < min_p * largest, 0.0)
    cumulative = probabilities.cumsum(dim=-1)
    total = cumulative[:, -1:]
    draws = _column([_uniform(row.seed, row.position) for row in rows], logits) * total
    draws = torch.minimum(draws, total.nextafter(torch.zeros_like(total)))  # where the product rounds up to all
    index = torch.searchsorted(cumulative, draws, right=True).clamp_(max=logits.shape[-1] - 1)
    return (index if token_ids is None else token_ids.gather(-1, index)).squeeze(-1)


def _cut_by_rank(logits: torch.Tensor, rows: Sequence[SamplingRow], ks: list[int]) -> torch.Tensor:
    """float64 [S, V'] probabilities of what top-k and top-p keep, zero elsewhere, in the order of the logits given."""
    values, order = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(values.shape[-1], device=logits.device)
    beyond = rank >= torch.tensor(ks, device=logits.device)[:, None]
    probabilities = values.masked_fill(beyond, -torch.inf).double().softmax(dim=-1)
    # 1.0 means all: rounding lets the running sum reach 1 before the last candidate
    top_p = _column([row.params.top_p if row.params.top_p < 1.0 else 2.0 for row in rows], logits)
    before = probabilities.cumsum(dim=-1) - probabilities
    probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    return torch.zeros_like(probabilities).scatter_(-1, order, probabilities)


def _largest(logits: torch.Tensor, ks: list[int]) -> torch.Tensor:
    """int64 [S, max(ks)]: ids, ascending, among which are those of each row's k largest, of equals the lowest ids."""
    values, token_ids = logits.topk(max(ks), dim=-1)
    counts = torch.tensor(ks)
    least = values.gather(-1, counts[:, None] - 1)
    tied = (logits >= least).sum(dim=-1) > counts  # topk takes any of the equals
    for row in tied.nonzero()[:, 0].tolist():
        above = int((values[row] > least[row]).sum())
        equals = (logits[row] == least[row]).nonzero()[: token_ids.shape[1] - above, 0]
        token_ids[row, above : above + len(equals)] = equals
    return token_ids.sort(dim=-1).values


def _column(values: list[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]


def _uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on the seed and the position alone (Philox, a counter-based generator)."""
    generator = np.random.Generator(np.random.Philox(key=seed, counter=position))
    return float(generator.random())


LEAST_LOGPROB = -9999.0
"""Stands for the log-probability of what is impossible: JSON has no infinity."""


def logprobs_of(logits: torch.Tensor, rows: Sequence[SamplingRow], chosen: Sequence[int]) -> list[TokenLogprob | None]:
    """Log-probabilities under the raw model distribution for the rows that asked."""
    result: list[TokenLogprob | None] = [None] * len(rows)
    asked = [(index, row.params.logprobs) for index, row in enumerate(rows) if row.params.logprobs is not None]
    if not asked:
        return result
    # An index out of range would end the whole process on a GPU.
    columns = ([index for index, _ in asked], [max(chosen[index], 0) for index, _ in asked])
    places, tokens = to_device([np.array(column, np.int64) for column in columns], logits.device)
    raw = logits.index_select(0, places).float().log_softmax(dim=-1).clamp_min(LEAST_LOGPROB)
    most = max(count or 0 for _, count in asked)
    top = raw.topk(most, dim=-1)
    # Token ids and float32 are exact in float64: one copy to the host for all of it.
    parts = (raw.gather(1, tokens[:, None]), top.values, top.indices)
    for (index, count), line in zip(asked, torch.cat([part.double() for part in parts], dim=1).tolist(), strict=True):
        value, values, ids = line[0], line[1 : most + 1], line[most + 1 :]
        pairs = {int(token): of_it for token, of_it in zip(ids[:count], values[:count], strict=True)}
        result[index] = TokenLogprob(chosen[index], value, pairs)
    return result
