"""Weights of a loaded model can be swapped and restored, bit for bit."""

from __future__ import annotations

import threading

import pytest
import torch

from engine.errors import CapacityError, ConfigError, ModelLoadError
from engine.models import load_model, weight_swap


def snapshot(model):
    own = {name: parameter.clone() for name, parameter in model.decoder.named_parameters()}
    stored = {
        f"{name}.{role}": tensor.clone()
        for name, linear, _ in model.decoder.linears()
        for role, tensor in linear.format.tensors().items()
    }
    return own | stored


def assert_identical(model, before):
    after = snapshot(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def swap(model, weights, group_size=64):
    model.commit_weights(model.prepare_weights(weights, group_size))


@pytest.fixture(params=["float32", "bfloat16"])
def model(request, tiny_llama):
    return load_model(str(tiny_llama), dtype=request.param, device="cpu")


@pytest.mark.parametrize(
    ("weights", "label"),
    [("int8", "int8"), ("int4", "int4-g32"), ("w4a8", "w4a8"), ("w8a8", "w8a8"), ("fp8", "fp8")],
)
def test_swap_and_back_is_bit_identical(model, weights, label):
    before = snapshot(model)
    bytes_before = model.weight_bytes()
    swap(model, weights, 32)
    assert model.weights_format() == label
    assert model.weight_bytes() < bytes_before
    assert label[:4] in model.weights_path()
    swap(model, "model")
    assert model.weights_format() == "model"
    assert model.weight_bytes() == bytes_before
    assert_identical(model, before)


@pytest.mark.model
def test_default_model_to_int4_and_back_is_bit_identical(default_model_float32, logits_of):
    model = default_model_float32
    sequence = [model.tokenizer("The capital of France is Paris. The capital of Italy is").input_ids]
    swap(model, "model")  # the model is shared: an engine may have brought it into another layout
    before, expected = snapshot(model), logits_of(model.decoder, sequence)
    swap(model, "int4", 32)
    quantized = logits_of(model.decoder, sequence)
    swap(model, "model")
    assert_identical(model, before)
    assert torch.equal(logits_of(model.decoder, sequence), expected)
    assert not torch.equal(quantized, expected)
    assert quantized[-1].argmax() == expected[-1].argmax()


@pytest.mark.model
def test_path_of_mixed_group_sizes_counts_the_layers_of_each(default_model_float32):
    swap(default_model_float32, "int4", 128)
    path = default_model_float32.weights_path()
    swap(default_model_float32, "model")
    assert "int4 g64" in path
    assert "[90 of 120 layers]" in path  # 576 is not divisible by 128
    assert "[30 of 120 layers]" in path


def test_embedding_head_and_norms_stay_in_the_model_dtype(model):
    before = {name: parameter.clone() for name, parameter in model.decoder.named_parameters()}
    swap(model, "int4")
    assert all(torch.equal(before[name], parameter) for name, parameter in model.decoder.named_parameters())


def test_preparing_changes_nothing_until_the_commit(model):
    before = snapshot(model)
    prepared = model.prepare_weights("int8", 64)
    assert_identical(model, before)
    assert model.weights_format() == "model"
    model.commit_weights(prepared)
    assert model.weights_format() == "int8"


def test_preparing_runs_in_another_thread_while_the_model_computes(model, logits_of):
    sequence = [list(range(50))]
    expected = logits_of(model.decoder, sequence)
    prepared = []
    thread = threading.Thread(target=lambda: prepared.append(model.prepare_weights("int8", 64)))
    thread.start()
    while thread.is_alive():
        assert torch.equal(logits_of(model.decoder, sequence), expected)
    assert prepared


def test_progress_runs_from_zero_to_one(model):
    seen = []
    model.prepare_weights("int4", 32, seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 1.0


@pytest.mark.model
def test_weights_prepared_for_another_model_are_refused_whole(model, default_model_float32):
    before = snapshot(model)
    other = default_model_float32.prepare_weights("int8", 64)
    with pytest.raises(ValueError, match="another model"):
        model.commit_weights(other)
    assert_identical(model, before)


def test_unknown_format_is_refused_before_anything_is_read(model):
    with pytest.raises(ConfigError):
        model.prepare_weights("int2", 64)


def test_weights_that_do_not_fit_beside_the_present_ones_are_refused(model, monkeypatch):
    monkeypatch.setattr(weight_swap, "free_bytes", lambda device: 1000)
    with pytest.raises(CapacityError, match="next to the current ones") as caught:
        model.prepare_weights("int8", 64)
    assert caught.value.field == "weights"


def test_checkpoint_that_changed_on_disk_is_not_mixed_in(tiny_llama, tmp_path):
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(tiny_llama, folder)
    model = load_model(str(folder), device="cpu")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(ModelLoadError, match="has changed on disk"):
        model.prepare_weights("model", 64)


def test_quantization_errors_are_reported_for_every_layer(model):
    swap(model, "int4", 32)
    errors = model.quantization_errors()
    assert errors.keys() == {name for name, _, _ in model.decoder.linears()}
    assert all(0 < error.max_error <= error.half_step * (1 + 1e-5) for error in errors.values())


@pytest.mark.model
@pytest.mark.parametrize("weights", ["model", "int8", "int4"])
def test_native_layout_changes_no_number_and_comes_back_bit_by_bit(default_model_float32, weights):
    model = default_model_float32
    before = {name: linear.format.dequantize() for name, linear, _ in model.decoder.linears()}
    try:
        model.commit_weights(model.prepare_weights(weights, 32))
        plain = {name: linear.format.dequantize() for name, linear, _ in model.decoder.linears()}
        model.commit_weights(model.prepare_weights(weights, 32, linear="native"))
        for name, linear, _ in model.decoder.linears():
            assert "native" in linear.format.path
            assert torch.equal(linear.format.dequantize(), plain[name]), name
    finally:
        model.commit_weights(model.prepare_weights("model", 32))
    assert all(torch.equal(linear.format.dequantize(), before[name]) for name, linear, _ in model.decoder.linears())


@pytest.mark.model
def test_int8_head_is_shared_with_the_tied_embedding_and_its_bytes_are_counted_once(default_model_float32):
    model = default_model_float32
    before = model.weight_bytes()
    rows, width = model.spec.vocab_size, model.spec.hidden_size
    try:
        model.commit_weights(model.prepare_weights("model", 32, head="int8"))
        assert model.weights_format() == "model, head int8"
        assert "head int8" in model.weights_path()
        assert model.weight_bytes() == before - rows * width * 4 + rows * (width + 2)
        index = torch.tensor([0, 7, rows - 1])
        looked_up = model.decoder.embed_tokens.format.rows(index)
        assert torch.equal(looked_up, model.decoder.lm_head.format.dequantize()[index])
    finally:
        model.commit_weights(model.prepare_weights("model", 32))
    assert model.weight_bytes() == before


@pytest.mark.model
def test_embedding_and_head_that_stay_are_taken_over_not_read_again(default_model_float32):
    model = default_model_float32
    table = model.decoder.embed_tokens.format
    prepared = model.prepare_weights("int8", 64)
    assert prepared.formats["embed_tokens"] is table
    other = model.prepare_weights("int8", 64, head="int8")
    assert other.formats["embed_tokens"].name == "int8"
    assert model.decoder.embed_tokens.format is table
