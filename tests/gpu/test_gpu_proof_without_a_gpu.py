"""The proof on a GPU runs from end to end without one: every case in the interpreter, tiny, checked, and on record."""

import dataclasses
import json

import pytest
import torch

pytest.importorskip("triton")

from kernels.dispatch import IMPLEMENTATIONS
from kernels.kv_formats import KV_FORMATS
from tests.gpu import engine_speed, kernels, random_model, table
from tests.gpu.case import Bar, Case
from tests.gpu.ceilings import Ceilings
from tests.gpu.random_model import tokenizer_of


@pytest.fixture(scope="module")
def document(beside):
    """What the command writes, run as on a GPU but in Triton's interpreter."""
    run = beside.result("proof")
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert "0 wrong" in run.stdout
    return json.loads((beside.folder("proof") / "gpu.json").read_text(encoding="utf-8"))


@pytest.mark.interpreter
@pytest.mark.beside("proof")
def test_every_operation_that_triton_does_is_measured_against_its_reference(document):
    measured = {item["kernel"] for item in document["kernels"] if item["right"] is True}
    assert measured == {name for name, paths in IMPLEMENTATIONS.items() if "triton" in paths and name != "linear"}


@pytest.mark.interpreter
@pytest.mark.beside("proof")
@pytest.mark.parametrize("package", ["streamlit", "sqlalchemy", "gguf", "fastapi"])
def test_the_proof_needs_no_package_that_an_image_with_a_gpu_may_lack(document, beside, package):
    assert document["parity"]
    site = beside.folder("proof").with_name("proof.site")
    assert (site / "torch").exists()
    assert not (site / package).exists()


@pytest.mark.interpreter
@pytest.mark.beside("proof")
def test_every_case_has_a_time_and_a_floor(document):
    assert [item for item in document["kernels"] if item["us"] is None or item["floor_us"] is None] == []


@pytest.mark.interpreter
@pytest.mark.beside("proof")
def test_the_engine_gives_the_tokens_of_transformers_in_every_setting(document):
    quantized = {f"fused, {name} cache" for name in KV_FORMATS if name != "model"}
    assert {item["setting"] for item in document["parity"]} == {"eager", "fused", "fused, drafts"} | quantized
    assert [item for item in document["parity"] if item["equal"] is not True] == []
    assert all(item["path"]["attention"] == "triton (interpreter)" for item in document["parity"])
    paths = {item["setting"]: item["path"]["execution"] for item in document["parity"]}
    assert paths.pop("eager") == "eager"
    assert set(paths.values()) == {"fused"}
    over_quantized = [item for item in document["parity"] if "cache" in item["setting"]]
    caches = {item["setting"].split()[1]: item["path"]["kv_cache"] for item in over_quantized}
    assert caches == {"fp8": "fp8_per_token_head", "int8": "int8_per_token_head", "int4": "int4"}


@pytest.mark.interpreter
@pytest.mark.beside("proof")
def test_the_engine_is_measured_in_every_weight_format_and_over_quantized_caches(document):
    ours = {item["setting"] for item in document["engine"] if item["engine"] == "headroom" and item["step_ms"]}
    assert {name.partition(",")[0] for name in ours} == {"bfloat16", "int8", "int4", "w8a8", "fp8"}
    assert {name for name in ours if "cache" in name} == {"bfloat16, fp8 cache, fused", "bfloat16, int8 cache, fused"}
    assert any(item["engine"] == "transformers" and item["step_ms"] for item in document["engine"])


@pytest.mark.interpreter
@pytest.mark.beside("proof")
def test_the_tables_show_every_case_and_say_that_no_gpu_was_there(document):
    text, rows = table.text(document), table.kernel_rows(document)
    assert "no GPU" in text
    assert len(rows) == len(document["kernels"])
    assert table.markdown(document).count("\n| ") >= len(rows)


# -- judging ----------------------------------------------------------------------------------------------------------

CEILINGS = Ceilings(copy_bytes_s=1e12, flops_s={"bfloat16": 1e14}, absent={})


