"""Who drafts in a step, how far, and what came of it: the scheduler finds the drafts with the requests.

No token depends on a draft, so whatever fails here costs a step its drafts and no request its life.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from engine.batching.request import Request
from engine.batching.scheduler import ScheduledRequest
from engine.config import EngineConfig, knob
from engine.errors import shown
from engine.speculation.draft_control import DraftControl
from engine.speculation.proposers.base import Proposer
from engine.speculation.proposers.table import make_proposer
from engine.speculation.statistics import DraftStatistics
from engine.speculation.verification import accept_drafts

LONGEST_DRAFT = int(knob("draft_length").maximum or 0)

Report = Callable[[str, Exception | None], None]


class Drafting:
    """Drafts of an engine's requests.

    Args:
        config: names the proposer.
        report: told in one line of what has failed, and by which exception.

    Attributes:
        proposer: guesses continuations; None if speculation is off.
        control: how far to draft; statistics: how good the drafts are.
        stopped: requests for which drafting has failed.
    """

    def __init__(self, config: EngineConfig, report: Report) -> None:
        self.proposer = make_proposer(config)
        self.control = DraftControl()
        self.statistics = DraftStatistics(LONGEST_DRAFT)
        self.stopped: set[str] = set()
        self._report = report

    def propose(self, running: Iterable[Request], config: EngineConfig) -> None:
        """Draft for every request past its prompt; where that fails the step does without."""
        if self.proposer is None:
            return
        try:
            self._propose(self.proposer, running, config)
        except Exception as error:
            self._report("drafting failed; a step does without", error)
            self.discard(running)

    def _propose(self, proposer: Proposer, running: Iterable[Request], config: EngineConfig) -> None:
        """Draft as far as each request's output and context may still grow."""
        control, adaptive = self.control, config.draft_control == "adaptive"
        decoding = []
        for request in running:
            request.draft_token_ids = []
            if request.in_decode and request.request_id not in self.stopped:
                decoding.append(request)
        if adaptive and decoding and not control.should_draft(len(decoding)):
            return
        for request in decoding:
            count = control.length(request.request_id, config.draft_length) if adaptive else config.draft_length
            count = min(count, request.max_total_tokens - request.num_tokens - 1)
            if count > 0:
                try:
                    request.draft_token_ids = proposer.propose(request, count)[:count]
                except Exception as error:
                    self.stop(request, error)

    def verify(self, row: ScheduledRequest, sampled: list[int]) -> list[int]:
        """The tokens that a verified draft yields: what was accepted, then the correction or the bonus token.

        Args:
            sampled: a token for the newest known position and one for each draft.
        """
        request = row.request
        tokens = accept_drafts(sampled, request.draft_token_ids[: row.num_drafts])
        accepted = len(tokens) - 1
        request.num_draft_tokens += row.num_drafts
        request.num_accepted_tokens += accepted
        try:
            self.statistics.observe(row.num_drafts, accepted)
            self.control.observe_draft(request.request_id, accepted)
        except Exception as error:
            self.stop(request, error)
        return tokens

    def observe_step(self, decode_tokens: int, draft_tokens: int, output_tokens: int, seconds: float) -> None:
        """Learn from a step without prompt tokens what drafting is worth."""
        if self.proposer is not None:
            self.control.observe_step(decode_tokens, draft_tokens, output_tokens, seconds)

    def stop(self, request: Request, error: Exception | None) -> None:
        """No drafts for this request any more."""
        self.stopped.add(request.request_id)
        self._report(f"drafting failed for request {shown(request.request_id)}; it goes on without", error)

    def forget(self, request_id: str) -> None:
        """A request has ended."""
        self.stopped.discard(request_id)
        try:
            if self.proposer is not None:
                self.proposer.forget(request_id)
            self.control.forget(request_id)
        except Exception as error:
            self._report("the drafts of a finished request could not be forgotten", error)

    def discard(self, running: Iterable[Request]) -> None:
        """Drop the drafts that have not been verified."""
        for request in running:
            request.draft_token_ids = []

    def measure_again(self) -> None:
        """Forget what drafts were worth: under other knobs it may not hold any more."""
        self.control = DraftControl()

    def to_dict(self) -> dict[str, Any]:
        """JSON form: of the drafts since the start, and what the control has measured."""
        return self.statistics.to_dict() | {"control": self.control.to_dict()}
