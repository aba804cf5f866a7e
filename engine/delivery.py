"""A request's tokens on their way out: detokenized, searched for stop strings, made into outputs.

sampler ──tokens──> OutputStream.append ──text that is certain──> RequestOutput ──> client
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from engine.batching.request import Request
from engine.batching.scheduler import ScheduledRequest
from engine.models.detokenizer import Detokenizer, stream_table
from engine.outputs import FinishReason, RequestOutput, Transcript
from engine.sampling.params import SamplingParams, SamplingRow

if TYPE_CHECKING:
    from engine.models import LoadedModel


class OutputStream:
    """One request's way out.

    Attributes:
        request: whose tokens they are; what it has generated stands there.
        detokenizer: turns them into text, and holds back what is not certain yet.
        transcript: what its outputs refer to.
        plain_row: its sampling row if that is the same at every position: greedy, with nothing to be looked up.
    """

    __slots__ = ("_first_that_may_end", "_last_length", "detokenizer", "plain_row", "request", "transcript")

    def __init__(self, request: Request, detokenizer: Detokenizer) -> None:
        params = request.params
        self.request = request
        self.detokenizer = detokenizer
        self.transcript = Transcript(request.token_ids, request.num_prompt_tokens, detokenizer.pieces)
        plain = params.greedy and params.repetition_penalty == 1.0 and params.min_tokens == 0
        self.plain_row = SamplingRow(params, request.seed, 0, (), ()) if plain else None
        self._first_that_may_end = request.num_prompt_tokens + params.min_tokens
        self._last_length = request.max_total_tokens

    def append(self, tokens: list[int], now: float) -> tuple[list[int], FinishReason | None]:
        """Add tokens one by one, so that an end inside accepted drafts cuts off what comes after it.

        Args:
            now: ``time.perf_counter()`` at which they became known.

        Returns:
            The tokens that were added, and why the request ends behind them; None if it goes on.
        """
        request, detokenizer = self.request, self.detokenizer
        token_ids, token_times = request.token_ids, request.times.token_times
        first_that_may_end, last_length = self._first_that_may_end, self._last_length
        reason: FinishReason | None = None
        for taken, token in enumerate(tokens, start=1):
            token_ids.append(token)
            token_times.append(now)
            length = len(token_ids)
            stop_string = detokenizer.append(token, may_stop=length >= first_that_may_end)
            if stop_string is not None:
                reason, request.stop_reason = "stop", stop_string
            elif token in request.end_token_ids and length > first_that_may_end:
                reason, request.stop_reason = "stop", token
            elif length >= last_length:
                reason = "length"
            if reason is not None:
                # What was accepted beyond the end is no part of the text: its keys and values are not reusable.
                request.num_computed_tokens -= len(tokens) - taken
                return tokens[:taken], reason
        return tokens, None

    def output(self, tokens: list[int]) -> RequestOutput:
        """News of the request: its new tokens, and the text that became certain by them."""
        return self._output(tokens, self.detokenizer.take())

    def last_output(self, tokens: list[int]) -> RequestOutput:
        """As :meth:`output`, with the text that was held back: nothing comes after it."""
        self.detokenizer.finish()
        return self._output(tokens, self.detokenizer.take())

    def failed_output(self, num_known: int | None) -> RequestOutput:
        """The last output of a request that has failed, whatever state this stream is in; it does not raise.

        Args:
            num_known: tokens, those of the prompt included, that the client knows of if not all: neither the others nor
                any text of theirs is handed out.
        """
        request = self.request
        if num_known is not None:
            del request.token_ids[num_known:]
            del request.times.token_times[num_known - request.num_prompt_tokens :]
            return self._output([], "")
        try:
            return self.last_output([])
        except Exception:  # the detokenizer may be what failed; the reason is told
            return self._output([], "")

    def _output(self, tokens: list[int], new_text: str) -> RequestOutput:
        request, transcript = self.request, self.transcript
        return RequestOutput(
            request.request_id,
            tokens,
            new_text,
            transcript,
            len(request.token_ids) - request.num_prompt_tokens,
            len(transcript.pieces),
            request.finish_reason is not None,
            request.finish_reason,
            request.stop_reason,
            request.error,
            None if request.params.logprobs is None else [],
            request.times,
            request.num_cached_tokens,
            request.num_preemptions,
            request.num_draft_tokens,
            request.num_accepted_tokens,
        )


class Delivery:
    """Opens the streams of one model's requests.

    Args:
        model: its tokenizer makes the text, its configuration names the tokens that end one.
    """

    def __init__(self, model: LoadedModel) -> None:
        self._model = model
        self._table = stream_table(model.tokenizer)  # shared by all requests

    def end_tokens(self, params: SamplingParams) -> frozenset[int]:
        """Token ids that end a request. A checkpoint may name one that its own model does not have."""
        vocab = self._model.decoder.vocab_size
        own = () if params.ignore_eos else (token for token in self._model.eos_token_ids if token < vocab)
        return frozenset((*own, *params.stop_token_ids))

    def open(self, request: Request) -> OutputStream:
        """The stream of a request."""
        return OutputStream(request, Detokenizer(self._model.tokenizer, request.params.stop, self._table))


def sampling_rows(streams: Mapping[str, OutputStream], rows: Sequence[ScheduledRequest]) -> list[SamplingRow]:
    """One sampling row for each logits row of the runner, in the same order."""
    result: list[SamplingRow] = []
    for row in rows:
        if not row.samples:
            continue
        plain = streams[row.request.request_id].plain_row
        if plain is None:
            result.extend(rows_of(row))
        elif row.num_drafts:
            result.extend([plain] * (row.num_drafts + 1))
        else:
            result.append(plain)
    return result


def rows_of(row: ScheduledRequest) -> list[SamplingRow]:
    """The sampling rows of a request's newest token and its drafts."""
    request, params = row.request, row.request.params
    drafts = request.draft_token_ids[: row.num_drafts]
    result = []
    for ahead in range(row.num_drafts + 1):
        position = request.num_output_tokens + ahead
        history = [*request.token_ids, *drafts[:ahead]] if params.repetition_penalty != 1.0 else ()
        forbidden = tuple(request.end_token_ids) if position < params.min_tokens else ()
        result.append(SamplingRow(params, request.seed, position, history, forbidden))
    return result
