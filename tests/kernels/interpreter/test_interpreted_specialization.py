"""A kernel is compiled once for each configuration, whatever the sizes of a step: no compiler runs while one serves.

Triton compiles a kernel anew for an integer that is 1, for one that is a multiple of 16 and for any other, and for each
pointer that is a multiple of 16 bytes or is not. What changes from step to step must not be looked at that way
(``do_not_specialize``), and what is packed for the device must be packed in multiples of 16 bytes.
"""

import inspect

import pytest
import torch
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import BaseBackend
from triton.runtime.interpreter import InterpretedFunction

from engine.config import EngineConfig
from engine.core import Engine
from engine.models import load_model
from engine.sampling import SamplingParams
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
        ("gemma3", {"weights": "w8a8"}),
        ("qwen3 moe", {"kv_dtype": "int4", "speculation": "ngram"}),
    ],
)
def test_nothing_is_compiled_anew_because_a_step_has_another_size(family, knobs, compiled, tiny_llama, tmp_path):
    folder = save_random_model(FAMILIES[family], tmp_path, tiny_llama)
    serve(load_model(str(folder), dtype="float32", device="cpu"), **knobs)
    anew = {}
    for kernel, ways in compiled.items():
        if len(ways) > 1:
            differing = {column for column in zip(*ways, strict=True) if len(set(column)) > 1}
            anew[kernel[0]] = {entry for column in differing for entry in column}
    assert len({kernel[0] for kernel in compiled}) >= 6
    assert anew == {}


def test_the_watch_sees_what_triton_looks_at(compiled):
    from kernels.rms_norm import rms_norm_triton

    for rows in (torch.ones(2, 16), torch.ones(3, 16), torch.ones(64)[1:33].view(2, 16)):
        rms_norm_triton(rows, torch.ones(16), 1e-6)
    assert [len(ways) for ways in compiled.values()] == [2]
