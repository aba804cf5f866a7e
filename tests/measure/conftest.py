"""A scripted engine under the real stepping loop: every request gets one token a step, in the order of submission."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.config import EngineConfig
from engine.errors import RequestError
from engine.measure.results import Provenance, RequestRecord, RunResult
from engine.outputs import (
    EngineEvent,
    EngineStatus,
    MemoryReport,
    ReconfigureResult,
    RequestOutput,
    RequestTimes,
    StepStats,
    Transcript,
)
from engine.ring import Ring
from engine.worker.loop import EngineLoop


class CharacterTokenizer:
    """One token a character; ids below 3 are special."""

    def __init__(self, opening: Sequence[int] = ()) -> None:
        self.all_special_ids = [0, 1, 2]
        self.opening = list(opening)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        ids = [3 + ord(character) % 250 for character in text]
        return (self.opening + ids) if add_special_tokens else ids

    def __len__(self) -> int:
        return 253


@dataclasses.dataclass
class _Job:
    prompt: list[int]
    params: Any
    times: RequestTimes
    tokens: list[int] = dataclasses.field(default_factory=list)


class ScriptedAdmission:
    """Stands for engine.batching.admission.Admission: refuses prompts as it is told."""

    def __init__(self, reject: Callable[[Sequence[int]], bool]) -> None:
        self.envelope = SimpleNamespace(max_model_len=2048)
        self._reject = reject

    def check(self, prompt: Sequence[int], params: Any, priority: int = 0) -> None:
        if self._reject(prompt):
            raise RequestError(f"{len(prompt)} tokens are refused.", field="prompt", remedy="Send others.")

    def check_queue(self, in_flight: int) -> None:
        """There is room for all."""


class ScriptedEngine:
    """The interface of engine.core.Engine, with no model: steps of a fixed length, knobs recorded.

    ``step_s`` may depend on the configuration, so that one arm of a comparison is really faster; ``fail_at_step``
    makes the engine die; ``reject`` refuses prompts of a length.
    """

    def __init__(
        self,
        step_s: Callable[[EngineConfig], float] = lambda config: 0.001,
        fail_at_step: int | None = None,
        reject: Callable[[Sequence[int]], bool] = lambda prompt: False,
    ) -> None:
        self.config = EngineConfig()
        self.tokenizer = CharacterTokenizer()
        self.model = SimpleNamespace(
            name="scripted",
            device=torch.device("cpu"),
            tokenizer=self.tokenizer,
            decoder=SimpleNamespace(vocab_size=253),
        )
        self.steps: Ring[StepStats] = Ring(8192)
        self.events: Ring[EngineEvent] = Ring(1024)
        self.history: list[dict[str, Any]] = []
        self.admission = ScriptedAdmission(reject)
        self.fruitless_steps = 0
        self.prefix_resets = 0
        self.batch_sizes: list[int] = []
        self.submitted: list[list[int]] = []
        self._jobs: dict[str, _Job] = {}
        self._step_s, self._fail_at = step_s, fail_at_step
        self._index = 0

    def add_request(self, request_id: str, prompt: Sequence[int], params: Any, priority: int, arrival: float) -> None:
        self.submitted.append(list(prompt))
        self._jobs[request_id] = _Job(list(prompt), params, RequestTimes(arrival))

    def abort(self, request_id: str) -> RequestOutput | None:
        return self._end(request_id, "abort") if request_id in self._jobs else None

    def fail(self, request_id: str, reason: str) -> RequestOutput | None:
        return dataclasses.replace(self._end(request_id, "error"), error=reason) if request_id in self._jobs else None

    def fail_all(self, message: str) -> list[RequestOutput]:
        return [dataclasses.replace(self._end(name, "error"), error=message) for name in list(self._jobs)]

    def has_preparation(self) -> bool:
        return False

    def has_unfinished(self) -> bool:
        return bool(self._jobs)

    def step(self) -> list[RequestOutput]:
        if self._fail_at is not None and self._index >= self._fail_at:
            raise SystemExit("out of memory")
        self.batch_sizes.append(len(self._jobs))
        duration = self._step_s(self.config)
        time.sleep(duration)
        now, outputs = time.perf_counter(), []
        for name, job in list(self._jobs.items()):
            job.tokens.append(7)
            job.times.token_times.append(now)
            done = len(job.tokens) >= job.params.max_tokens
            outputs.append(self._end(name, "length") if done else self._output(name, None))
        self.steps.append(_step(self._index, duration, len(self._jobs), len(outputs)))
        self._index += 1
        return outputs

    def prepare(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        self.config.with_changes(changes)
        return dict(changes)

    def apply(self, changes: dict[str, Any]) -> ReconfigureResult:
        target = self.config.with_changes(changes)
        changed = self.config.difference(target)
        self.config = target
        self.history.append(changes)
        if changed:
            self.add_event("reconfigure", f"changed {', '.join(changed)}", {})
        return ReconfigureResult(changed, "live", 0.0, 0.0, len(self._jobs), [])

    def reset_prefix_cache(self) -> None:
        self.prefix_resets += 1

    def close(self) -> None:
        """Nothing to release."""

    def prompt_logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Fixed logits of each token, blurred where the weights are quantized."""
        generator = torch.Generator().manual_seed(1)
        table = torch.randn(253, 253, generator=generator)
        noise = {"model": 0.0, "int8": 0.01, "int4": 0.3}[self.config.weights]
        return (table + noise * torch.randn(253, 253, generator=generator))[list(token_ids)]

    def status(self) -> EngineStatus:
        weights = {"model": 1000, "int8": 500, "int4": 250}[self.config.weights]
        return EngineStatus(
            model={"name": "scripted", "fingerprint": "f" * 64},
            config=self.config.to_dict(),
            config_hash=self.config.hash(),
            path={"weights": self.config.weights},
            memory=MemoryReport(9000, weights, 1000, 100, 2000, 4000),
            block_size=16,
            num_blocks=4,
            max_model_len=2048,
            blocks="us.c",
            running=len(self._jobs),
            waiting=0,
            totals={},
        )

    def add_event(self, kind: str, summary: str, detail: dict[str, Any]) -> None:
        self.events.append(EngineEvent(len(self.events), time.time(), kind, summary, detail))

    def _end(self, name: str, reason: Any) -> RequestOutput:
        self._jobs[name].times.end = time.perf_counter()
        output = self._output(name, reason)
        del self._jobs[name]
        return output

    def _output(self, name: str, reason: Any) -> RequestOutput:
        job = self._jobs[name]
        return RequestOutput(
            request_id=name,
            new_token_ids=job.tokens[-1:],
            new_text="",
            transcript=Transcript(job.prompt + job.tokens, len(job.prompt), []),
            num_output_tokens=len(job.tokens),
            num_pieces=0,
            finished=reason is not None,
            finish_reason=reason,
            stop_reason=None,
            error=None,
            logprobs=None,
            times=job.times,
            num_cached_tokens=0,
            num_preemptions=0,
            num_draft_tokens=0,
            num_accepted_tokens=0,
        )


