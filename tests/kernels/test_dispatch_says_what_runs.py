"""The dispatch point refuses what cannot run, with reason and remedy, and never falls back in silence."""

import os

import pytest
import torch

from engine.attention.backends import get_backend
from engine.errors import ConfigError
from kernels import dispatch
from kernels.dispatch import IMPLEMENTATIONS, cache_unsupported_reason, choose

CPU = torch.device("cpu")
needs_compiling_process = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="this process interprets kernels"
)


@needs_compiling_process
def test_triton_on_a_cpu_is_refused_and_the_remedy_names_a_backend_and_the_interpreter():
    with pytest.raises(ConfigError) as caught:
        get_backend("triton", CPU, torch.float32, 64)
    assert caught.value.field == "attention"
    assert "cpu" in caught.value.message
    assert "sdpa" in caught.value.remedy
    assert "TRITON_INTERPRET=1" in caught.value.remedy


@needs_compiling_process
@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_every_operation_without_a_gpu_has_no_triton_path(op):
    choice = choose(op, "triton", device=CPU, dtype=torch.float32)
    assert choice.path is None
    assert choice.reason
    assert choice.remedy


@pytest.mark.parametrize("name", ["sdpa", "reference"])
def test_torch_backends_run_where_they_are_asked_for_under_their_own_name(name):
    backend, path = get_backend(name, CPU, torch.bfloat16, 64)
    assert backend.name == path == name


def test_a_head_too_wide_for_the_kernel_is_refused_with_both_numbers():
    choice = choose("paged_attention", "triton", device="cuda", dtype=torch.bfloat16, head_dim=512)
    assert choice.path is None
    assert "512" in choice.reason
    assert "256" in choice.reason


@pytest.mark.parametrize(
    ("path", "kv_format", "capability", "said"),
    [
        ("triton", "fp8", (8, 0), "8.9"),
        ("triton", "fp8", (9, 0), None),
        ("triton", "int8", (8, 0), None),
        ("sdpa", "fp8", (8, 0), None),
    ],
)
def test_an_fp8_cache_is_refused_on_a_gpu_whose_kernels_cannot_convert_it(
    monkeypatch, path, kv_format, capability, said
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    unsupported = cache_unsupported_reason(path, kv_format, "cuda", 64)
    if said is None:
        assert unsupported is None
    else:
        assert said in unsupported.reason
        assert "int8" in unsupported.remedy


def test_a_dtype_the_kernel_lacks_is_refused_by_name():
    choice = choose("paged_attention", "triton", device="cuda", dtype=torch.float64, head_dim=64)
    assert choice.path is None
    assert "float64" in choice.reason


def test_a_platform_without_triton_is_told_so(monkeypatch):
    monkeypatch.setattr(dispatch, "triton_installed", lambda: False)
    choice = choose("paged_attention", "triton", device="cuda", dtype=torch.bfloat16, head_dim=64)
    assert choice.path is None
    assert "not installed" in choice.reason


def test_a_gpu_too_old_for_the_kernel_is_refused_and_a_new_one_named(monkeypatch):
    monkeypatch.setattr(dispatch, "triton_interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    old = choose("paged_attention", "triton", device="cuda:0", dtype=torch.float16, head_dim=64)
    assert old.path is None
    assert "7.5" in old.reason
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    new = choose("paged_attention", "triton", device="cuda:0", dtype=torch.float16, head_dim=64)
    assert new.path == "triton"
    assert "sm_90" in new.reason


def test_an_unknown_implementation_is_refused_with_the_known_ones():
    choice = choose("kv_write", "cuda", device=CPU, dtype=torch.float32)
    assert choice.path is None
    assert "reference" in choice.remedy
