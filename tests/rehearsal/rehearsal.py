"""Serving requests on a simulated GPU, step by step, with the ledger of each step; and what a step may wait for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.config import EngineConfig
from engine.core import Engine
from engine.sampling.params import SamplingParams
from engine.status import take_status
from tests.rehearsal.simulated_gpu import Event, Simulation

#: Where the tokens of a step come back: the one wait of a step.
TOKENS = {
    ("engine/sampling/triton_sampler.py", "sample_on_device"),
    ("engine/sampling/torch_sampler.py", "sample"),  # greedy rows with nothing to penalize; `sampling=torch`
}
#: What else a step may wait for, and why. A test names what it allows; whatever is not here fails.
NAMED_WAITS = {
    ("engine/sampling/torch_sampler.py", "logprobs_of"): "log-probabilities that a client asked for, all in one copy",
    ("engine/layers/mixture.py", "forward"): "eager mixtures, and quantized experts: one product for each expert that "
    "has tokens, so their counts come to the host, once a layer; fused execution of plain experts needs none",
    ("kernels/paged_attention.py", "paged_attention_reference"): "attention=reference walks the sequences on the "
    "host: it is the truth the others are held to, and slow",
    ("engine/sampling/torch_sampler.py", "_penalize"): "sampling=torch copies what rows ask for from ordinary memory; "
    "a GPU has sampling=triton",
    ("engine/sampling/torch_sampler.py", "_draw"): "as _penalize",
    ("engine/sampling/torch_sampler.py", "_draw_group"): "as _penalize",
    ("engine/sampling/torch_sampler.py", "_cut_by_rank"): "as _penalize",
    ("engine/sampling/torch_sampler.py", "_column"): "as _penalize",
}
TORCH_SAMPLER = ("_penalize", "_draw", "_draw_group", "_cut_by_rank", "_column", "sample")
#: From pinned memory: the step's tensors, what its rows ask of the sampler, marks of tokens that were seen and of those
#: that are forbidden.
MOST_COPIES = 4

#: A row of every kind that the sampler knows.
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "top-k": {"temperature": 0.8, "top_k": 20, "seed": 1},
    "top-p": {"temperature": 1.0, "top_p": 0.9, "seed": 2},
    "min-p": {"temperature": 1.0, "min_p": 0.05, "seed": 3},
    "penalty": {"repetition_penalty": 1.3},
    "penalty, sampled": {"temperature": 0.7, "repetition_penalty": 1.2, "seed": 5},
    "no end before": {"min_tokens": 4, "ignore_eos": False},
    "log-probabilities": {"logprobs": 3},
    "log-probability": {"temperature": 1.0, "logprobs": 0, "seed": 6},
}


@dataclasses.dataclass(frozen=True, slots=True)
class Requests:
    """What is asked: prompts and the parameters of each."""

    prompts: list[list[int]]
    params: list[SamplingParams]


def requests(kinds: Sequence[str] = ("greedy", "greedy", "top-k"), max_tokens: int = 5) -> Requests:
    """Prompts of 3, 14, 25, … tokens, the longer ones in chunks of a budget of 24."""
    prompts = [[(7 * index + place * place) % 250 for place in range(3 + 11 * index)] for index in range(len(kinds))]
    params = [SamplingParams(**{"max_tokens": max_tokens, "ignore_eos": True, **KINDS[kind]}) for kind in kinds]
    return Requests(prompts, params)


def load(folder: Path, device: str = "cuda:1", **knobs: Any) -> Engine:
    """An engine on a simulated GPU, small, in float32 unless told otherwise."""
    small = {"memory_limit_gib": 0.01, "token_budget": 24, "max_num_batched_tokens": 32, "max_num_seqs": 4}
    fixed = {"model": str(folder), "device": device, "dtype": "float32", "group_size": 32, **small}
    return Engine.load(EngineConfig.from_mapping({**fixed, **knobs}))


def on_the_cpu(folder: Path, asked: Requests, **knobs: Any) -> list[list[int]]:
    """The tokens of the engine on the CPU, by torch's own operators."""
    plain = {"attention": "sdpa", "linear": "torch", "sampling": "torch", "execution": "eager"}
    return serve(load(folder, device="cpu", **{**plain, **knobs}), asked)


def serve(engine: Engine, asked: Requests) -> list[list[int]]:
    """The tokens of all requests."""
    add(engine, asked)
    tokens: dict[str, list[int]] = {}
    while engine.has_unfinished():
        take(tokens, engine)
    engine.check_invariants()
    return [tokens[str(index)] for index in range(len(asked.prompts))]


def add(engine: Engine, asked: Requests) -> None:
    """Queue all requests, named by their numbers."""
    for index, (prompt, params) in enumerate(zip(asked.prompts, asked.params, strict=True)):
        engine.add_request(str(index), prompt, params)


def take(tokens: dict[str, list[int]], engine: Engine) -> None:
    """A step, and what came of it."""
    for output in engine.step():
        assert output.error is None, output.error
        tokens[output.request_id] = list(output.token_ids)


def warmed_up(engine: Engine) -> Engine:
    """The engine, once nothing is prepared any more."""
    while take_status(engine).execution["preparing"]:
        pass
    return engine


def rehearse(engine: Engine, simulation: Simulation, asked: Requests, allowed: Sequence[str] = ()) -> list[list[int]]:
    """Serve, and look at what every step waited for.

    Args:
        allowed: functions of :data:`NAMED_WAITS`.

    Raises:
        AssertionError: naming the place of a wait that is not allowed.
    """
    add(engine, asked)
    tokens: dict[str, list[int]] = {}
    while engine.has_unfinished():
        alone = not engine.has_preparation()
        simulation.taken()
        take(tokens, engine)
        check_step(simulation.taken(), allowed, sampled=engine.steps[-1].output_tokens > 0, alone=alone)
    engine.check_invariants()
    assert simulation.made_on == {engine.model.device.index}, "tensors on another GPU"
    return [tokens[str(index)] for index in range(len(asked.prompts))]


def check_step(events: list[Event], allowed: Sequence[str], *, sampled: bool, alone: bool = False) -> None:
    """One wait, for the tokens, and those that are allowed; its inputs in a few copies from pinned memory.

    Args:
        sampled: tokens were chosen.
        alone: no preparation went before it, whose copies would be counted too.
    """
    waits = [event for event in events if event.kind == "wait"]
    others = [event for event in waits if event.what != "numbers are read back" or not _brings_tokens(event)]
    for event in others:
        place = (event.site.file, event.site.function)
        assert event.site.function in allowed, f"{event.site}: {event.what}"
        assert place in NAMED_WAITS or place in TOKENS, f"{event.site}: {event.what}"
    assert len(waits) - len(others) == int(sampled), f"tokens came back {len(waits) - len(others)} times"
    copies = [event for event in events if event.kind == "copy"]
    if alone and "sdpa" not in allowed:  # which has one for each tile of its plan
        assert len(copies) <= MOST_COPIES, [str(event) for event in copies]


def _brings_tokens(event: Event) -> bool:
    return (event.site.file, event.site.function) in TOKENS
