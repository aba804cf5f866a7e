"""From the moments that a peer reports to the figures of the tables: one arithmetic for every engine.

TTFT, TPOT and output throughput are those of ``engine.measure.metrics``. Two more are defined here:

    decode tokens/s   tokens that became known after every request had its first / time from then to the last token;
                      None where requests do not start together (Poisson), since then there is no such time
    prefill tokens/s  prompt tokens / sum of the times to first token; only where each request has one output token
                      and is alone, so that its time to first token is its prefill
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from engine.measure.metrics import summarize
from engine.measure.results import RequestRecord
from tests.benchmarks.peers.protocol import Timing, Work

METRICS = (
    "output_tokens_s",
    "decode_tokens_s",
    "prefill_tokens_s",
    "ttft_ms_p50",
    "ttft_ms_p95",
    "tpot_ms_p50",
    "duration_s",
)


def figures(timings: Sequence[Timing], work: Work) -> dict[str, float | None]:
    """Every metric of :data:`METRICS` of one run; None where it has no meaning."""
    records = [_record(timing, work) for timing in timings]
    began = min(timing.arrival_s for timing in timings)
    end = max(timing.token_times_s[-1] for timing in timings)
    summary = summarize(records, end - began)
    return {name: summary.get(name) for name in METRICS} | {
        "decode_tokens_s": decode_tokens_s(timings),
        "prefill_tokens_s": prefill_tokens_s(timings, work),
    }


def decode_tokens_s(timings: Sequence[Timing]) -> float | None:
    """See the module's text."""
    together = len({timing.arrival_s for timing in timings}) == 1
    all_started = max(timing.token_times_s[0] for timing in timings)
    end = max(timing.token_times_s[-1] for timing in timings)
    if not together or end <= all_started:
        return None
    tokens = sum(moment > all_started for timing in timings for moment in timing.token_times_s)
    return tokens / (end - all_started)


def prefill_tokens_s(timings: Sequence[Timing], work: Work) -> float | None:
    """See the module's text."""
    alone = work.one_by_one or len(work.requests) == 1
    if not alone or any(request.output_tokens != 1 for request in work.requests):
        return None
    seconds = sum(timing.token_times_s[0] - timing.arrival_s for timing in timings)
    return sum(len(request.prompt_token_ids) for request in work.requests) / seconds


def _record(timing: Timing, work: Work) -> RequestRecord:
    request = next(item for item in work.requests if item.index == timing.index)
    times = timing.token_times_s
    gaps = [(later - earlier) * 1e3 for earlier, later in itertools.pairwise(times)]
    return RequestRecord(
        index=timing.index,
        arrival_s=timing.arrival_s,
        prompt_tokens=len(request.prompt_token_ids),
        output_tokens=len(times),
        cached_tokens=0,
        ttft_ms=(times[0] - timing.arrival_s) * 1e3,
        tpot_ms=sum(gaps) / len(gaps) if gaps else None,
        e2e_ms=(times[-1] - timing.arrival_s) * 1e3,
        itl_ms=gaps,
        finish_reason="length",
        preemptions=0,
        draft_tokens=0,
        accepted_tokens=0,
    )
