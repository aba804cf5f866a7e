"""Every kernel compiles for sm_80, sm_90 and sm_100 on a machine without a GPU, fits, and uses the matrix units."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from kernels.aot import MODULES, TARGETS, declared
from kernels.waiting import waiting_files

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def reports(beside):
    """One compilation from scratch, in a process that does not interpret."""
    run = beside.result("compilation")
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout)


@pytest.mark.beside("compilation")
def test_every_kernel_compiles_for_every_target(reports):
    compiled = {(report["kernel"], report["target"]) for report in reports}
    kernels = {variant.kernel.__name__.strip("_") for name in MODULES for variant in declared(name)}
    assert compiled == {(kernel, f"sm_{target}") for kernel in kernels for target in TARGETS}


def test_every_file_with_a_kernel_is_compiled():
    folder = ROOT / "kernels"
    launched = {path.stem for path in folder.glob("*.py") if "_kernel[" in path.read_text(encoding="utf-8")}
    launched |= {path.stem for path in folder.glob("*.py") if "def aot_variants" in path.read_text(encoding="utf-8")}
    assert launched - {"aot"} == {*MODULES, *waiting_files()}


def test_every_configuration_that_ships_is_compiled():
    for module in ("paged_attention", "weight_only_linear", "scaled_linear", "expert_linear"):
        labels = [variant.label for variant in declared(module)]
        names = importlib.import_module(f"kernels.{module}").CONFIGS
        assert [name for name in names if not any(label.startswith(name) for label in labels)] == []


@pytest.mark.beside("compilation")
def test_every_16_bit_matrix_kernel_uses_a_matrix_instruction(reports):
    matrix = [report for report in reports if report["needs_matrix_unit"]]
    assert {report["kernel"] for report in matrix} == {
        "paged_attention_kernel",
        "tile_kernel",
        "scaled_linear_kernel",
        "expert_linear_kernel",
    }
    assert [report for report in matrix if report["matrix_instruction"] is None] == []
    prefill = {r["target"]: r["matrix_instruction"] for r in matrix if r["label"].startswith("prefill")}
    assert prefill == {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}


@pytest.mark.beside("compilation")
def test_no_variant_spills_registers(reports):
    assert [(r["target"], r["label"], r["spill_bytes"]) for r in reports if r["spill_bytes"]] == []
    assert all(0 < report["registers"] <= 255 for report in reports)


@pytest.mark.beside("compilation")
def test_every_variant_fits_into_the_shared_memory_of_its_target(reports):
    assert [report for report in reports if report["shared_bytes"] > report["shared_limit_bytes"]] == []


@pytest.mark.beside("compilation")
def test_what_an_l4_would_launch_fits_its_smaller_shared_memory(reports):
    """Compute capability 8.9 runs the code of 8.0 with 99 KiB a block instead of 163."""
    assert [r for r in reports if r["target"] == "sm_80" and r["shared_bytes"] > 101_376] == []


@pytest.mark.waiting
def test_every_kernel_that_nothing_calls_yet_compiles_without_spills_and_fits(tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "kernels.aot", "--waiting", "--json"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    reports = json.loads(run.stdout)
    kernels = {variant.kernel.__name__.strip("_") for name in waiting_files() for variant in declared(name)}
    compiled = {(report["kernel"], report["target"]) for report in reports}
    assert compiled == {(kernel, f"sm_{target}") for kernel in kernels for target in TARGETS}
    assert [report for report in reports if report["spill_bytes"]] == []
    assert [report for report in reports if report["shared_bytes"] > report["shared_limit_bytes"]] == []
    matrix = [report for report in reports if report["needs_matrix_unit"]]
    assert {report["kernel"] for report in matrix} == {"attention_mass_kernel"}
    assert all(report["matrix_instruction"] for report in matrix)
