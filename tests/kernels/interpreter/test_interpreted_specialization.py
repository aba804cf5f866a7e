"""A kernel is compiled once for each configuration, whatever the sizes of a step: no compiler runs while one serves.

Triton compiles a kernel again for an integer that is 1, for one that is a multiple of 16 and for any other, and for
each pointer that is a multiple of 16 bytes or is not. What changes from step to step must not be looked at that way
(``do_not_specialize``), and what is packed for the device must be packed in multiples of 16 bytes.
"""

import inspect

import pytest
import torch
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import BaseBackend
from triton.runtime.interpreter import InterpretedFunction

from engine import parts
from engine.config import EngineConfig
from engine.core import Engine
from engine.execution import warm_up
from engine.execution.environment import ExecutionEnvironment
from engine.models import load_model
from engine.sampling.params import SamplingParams
from engine.status import take_status
from tests.family_cases import FAMILIES, save_random_model

#: Numbers of a weight, which are the same at every step: a configuration as the constants are.
OF_THE_WEIGHT = {"outputs", "inputs", "num_blocks", "x_stride"}


@pytest.fixture
def compiled(monkeypatch):
    """{(kernel, its constants): {what else Triton would compile it for}} of all launches."""
    seen: dict[tuple, set[tuple]] = {}
    run = InterpretedFunction.run

    def watch(self, *args, grid, warmup, **kwargs):
        signature = inspect.signature(self.fn)
        given = {name: value for name, value in kwargs.items() if name in signature.parameters}
        constants, others = [], []
        for name, value in signature.bind(*args, **given).arguments.items():
            if name not in OF_THE_WEIGHT and signature.parameters[name].annotation is inspect.Parameter.empty:
                looked_at = name not in (self.kwargs.get("do_not_specialize") or ())
                others.append((name, *native_specialize_impl(BaseBackend, value, False, looked_at, looked_at)))
            else:
                constants.append((name, str(value)))
        seen.setdefault((self.fn.__name__, *constants), set()).add(tuple(others))
        return run(self, *args, grid=grid, warmup=warmup, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", watch)
    return seen


@pytest.fixture
def warming_up(monkeypatch):
    """Engines on the CPU warm up, as on a GPU, and have the scratch block for it."""
    make_cache = parts._allocate_cache
    monkeypatch.setattr(parts, "_allocate_cache", lambda model, config, blocks: make_cache(model, config, blocks + 1))
    monkeypatch.setattr(ExecutionEnvironment, "compiles_at_launch", True)


def serve(model, **knobs):
    """Requests of very different lengths that come and go, so that no two steps are alike."""
    fixed = {"attention": "triton", "execution": "fused", "linear": "triton", "sampling": "triton", "token_budget": 40}
    engine = Engine(model, EngineConfig.from_mapping({**fixed, "device": "cpu", "memory_limit_gib": 0.02, **knobs}))
    for index, (length, count) in enumerate([(1, 5), (33, 2), (16, 3), (45, 2)]):
        prompt = [(7 * index + position) % 250 for position in range(length)]
        params = SamplingParams(max_tokens=count, temperature=0.8, top_p=0.9, seed=index, ignore_eos=True)
        engine.add_request(str(index), prompt, params)
        engine.step()
    while engine.has_unfinished():
        engine.step()
    engine.close()


@pytest.mark.parametrize(
    ("family", "knobs"),
    [
        ("llama", {"weights": "int4", "kv_dtype": "int8"}),
        ("gemma3", {"weights": "w8a8", "speculation": "ngram"}),
    ],
)
def test_nothing_is_compiled_again_because_a_step_has_another_size(family, knobs, compiled, tiny_llama, tmp_path):
    folder = save_random_model(FAMILIES[family], tmp_path, tiny_llama)
    serve(load_model(str(folder), dtype="float32", device="cpu"), **knobs)
    again = {}
    for kernel, ways in compiled.items():
        if len(ways) > 1:
            differing = {column for column in zip(*ways, strict=True) if len(set(column)) > 1}
            again[kernel[0]] = {entry for column in differing for entry in column}
    assert len({kernel[0] for kernel in compiled}) >= 6
    assert again == {}


@pytest.mark.parametrize("family", ["llama", "qwen3 moe"])
def test_a_warm_up_launches_every_kernel_that_serving_will(family, compiled, tiny_llama, tmp_path, warming_up):
    """All but the sampler's and the head's: those belong to no execution mode."""
    folder = save_random_model(FAMILIES[family], tmp_path, tiny_llama)
    knobs = {"attention": "triton", "execution": "fused", "linear": "triton", "device": "cpu", "token_budget": 24}
    limits = {"memory_limit_gib": 0.02, "max_num_seqs": 2, "max_num_batched_tokens": 24, "max_model_len": 40}
    model = load_model(str(folder), dtype="float32", device="cpu")
    engine = Engine(model, EngineConfig.from_mapping({**knobs, **limits, "weights": "int8"}))
    cache = [tensor.fill_(7) for tensor in (*engine.cache.keys, *engine.cache.values)]
    progress = []
    while (preparing := take_status(engine).execution["preparing"]) is not None:
        progress.append((preparing["done"], preparing["total"]))
    assert [done for done, _ in progress] == list(range(1, len(progress) + 1))
    assert {total for _, total in progress} == {len(progress) + 1}
    assert engine.events[-1].summary.startswith(f"kernels ready: {len(progress) + 1} sizes of a step")
    assert all(bool((tensor[:-1] == 7).all()) for tensor in cache)  # none but the scratch block was written
    warmed_up = set(compiled)
    for index, length in enumerate((3, 20)):
        prompt = [(7 * index + position) % 250 for position in range(length)]
        engine.add_request(str(index), prompt, SamplingParams(max_tokens=3, ignore_eos=True))
    while engine.has_unfinished():
        engine.step()
    head = ("outputs", "257")
    assert {kernel for kernel in compiled if head not in kernel} <= warmed_up


def test_a_warm_up_that_fails_is_told_and_requests_are_served(tiny_llama, warming_up, monkeypatch):
    def broken(*_):
        raise RuntimeError("no space left")

    monkeypatch.setattr(warm_up, "warm_up_step", broken)
    knobs = {"attention": "triton", "execution": "fused", "device": "cpu", "memory_limit_gib": 0.02}
    engine = Engine(load_model(str(tiny_llama), dtype="float32", device="cpu"), EngineConfig.from_mapping(knobs))
    engine.add_request("0", [1, 2, 3], SamplingParams(max_tokens=2, ignore_eos=True))
    outputs = [output for _ in range(2) for output in engine.step()]
    assert len(outputs[-1].token_ids) == 2
    assert any("warm-up stopped" in event.summary and "no space left" in event.summary for event in engine.events)
    assert take_status(engine).execution["preparing"] is None


def test_the_watch_sees_what_triton_looks_at(compiled):
    from kernels.rms_norm import rms_norm_triton

    for rows in (torch.ones(2, 16), torch.ones(3, 16), torch.ones(64)[1:33].view(2, 16)):
        rms_norm_triton(rows, torch.ones(16), 1e-6)
    assert [len(ways) for ways in compiled.values()] == [2]
