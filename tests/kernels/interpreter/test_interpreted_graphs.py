"""CUDA graphs of the fused layers, recorded operation by operation: what a capture bakes in, and what it refuses."""

import pytest
import torch

from engine import core, parts
from engine.config import EngineConfig
from engine.execution.executor import Executor
from engine.execution.graphs import GraphsMode
from engine.models import load_model
from engine.sampling.params import SamplingParams
from engine.status import take_status
from tests.family_cases import FAMILIES, save_random_model
from tests.kernels.recorded_graph import CaptureError, RecordedCapture

PROMPTS = [[(7 * request + position * position) % 250 for position in range(3 + 14 * request)] for request in range(3)]


@pytest.fixture
def captures(monkeypatch):
    """Engines on the CPU capture graphs, in recordings; a list of the captures that were made."""
    made = []

    def make_capture(mode):
        made.append(RecordedCapture())
        return made[-1]

    make_cache = parts._allocate_cache
    monkeypatch.setattr(GraphsMode, "make_capture", make_capture)
    monkeypatch.setattr(Executor, "check", lambda self, config, attention: None)  # refuses graphs without a GPU
    monkeypatch.setattr(parts, "_allocate_cache", lambda model, config, blocks: make_cache(model, config, blocks + 1))
    return made


def generate(model, prompts=PROMPTS, count=3, **knobs):
    """Greedy tokens of the prompts, which end at different steps, and the executions that ran and that failed."""
    # No C++ kernels: a GPU has none, and a recording of operators does not see them.
    fixed = {
        "attention": "triton",
        "linear": "torch",
        "dtype": "float32",
        "device": "cpu",
        "token_budget": 24,
        "max_num_seqs": 4,
    }
    engine = core.Engine(model, EngineConfig.from_mapping({**fixed, "memory_limit_gib": 0.02, **knobs}))
    while take_status(engine).execution["preparing"] is not None:
        pass
    for index, prompt in enumerate(prompts):
        params = SamplingParams(temperature=0.0, max_tokens=count + 2 * index, ignore_eos=True)
        engine.add_request(str(index), prompt, params)
    tokens, ran = {}, []
    while engine.has_unfinished():
        for output in engine.step():
            tokens[output.request_id] = list(output.token_ids)
        ran.append(engine.steps[-1].execution)
    failed = take_status(engine).execution["failed"]
    engine.close()
    return tokens, ran, failed


@pytest.mark.parametrize("name", ["gemma3", "qwen3 moe"])
def test_replayed_decodes_give_the_tokens_of_eager_ones(name, captures, tiny_llama, tmp_path):
    folder = str(save_random_model(FAMILIES[name], tmp_path, tiny_llama))
    expected, _, _ = generate(load_model(folder, dtype="float32", device="cpu"), execution="eager", attention="sdpa")
    tokens, ran, failed = generate(load_model(folder, dtype="float32", device="cpu"), execution="graphs")
    assert failed == []
    assert captures[0].sizes == [4, 2, 1]  # the batch shrinks from 3 to 1: all of them are replayed
    assert ran.count("graphs") >= 4
    assert tokens == expected


@pytest.mark.parametrize("knobs", [{"weights": "int4", "kv_dtype": "int8"}, {"weights": "w8a8"}])
def test_replayed_decodes_of_quantized_models_give_the_tokens_of_fused_ones(tiny_llama, captures, knobs):
    knobs = {"linear": "triton", "prompts": PROMPTS[:2], **knobs}
    expected, _, _ = generate(load_model(str(tiny_llama), dtype="float32"), execution="fused", **knobs)
    tokens, ran, failed = generate(load_model(str(tiny_llama), dtype="float32"), execution="graphs", **knobs)
    assert failed == []
    assert ran.count("graphs") >= 4
    assert tokens == expected


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x * float(x.sum()),
        lambda x: x + torch.tensor([1.0, 2.0]),
        lambda x: x[x > 0],
        lambda x: x[torch.nonzero(x)],
        lambda x: torch.where(x > 0)[0],
        lambda x: torch.bincount(x.long()),
    ],
    ids=[
        "reads a value",
        "copies numbers of the host",
        "selects by a mask",
        "finds places",
        "finds places, too",
        "counts",
    ],
)
def test_what_a_capture_on_a_gpu_refuses_is_refused(work):
    x = torch.ones(2)
    with torch.inference_mode(), pytest.raises(CaptureError):
        RecordedCapture().capture(lambda: work(x))


def test_a_replay_reads_the_same_addresses_and_asks_python_nothing():
    x, y, asked = torch.ones(2), torch.zeros(2), []

    def work():
        asked.append(None)
        y[:1].add_(5 * len(asked))
        return torch.cat((x * 2, y))

    replay, result = RecordedCapture().capture(work)
    calls = len(asked)
    x.fill_(3.0)
    y.zero_()
    replay()
    assert len(asked) == calls
    assert result.tolist() == [6.0, 6.0, 5.0 * calls, 0.0]