def _step(index: int, duration_s: float, running: int, output_tokens: int) -> StepStats:
    counts = {field.name: 0 for field in dataclasses.fields(StepStats)}
    counts.update(index=index, time_unix_s=time.time(), duration_ms=duration_s * 1e3)  # type: ignore[arg-type]
    counts.update(num_running=running, output_tokens=output_tokens, kv_blocks_used=running)
    return StepStats(**counts)


@pytest.fixture
def tokenizer() -> CharacterTokenizer:
    return CharacterTokenizer()


@pytest.fixture
def scripted_loop(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """A function that starts a loop around a :class:`ScriptedEngine`, which changes its knobs and tells its status
    itself."""
    monkeypatch.setattr("engine.reconfigure.prepare", ScriptedEngine.prepare)
    monkeypatch.setattr("engine.reconfigure.apply", ScriptedEngine.apply)
    monkeypatch.setattr("engine.worker.loop.take_status", ScriptedEngine.status)
    loops: list[EngineLoop] = []

    def start(**arguments: Any) -> EngineLoop:
        loop = EngineLoop(ScriptedEngine(**arguments))  # type: ignore[arg-type]
        loop.start()
        loops.append(loop)
        return loop

    yield start
    for loop in loops:
        loop.stop()


@pytest.fixture
def make_request() -> Callable[..., RequestRecord]:
    """A completed request record, with fields to be overridden."""

    def build(**changes: Any) -> RequestRecord:
        values: dict[str, Any] = {
            "index": 0,
            "arrival_s": 0.0,
            "prompt_tokens": 10,
            "output_tokens": 3,
            "cached_tokens": 0,
            "ttft_ms": 100.0,
            "tpot_ms": 20.0,
            "e2e_ms": 140.0,
            "itl_ms": [20.0, 20.0],
            "finish_reason": "length",
            "preemptions": 0,
            "draft_tokens": 0,
            "accepted_tokens": 0,
        }
        return RequestRecord(**{**values, **changes})

    return build


@pytest.fixture
def make_run() -> Callable[..., RunResult]:
    """A completed run of a comparison with given metrics."""

    def build(metrics: dict[str, float | None], **changes: Any) -> RunResult:
        provenance = Provenance("m", "f", {}, "c", {}, "w", 0, {}, {}, "", None, {})
        run = RunResult("id", "compare", "completed", "", 0.0, 1.0, provenance, metrics, comparison_id="c1")
        return dataclasses.replace(run, **changes)

    return build
