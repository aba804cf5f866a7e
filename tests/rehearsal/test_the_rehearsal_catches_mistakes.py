"""Deliberate mistakes, each of which a GPU would have refused or waited for: the rehearsal says where."""

from __future__ import annotations

import contextlib

import pytest
import torch

from engine import core, device
from engine.attention.operator import AttendContext
from engine.layers.mlp import GatedMLP
from engine.layers.rotary import RotaryEmbedding
from engine.reconfigure import reconfigure
from tests.rehearsal.rehearsal import load, rehearse, requests
from tests.rehearsal.simulated_gpu import GpuMistake


def refused(simulation, engine, message):
    """Serving raises this message, and it is on record; then the record is empty again."""
    with pytest.raises(GpuMistake, match=message):
        rehearse(engine, simulation, requests(["greedy"]))
    assert simulation.mistakes
    simulation.mistakes.clear()


def test_a_tensor_left_on_the_cpu_is_caught(tiny_llama, runtime, simulation):
    engine = load(tiny_llama, execution="eager")
    rotary = engine.model.decoder.rotaries[0]
    rotary.inv_freq = rotary.inv_freq.inner
    refused(simulation, engine, r"engine/layers/rotary.py:\d+ .forward.: aten::mul.Tensor over cuda:1 and the CPU")


def test_a_tensor_of_the_cpu_given_to_a_kernel_is_caught(tiny_llama, runtime, simulation):
    engine = load(tiny_llama, execution="eager")
    reconfigure(engine, {"execution": "fused"})
    engine.executor.mode.warm_up.pending.clear()
    norm = engine.model.decoder.layers[0].input_norm
    norm.weight = torch.nn.Parameter(norm.weight.inner.clone(), requires_grad=False)
    refused(simulation, engine, "_rms_norm_kernel is given weight_ptr on cpu")


def test_a_tensor_on_the_other_gpu_is_caught(tiny_llama, runtime, simulation):
    engine = load(tiny_llama, execution="eager")
    rotary = engine.model.decoder.rotaries[0]
    rotary.inv_freq = rotary.inv_freq.inner.to("cuda:0")
    refused(simulation, engine, "aten::mul.Tensor over cuda:0 and cuda:1")


@pytest.mark.parametrize(
    "read_back",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: float(x[0, 0]),
        lambda x: x.cpu(),
        lambda x: x[0].tolist(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x[[0]],
        lambda x: torch.tensor([1.0], device=x.device),
        lambda x: torch.ones(2).to(x.device, non_blocking=True),
        lambda x: torch.ones(2, pin_memory=True).to(x.device),
        lambda x: torch.repeat_interleave(x[0], (x[0] > 0).long()),
        lambda x: x.masked_select(x > 0),
    ],
)
def test_an_extra_wait_in_a_step_is_caught_and_its_place_named(read_back, tiny_llama, runtime, simulation, monkeypatch):
    engine, forward = load(tiny_llama, execution="eager"), GatedMLP.forward

    def waiting(self, x):
        read_back(x)
        return forward(self, x)

    monkeypatch.setattr(GatedMLP, "forward", waiting)
    with pytest.raises(AssertionError, match=r"engine/models/decoder.py:\d+ \(forward\): "):
        rehearse(engine, simulation, requests(["greedy"]))


def test_a_launch_outside_of_the_engines_gpu_is_caught(tiny_llama, runtime, simulation, monkeypatch):
    engine = load(tiny_llama, execution="eager")
    monkeypatch.setattr(core, "on_device", lambda _: contextlib.nullcontext())
    refused(simulation, engine, "_kv_write_kernel is launched on cuda:0 with tensors of cuda:1")


def test_tensors_on_the_first_gpu_for_an_engine_of_the_second_are_caught(tiny_llama, runtime, simulation, monkeypatch):
    engine = load(tiny_llama, execution="eager")
    forward = GatedMLP.forward

    def elsewhere(self, x):
        torch.zeros(1, device="cuda")  # whichever GPU that is
        return forward(self, x)

    monkeypatch.setattr(GatedMLP, "forward", elsewhere)
    with pytest.raises(AssertionError, match="tensors on another GPU"):
        rehearse(engine, simulation, requests(["greedy"]))


def test_the_wrong_type_for_a_kernel_is_caught(tiny_llama, runtime, simulation, monkeypatch):
    engine, enter = load(tiny_llama, execution="eager"), AttendContext.enter

    def narrow(self, backend, cache, batch):
        object.__setattr__(batch, "slot_mapping", batch.slot_mapping.int())
        enter(self, backend, cache, batch)

    monkeypatch.setattr(AttendContext, "enter", narrow)
    refused(simulation, engine, r"_kv_write_kernel is launched with .*'slot_mapping_ptr': '\*i32'")


def test_angles_in_the_wrong_type_are_caught(tiny_llama, runtime, simulation, monkeypatch):
    engine, forward = load(tiny_llama, execution="eager"), RotaryEmbedding.forward
    reconfigure(engine, {"execution": "fused"})
    engine.executor.mode.warm_up.pending.clear()
    monkeypatch.setattr(RotaryEmbedding, "forward", lambda self, at: tuple(x.half() for x in forward(self, at)))
    with pytest.raises((ValueError, AssertionError), match="cos must be float32"):  # the launching code looks itself
        rehearse(engine, simulation, requests(["greedy"]))


def test_an_address_that_makes_triton_compile_again_is_caught(tiny_llama, runtime, simulation, monkeypatch):
    engine = load(tiny_llama, execution="eager")
    monkeypatch.setattr(device, "_WORD", 4)
    refused(simulation, engine, "at an address that is no multiple of 16")


def test_pinned_memory_that_is_written_while_it_is_copied_is_caught(tiny_llama, runtime, simulation, monkeypatch):
    engine = load(tiny_llama, execution="eager")
    memory = torch.empty(4096, dtype=torch.uint8, pin_memory=True)
    monkeypatch.setattr(runtime, "pinned", lambda num_bytes: memory[:num_bytes], raising=False)
    with pytest.raises(GpuMistake, match=r"pinned memory changed while the copy of engine/device\.py"):
        rehearse(engine, simulation, requests(["top-k"]))
    simulation.mistakes.clear()


def test_memory_that_no_kernel_wrote_shows(simulation):
    assert torch.empty(3, device="cuda:1").isnan().tolist() == [True] * 3
    assert torch.empty(3, dtype=torch.float8_e4m3fn, device="cuda:1").float().isnan().tolist() == [True] * 3
    assert min(torch.empty(3, dtype=torch.int32, device="cuda:1").tolist()) > 2**28


def test_a_product_that_cuda_does_not_have_is_caught(tiny_llama, runtime, simulation):
    whole = torch.ones(32, 32, dtype=torch.int8, device="cuda:1")
    with pytest.raises(GpuMistake, match="whole numbers"):
        torch.mm(whole, whole)
    with pytest.raises(GpuMistake, match="8-bit floats"):
        torch.ones(4, device="cuda:1").to(torch.float8_e4m3fn).index_select(0, torch.zeros(1, device="cuda:1").long())
    simulation.mistakes.clear()


def test_what_torch_itself_would_refuse_on_a_gpu_is_caught(tiny_llama, runtime, simulation):
    rows = torch.ones(4, 8, device="cuda:1")
    with pytest.raises(GpuMistake, match="over cuda:1 and the CPU"):
        torch.addmm(torch.ones(8), rows, torch.ones(8, 8, device="cuda:1"))
    with pytest.raises(TypeError, match="copy it to host memory first"):
        rows.numpy()
    simulation.mistakes.clear()
