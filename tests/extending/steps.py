"""What the toys are tried on: a tiny engine, and two requests during which knobs change."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from engine.config import EngineConfig
from engine.core import Engine
from engine.models import load_model
from engine.reconfigure import reconfigure
from engine.sampling.params import SamplingParams

PROMPT = [72, 101, 108, 108, 111]


def make_engine(folder: Path, **knobs: object) -> Engine:
    """A float32 engine of four sequences at most on the CPU."""
    base = {"block_size": 4, "max_num_seqs": 4, "memory_limit_gib": 0.25}
    return Engine(load_model(str(folder), dtype="float32", device="cpu"), EngineConfig.from_mapping(base | knobs))


def tokens_of(engine: Engine, switches: Mapping[int, Mapping[str, object]] | None = None) -> dict[str, list[int]]:
    """Greedy and sampled output of two requests; ``switches[n]`` changes knobs before step n."""
    for name, chosen in (("greedy", {}), ("sampled", {"temperature": 1.0, "seed": 5})):
        engine.add_request(name, PROMPT, SamplingParams(max_tokens=30, ignore_eos=True, **chosen))
    return finish(engine, switches)


def finish(engine: Engine, switches: Mapping[int, Mapping[str, object]] | None = None) -> dict[str, list[int]]:
    """Step until nothing is in flight, invariants checked; every request's tokens by its id."""
    finished: dict[str, list[int]] = {}
    step = 0
    while engine.has_unfinished():
        if switches and step in switches:
            reconfigure(engine, switches[step])
        finished |= {output.request_id: output.token_ids for output in engine.step() if output.finished}
        engine.check_invariants()
        step += 1
    return finished
