"""What each field of a recorded run must satisfy besides its type: bounds, lengths, patterns."""

from __future__ import annotations

import dataclasses

from engine.measure.metrics import UNSENT
from engine.measure.results import EventRecord, Provenance, RequestRecord, RunResult, SampleRecord

_LATEST_UNIX_S = 7_258_118_400.0  # the year 2200: what dates in tables and charts can hold
WHOLE = 2**63 - 1  # BIGINT
_COUNT = 2**53


@dataclasses.dataclass(frozen=True, slots=True)
class Rule:
    """What a field must satisfy besides its type.

    Attributes:
        low, high: inclusive bounds of a number, or of the numbers in a list.
        always: the bounds hold for what is shown, too.
        says: the bounds in words.
        longest: characters of a text, items of a list.
        pattern, choices: of a text.
    """

    low: float = -1e18
    high: float = 1e18
    always: bool = False
    says: str = ""
    longest: int = 20_000
    pattern: str | None = None
    choices: tuple[str, ...] = ()


ANYTHING = Rule()
_IDENTIFIER = Rule(longest=64, pattern=r"[0-9A-Za-z._:-]*", says="letters, digits, '.', '_', ':' and '-' only")
MOMENT = Rule(0.0, _LATEST_UNIX_S, always=True, says="a time between 1970 and 2200, in seconds")
_SECONDS = Rule(-1e-3, 1e9, says="a number of seconds from 0 to 1e9")
_MS = Rule(-1e-3, 1e12, says="a number of milliseconds from 0 to 1e12", longest=1_000_000)
_AMOUNT = Rule(0, _COUNT, says="a number from 0 to 2^53")
_NAME = Rule(longest=4096)
_HASH = Rule(longest=64)
_PERCENT = Rule(0, 1000, says="a number of percent")
RULES: dict[type, dict[str, Rule]] = {
    RunResult: {
        "run_id": _IDENTIFIER,
        "label": Rule(longest=1000),
        "started_unix_s": MOMENT,
        "duration_s": _SECONDS,
        "metrics": Rule(longest=1000),
        "requests": Rule(longest=200_000),
        "samples": Rule(longest=500_000),
        "events": Rule(longest=100_000),
        "comparison_id": _IDENTIFIER,
        "arm": Rule(choices=("A", "B")),
        "repeat": Rule(0, 10**6, says="a number from 0 to 1,000,000"),
        "disturbed": Rule(longest=10_000),
    },
    Provenance: {
        **dict.fromkeys(("model", "code_revision"), _NAME),
        **dict.fromkeys(("model_fingerprint", "config_hash", "workload_hash"), _HASH),
        "seed": Rule(-WHOLE - 1, WHOLE, says="a whole number of 64 bits"),
    },
    RequestRecord: {
        "arrival_s": _SECONDS,
        **dict.fromkeys(("ttft_ms", "tpot_ms", "e2e_ms", "itl_ms"), _MS),
        **dict.fromkeys(("index", "prompt_tokens", "output_tokens", "cached_tokens"), _AMOUNT),
        **dict.fromkeys(("preemptions", "draft_tokens", "accepted_tokens"), _AMOUNT),
        "finish_reason": Rule(choices=("stop", "length", "abort", "error", UNSENT)),
    },
    SampleRecord: {
        "t_s": _SECONDS,
        "step_ms": _MS,
        **dict.fromkeys(("output_tokens_s", "total_tokens_s", "running", "waiting", "resident_bytes"), _AMOUNT),
        **dict.fromkeys(("kv_blocks_used", "kv_blocks_cached", "gpu_power_w", "gpu_memory_bytes"), _AMOUNT),
        "gpu_utilization_percent": _PERCENT,
        "gpu_sm_clock_mhz": _AMOUNT,
    },
    EventRecord: {"t_s": _SECONDS, "kind": Rule(longest=64)},
}
