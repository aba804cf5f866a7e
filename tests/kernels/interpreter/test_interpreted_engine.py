"""The whole engine on the Triton path, interpreted: the tokens must be those of the torch path."""

import contextlib

import pytest
from triton.runtime.interpreter import InterpretedFunction

from engine import core
from engine.config import EngineConfig
from engine.core import Engine
from engine.errors import ConfigError
from engine.models import load_model
from engine.reconfigure import reconfigure
from engine.sampling.params import SamplingParams
from engine.status import take_status

PROMPTS = [[(7 * request + position * position) % 250 for position in range(5 + 17 * request)] for request in range(4)]


@pytest.fixture(scope="module")
def model(tiny_llama):
    return load_model(str(tiny_llama), dtype="float32", device="cpu")


def generate(model, attention, speculation, *, prompts=PROMPTS, count=8, **more):
    """Greedy tokens of the prompts, prefilled in chunks and decoded in one batch, and the path on record."""
    knobs = {"attention": attention, "speculation": speculation, "dtype": "float32", "device": "cpu", **more}
    config = EngineConfig.from_mapping({**knobs, "token_budget": 24, "memory_limit_gib": 0.02, "draft_length": 3})
    engine = Engine(model, config)
    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), prompt, SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True))
    tokens: dict[str, list[int]] = {}
    while engine.has_unfinished():
        for output in engine.step():
            tokens[output.request_id] = list(output.token_ids)
    return tokens, take_status(engine).path


@pytest.mark.parametrize("speculation", ["off", "ngram"])
def test_engine_on_the_triton_path_generates_the_tokens_of_the_torch_path(model, speculation):
    expected, _ = generate(model, "sdpa", "off")
    tokens, path = generate(model, "triton", speculation, execution="eager")
    assert path["attention"] == "triton (interpreter)"
    assert [len(tokens[str(index)]) for index in range(len(PROMPTS))] == [8] * len(PROMPTS)
    assert tokens == expected


def test_engine_with_every_triton_kernel_generates_the_tokens_of_the_torch_path(model):
    expected, _ = generate(model, "sdpa", "off")
    tokens, path = generate(model, "triton", "off", execution="fused", sampling="triton", linear="triton")
    assert tokens == expected
    assert (path["execution"], path["sampling"]) == ("fused", "triton (interpreter)")


def test_kernels_are_launched_on_the_device_of_the_model(model, monkeypatch):
    """Triton launches on the thread's current GPU, wherever the tensors are: an engine must make its own current."""
    entered, launched, run = [], [], InterpretedFunction.run

    @contextlib.contextmanager
    def on_device(device):
        entered.append(device)
        yield
        entered.pop()

    def watch(self, *args, **kwargs):
        launched.append(list(entered))
        return run(self, *args, **kwargs)

    monkeypatch.setattr(core, "on_device", on_device)
    monkeypatch.setattr(InterpretedFunction, "run", watch)
    knobs = {"attention": "triton", "execution": "fused", "sampling": "triton", "memory_limit_gib": 0.02}
    engine = Engine(model, EngineConfig.from_mapping({**knobs, "device": "cpu"}))
    engine.add_request("0", PROMPTS[0], SamplingParams(temperature=1.0, max_tokens=2))
    while engine.has_unfinished():
        engine.step()
    served = len(launched)
    engine.prompt_logits(PROMPTS[0])
    assert len(launched) > served > 0
    assert all(inside == [model.device] for inside in launched)


@pytest.mark.parametrize("weights", ["int4", "w8a8", "fp8"])
def test_quantized_weights_through_triton_generate_the_tokens_of_the_same_weights_through_torch(tiny_llama, weights):
    results = [
        # Each way from a fresh copy: the engine swaps the weights of the model that it is given.
        generate(load_model(str(tiny_llama), dtype="float32"), "sdpa", "off", weights=weights, linear=linear)
        for linear in ("triton", "torch")
    ]
    assert "triton" in results[0][1]["weights"]
    assert "triton" not in results[1][1]["weights"]
    pairs = [pair for name in results[0][0] for pair in zip(results[0][0][name], results[1][0][name], strict=True)]
    # torch's INT4 operator rounds activations to bfloat16, and the last digit of an activation decides to which 8 bits
    # it goes: a near tie may turn.
    assert sum(ours == theirs for ours, theirs in pairs) >= 0.75 * len(pairs)


