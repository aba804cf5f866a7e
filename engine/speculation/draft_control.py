"""How many tokens to draft: the knob ``draft_control=adaptive``.

Two questions, answered apart:

* How long? For each request a running mean of the drafted tokens that were accepted; the next draft is one token
  longer than that, so that it can grow, and never longer than the knob ``draft_length``.
* At all? A verification computes more tokens than a plain step; whether that costs time depends on the machine and the
  batch: one stream is bound by reading the weights and gets the extra tokens almost for nothing, a large batch pays for
  each. So nothing is modelled: the seconds that steps take with and without drafts, and the tokens that they yield per
  sequence, are measured as running means for each batch size (in powers of two), and drafting goes on only while

      tokens per sequence and step, drafting       tokens per sequence and step, plain (1)
      --------------------------------------   >   ---------------------------------------
         seconds of a step that drafts                   seconds of a plain step

  The branch that is not in use is probed from time to time. A drafting probe that does not pay doubles the distance to
  the next one, so a text on which drafts are useless costs next to nothing in the long run.

Only steps without prompt tokens are compared: a prompt chunk would drown the difference.
"""

from __future__ import annotations

import dataclasses

# Weight of the newest observation in every running mean.
SMOOTHING = 0.2
# Steps between two probes of the branch that is not in use, at first and at most.
PROBE_EVERY, PROBE_EVERY_AT_MOST = 32, 512
# Observations of a branch before it is judged: the first step of a new shape is often the slowest.
WARM_UP = 3


@dataclasses.dataclass(slots=True)
class Mean:
    """Exponential running mean that starts as the plain mean of its first observations."""

    value: float = 0.0
    count: int = 0

    def observe(self, value: float) -> None:
        """Take over one observation."""
        self.count += 1
        self.value += (value - self.value) * max(SMOOTHING, 1.0 / self.count)


@dataclasses.dataclass(slots=True)
class _Batch:
    """What was measured at one batch size."""

    plain_s: Mean = dataclasses.field(default_factory=Mean)
    draft_s: Mean = dataclasses.field(default_factory=Mean)
    tokens: Mean = dataclasses.field(default_factory=Mean)  # per sequence and step, drafting
    since_probe: int = 0
    probe_every: int = PROBE_EVERY
    probing: bool = False

    @property
    def known(self) -> bool:
        return self.plain_s.count >= WARM_UP and self.draft_s.count >= WARM_UP

    @property
    def pays(self) -> bool:
        return self.tokens.value * self.plain_s.value > self.draft_s.value


class DraftControl:
    """Decides before each step how long drafts may be and learns from each step. Pure: it reads no clock."""

    def __init__(self) -> None:
        self._batches: dict[int, _Batch] = {}
        self._accepted: dict[str, Mean] = {}

    def should_draft(self, batch_size: int) -> bool:
        """Whether the next step, of ``batch_size`` ≥ 1 sequences past their prompt, is to verify drafts."""
        batch = self._batch(batch_size)
        if batch.plain_s.count < WARM_UP:
            return False
        if batch.draft_s.count < WARM_UP:
            return True
        batch.since_probe += 1
        batch.probing = batch.since_probe >= batch.probe_every
        return batch.pays is not batch.probing

    def length(self, request_id: str, longest: int) -> int:
        """How many tokens to draft for a request, from 1 to ``longest``."""
        mean = self._accepted.get(request_id)
        return longest if mean is None else max(1, min(longest, round(mean.value) + 1))

    def observe_draft(self, request_id: str, accepted: int) -> None:
        """One draft of this request was verified, and ``accepted`` of its tokens were right."""
        self._accepted.setdefault(request_id, Mean()).observe(accepted)

    def observe_step(self, batch_size: int, draft_tokens: int, output_tokens: int, seconds: float) -> None:
        """A step without prompt tokens is done.

        Args:
            batch_size: sequences in it.
            draft_tokens: verified; 0 makes it a plain step, whatever was intended (there may be nothing to propose).
            output_tokens: of all sequences.
            seconds: the whole step took.
        """
        batch = self._batch(batch_size)
        if draft_tokens == 0:
            batch.plain_s.observe(seconds)
        else:
            batch.draft_s.observe(seconds)
            batch.tokens.observe(output_tokens / batch_size)
        if batch.probing:
            batch.probing, batch.since_probe = False, 0
            wasted = draft_tokens > 0 and batch.known and not batch.pays
            batch.probe_every = min(2 * batch.probe_every, PROBE_EVERY_AT_MOST) if wasted else PROBE_EVERY

    def forget(self, request_id: str) -> None:
        """The request is done."""
        self._accepted.pop(request_id, None)

    def to_dict(self) -> dict[str, dict[str, float | bool]]:
        """What was measured, by smallest batch size of each group; JSON-ready."""
        return {
            str(1 << bucket): {
                "plain_ms": batch.plain_s.value * 1e3,
                "draft_ms": batch.draft_s.value * 1e3,
                "tokens_per_sequence": batch.tokens.value,
                "drafting": batch.known and batch.pays,
            }
            for bucket, batch in sorted(self._batches.items())
        }

    def _batch(self, size: int) -> _Batch:
        return self._batches.setdefault(size.bit_length() - 1, _Batch())