def case(wrong=0.0, **fields):
    x = torch.ones(8)
    return Case("rms_norm", "eight ones", lambda: x + wrong, lambda: x, 1e-6, moved_bytes=64, **fields)


def test_a_kernel_that_is_off_its_reference_is_wrong():
    good, bad = (kernels.measure(case(wrong), torch.device("cpu"), CEILINGS) for wrong in (0.0, 1e-3))
    assert (good.right, bad.right) == (True, False)
    assert bad.error == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_never_right(value):
    assert kernels.measure(case(value), torch.device("cpu"), CEILINGS).right is False


def test_results_in_integers_must_be_equal():
    ids = torch.tensor([3, 4])
    assert kernels.largest_error(lambda: ids, lambda: ids.clone()) == 0.0
    assert kernels.largest_error(lambda: ids, lambda: ids + 1) == float("inf")
    assert kernels.largest_error(lambda: ids, lambda: ids[:1]) == float("inf")


def test_bars_are_judged_by_the_ceilings_and_peers_of_the_same_run():
    bars = (Bar("bandwidth", 0.0), Bar("bandwidth", 2.0), Bar("absent peer", 1.0))
    verdicts = kernels.measure(case(bars=bars), torch.device("cpu"), CEILINGS).verdicts
    assert [verdict.reached for verdict in verdicts] == [True, False, None]


def test_a_case_that_breaks_is_told_and_does_not_hide():

    def broken():
        raise RuntimeError("no space left")

    found = kernels.measure(Case("rms_norm", "broken", broken, None, 0.0, moved_bytes=1), torch.device("cpu"), CEILINGS)
    assert "no space left" in found.problem
    document = {"kernels": [dataclasses.asdict(found)], "parity": [], "engine": []}
    assert table.failures(document) == [f"rms_norm, broken: {found.problem}"]


def test_the_floor_is_the_roofline_of_the_measured_ceilings():
    assert CEILINGS.floor_s(10**12, 0, "bfloat16") == pytest.approx(1.0)
    assert CEILINGS.floor_s(10**11, 2 * 10**14, "bfloat16") == pytest.approx(2.0)
    assert CEILINGS.floor_s(1, 1, "float8") is None


def test_the_floor_counts_the_bytes_of_the_cache_as_it_is_stored():
    device = torch.device("cpu")
    model = random_model.make(random_model.TINY, device, torch.bfloat16, tokenizer_of(random_model.TINY["vocab_size"]))
    ceilings = Ceilings(copy_bytes_s=1.0, flops_s={"bfloat16": 1e30}, absent={})  # a byte a second
    few, many = (engine_speed.floor_s(model, batch, "tiny", ceilings) for batch in (1, 101))
    quantized = [engine_speed.floor_s(model, batch, "tiny", ceilings, KV_FORMATS["int8"]) for batch in (1, 101)]
    head = model.decoder.head_dim
    assert (quantized[1] - quantized[0]) / (many - few) == pytest.approx((head + 2) / (2 * head))


def test_the_floor_of_8_bit_products_is_that_of_the_8_bit_units():
    device = torch.device("cpu")
    model = random_model.make(random_model.TINY, device, torch.bfloat16, tokenizer_of(random_model.TINY["vocab_size"]))
    quick_copy = {"copy_bytes_s": 1e30, "absent": {}}
    rates = Ceilings(flops_s={"bfloat16": 1e12, "int8": 2e12, "float8": 4e12}, **quick_copy)
    plain = engine_speed.floor_s(model, 8, "tiny", rates)
    for weights, faster in (("int8", 1), ("w8a8", 2), ("fp8", 4)):
        model.commit_weights(model.prepare_weights(weights, 32))
        assert engine_speed.floor_s(model, 8, "tiny", rates) == pytest.approx(plain / faster)
    assert engine_speed.floor_s(model, 8, "tiny", Ceilings(flops_s={"bfloat16": 1e12}, **quick_copy)) is None
