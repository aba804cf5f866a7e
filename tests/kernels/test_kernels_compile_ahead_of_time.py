"""Every kernel compiles for sm_80, sm_90 and sm_100 on a machine without a GPU, fits, and uses the matrix units."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """One compilation from scratch, in a process that does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton-cache"))
    run = subprocess.run(
        [sys.executable, "-m", "kernels.aot", "--json"],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout)


def test_every_kernel_compiles_for_every_target(reports):
    compiled = {(report["kernel"], report["target"]) for report in reports}
    kernels = ("paged_attention_kernel", "kv_write_kernel", "rms_norm_kernel", "silu_mul_kernel")
    assert compiled == {(kernel, target) for kernel in kernels for target in ("sm_80", "sm_90", "sm_100")}


def test_every_16_bit_attention_variant_uses_a_matrix_instruction(reports):
    matrix = [report for report in reports if report["needs_matrix_unit"]]
    assert len(matrix) >= 15
    assert [report for report in matrix if report["matrix_instruction"] is None] == []
    prefill = {r["target"]: r["matrix_instruction"] for r in matrix if r["label"].startswith("prefill")}
    assert prefill == {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}


def test_no_variant_spills_registers(reports):
    assert [(r["target"], r["label"], r["spill_bytes"]) for r in reports if r["spill_bytes"]] == []
    assert all(0 < report["registers"] <= 255 for report in reports)


def test_every_variant_fits_into_the_shared_memory_of_its_target(reports):
    assert [report for report in reports if report["shared_bytes"] > report["shared_limit_bytes"]] == []