@pytest.mark.parametrize("weights", ["w8a8", "fp8"])
def test_fused_layers_quantize_activations_where_they_make_them(tiny_llama, weights, monkeypatch):
    """The same tokens, and of four products a layer only one that has its activations quantized by a launch."""
    from engine.execution import fused
    from engine.quantization import triton

    launches = []
    alone = triton.quantize_rows_triton
    monkeypatch.setattr(triton, "quantize_rows_triton", lambda x, kind: launches.append(kind) or alone(x, kind))
    knobs = {"weights": weights, "linear": "triton", "execution": "fused", "prompts": PROMPTS[:2], "count": 3}
    tokens, _ = generate(load_model(str(tiny_llama), dtype="float32"), "triton", "off", **knobs)
    together = len(launches)
    monkeypatch.setattr(fused, "activation_kind", lambda linear: None)
    apart, _ = generate(load_model(str(tiny_llama), dtype="float32"), "triton", "off", **knobs)
    assert tokens == apart
    assert together > 0
    assert len(launches) - together == 4 * together


@pytest.mark.parametrize("kv_dtype", ["fp8", "int8", "int4"])
def test_layers_over_a_quantized_cache_compute_through_triton_what_they_compute_through_torch(model, kv_dtype):
    """The logits of a prompt in chunks of 24 and of a batch of prompts, by the fused layers and by eager ones."""
    ways = [{"attention": "triton", "execution": "fused"}, {"attention": "reference", "execution": "eager"}]
    hidden = []
    for way in ways:
        config = {"dtype": "float32", "device": "cpu", "token_budget": 24, "memory_limit_gib": 0.02, **way}
        engine = Engine(model, EngineConfig.from_mapping({**config, "kv_dtype": kv_dtype}))
        assert engine.cache.format.name == kv_dtype
        hidden.append([])
        forward = engine.executor.forward
        engine.executor.forward = lambda step, f=forward, seen=hidden[-1]: seen.append(f(step)) or seen[-1]
        for index, prompt in enumerate(PROMPTS[:3]):
            engine.add_request(str(index), prompt, SamplingParams(max_tokens=1))
        while engine.has_unfinished():
            engine.step()
        assert engine.steps[-1].execution == way["execution"]
    assert len(hidden[0]) == len(hidden[1]) > 2
    for ours, theirs in zip(*hidden, strict=True):
        assert (ours - theirs).norm() < 0.01 * theirs.norm()


def test_execution_can_go_to_the_fused_kernels_and_back_while_requests_are_in_flight(model):
    expected, _ = generate(model, "sdpa", "off")
    config = EngineConfig.from_mapping({"attention": "triton", "execution": "eager", "memory_limit_gib": 0.02})
    engine = Engine(model, config)
    for index, prompt in enumerate(PROMPTS):
        engine.add_request(str(index), prompt, SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True))
    tokens, ran = {}, set()
    modes = ["eager", "fused"]
    while engine.has_unfinished():
        reconfigure(engine, {"execution": modes[len(engine.steps) % 2]})
        for output in engine.step():
            tokens[output.request_id] = list(output.token_ids)
        ran.add(engine.steps[-1].execution)
    assert tokens == expected
    assert ran == {"eager", "fused"}


def test_fused_execution_without_its_attention_is_refused_with_the_remedy(model):
    with pytest.raises(ConfigError) as caught:
        Engine(model, EngineConfig.from_mapping({"attention": "sdpa", "execution": "fused", "memory_limit_gib": 0.02}))
    assert caught.value.field == "execution"
    assert "attention to triton" in caught.value.remedy


def test_compiled_execution_of_linear_layers_in_triton_is_refused_with_the_remedy(tiny_llama):
    knobs = {"execution": "compiled", "linear": "triton", "dtype": "float32", "memory_limit_gib": 0.02}
    small = load_model(str(tiny_llama), dtype="float32", device="cpu")
    engine = Engine(small, EngineConfig.from_mapping(knobs))  # the model's own weights are torch's products
    with pytest.raises(ConfigError, match="launched, not compiled") as refused:
        reconfigure(engine, {"weights": "int8"})
    assert refused.value.field == "execution"
    assert "set linear to torch" in (refused.value.remedy or "")
    assert reconfigure(engine, {"weights": "int8", "linear": "torch"}).changed["weights"] == ("model", "int8")
    engine.close()
