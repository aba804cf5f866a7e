"""What a request is checked against before it is queued.

Requests come in through other threads than the one that steps the engine, and what they may ask for changes with the
engine's knobs (the format of the KV cache decides how long a request may be). So all of it is one immutable object: the
stepping thread replaces it as a whole, any thread may check against it, and the stepping thread checks once more when
it queues the request, because another may hold by then.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from engine.errors import QueueFullError, RequestError, shown
from engine.sampling.params import LIMITS, SamplingParams
from engine.sizing import Envelope


@dataclasses.dataclass(frozen=True, slots=True)
class Admission:
    """What the engine takes at present.

    Attributes:
        vocab_size: token ids are below it.
        envelope: how long a request may be, and why.
        max_in_flight: requests that may run and wait at once.
    """

    vocab_size: int
    envelope: Envelope
    max_in_flight: int

    def room_for(self, prompt_tokens: int) -> int:
        """Output tokens that a prompt of this length leaves room for; 0 if it is too long itself."""
        return max(0, self.envelope.max_model_len - prompt_tokens)

    def check(self, prompt_token_ids: Sequence[int], params: SamplingParams, priority: int = 0) -> None:
        """Refuse what could never finish.

        Raises:
            RequestError: naming the field and the remedy.
        """
        if not prompt_token_ids:
            raise RequestError("the prompt is empty.", field="prompt", remedy="Send at least one token.")
        LIMITS["priority"].check("priority", priority)
        self._check_tokens("prompt", prompt_token_ids)
        self._check_tokens("stop_token_ids", params.stop_token_ids)
        envelope, length = self.envelope, len(prompt_token_ids)
        longest = envelope.max_model_len
        if length + 1 > longest:
            raise RequestError(
                f"{length:,} prompt tokens leave no room for output: a request may hold {longest:,} tokens "
                f"({envelope.limited_by}).",
                field="prompt",
                remedy=envelope.remedy,
            )
        if length + params.max_tokens > longest:
            raise RequestError(
                f"{length:,} prompt tokens and {params.max_tokens:,} output tokens are more than the {longest:,} "
                f"tokens a request may hold ({envelope.limited_by}).",
                field="max_tokens",
                remedy=f"Ask for at most {longest - length:,} output tokens. {envelope.remedy}",
            )

    def check_queue(self, in_flight: int) -> None:
        """Refuse one request more than may run and wait.

        Args:
            in_flight: requests that run or wait now.

        Raises:
            QueueFullError: naming the knob.
        """
        if in_flight >= self.max_in_flight:
            raise QueueFullError(
                f"{in_flight:,} requests are running or waiting, as many as the engine takes.",
                field="max_waiting",
                remedy="Try again a little later.",
            )

    def _check_tokens(self, field: str, token_ids: Sequence[int]) -> None:
        if not token_ids:
            return
        whole = set(map(type, token_ids)) == {int}  # no booleans, nor numbers that only look whole
        if whole and min(token_ids) >= 0 and max(token_ids) < self.vocab_size:
            return
        bad = next(t for t in token_ids if type(t) is not int or not 0 <= t < self.vocab_size)
        raise RequestError(
            f"token id {shown(bad)} is not in the vocabulary.",
            field=field,
            remedy=f"Use ids from 0 to {self.vocab_size - 1}.",
        )
