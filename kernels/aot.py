"""Compile every Triton kernel for the GPUs we ship to, without a GPU, and report what the compiler made of it.

``python -m kernels.aot`` prints a table, ``--json`` one JSON document: registers, spills, shared memory and the matrix
instruction in use. A kernel that compiles here may still be slow there: this proves that it builds, fits and uses the
matrix units, nothing more.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from kernels.dispatch import kernel_files
from kernels.variant import Variant
from kernels.waiting import waiting_files

MODULES = kernel_files()
"""Files of this folder that declare ``aot_variants`` and whose kernels something calls."""

TARGETS = (80, 90, 100)  # A100, H100/H200, B200
SHARED_LIMIT_BYTES = {80: 166_912, 90: 232_448, 100: 232_448}  # per block, CUDA C programming guide, table 27
_MATRIX_INSTRUCTIONS = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """What the compiler made of a variant for one target. ``spill_bytes`` is local memory per thread."""

    kernel: str
    label: str
    target: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    shared_limit_bytes: int
    matrix_instruction: str | None
    needs_matrix_unit: bool
    warps: int


def declared(module: str) -> list[Variant]:
    """The uses that a kernel's module declares in ``aot_variants``."""
    found: list[Variant] = importlib.import_module(f"kernels.{module}").aot_variants()
    return found


def compile_variant(variant: Variant, target: int) -> Report:
    """Compile for ``sm_<target>`` down to machine code.

    Raises:
        Exception: whatever Triton or ptxas object to.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {**variant.types, **dict.fromkeys(variant.constants, "constexpr")}
    names = variant.kernel.arg_names
    ordered = {name: signature[name] for name in names}
    # As in a launch: pointers from the allocator, strides and widths of real models are multiples of 16.
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if name in variant.aligned
        or ordered[name].startswith("*")
        or ("stride" in name and name not in variant.constants and name not in variant.kernel.do_not_specialize)
    }
    source = ASTSource(variant.kernel, ordered, constexprs=dict(variant.constants), attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=dict(variant.options))
    registers, spill_bytes = _resource_usage(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    return Report(
        kernel=variant.kernel.__name__.strip("_"),
        label=variant.label,
        target=f"sm_{target}",
        registers=registers,
        spill_bytes=spill_bytes,
        shared_bytes=compiled.metadata.shared,
        shared_limit_bytes=SHARED_LIMIT_BYTES[target],
        matrix_instruction=next((name for name in _MATRIX_INSTRUCTIONS if name in ptx), None),
        needs_matrix_unit=variant.needs_matrix_unit,
        warps=variant.options.get("num_warps", 4),
    )


def _resource_usage(cubin: bytes) -> tuple[int, int]:
    """(registers per thread, bytes of local memory per thread) as cuobjdump, bundled with Triton, reads them."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    values = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return values["REG"], values["STACK"] + values["LOCAL"]


def compile_all(modules: Sequence[str] = MODULES, targets: Sequence[int] = TARGETS) -> list[Report]:
    """Every variant of some modules for some targets, on all cores (a compilation takes about a second)."""
    work = [
        (module, index, target)
        for target in targets
        for module in modules
        for index, variant in enumerate(declared(module))
        if variant.min_target <= target <= variant.max_target
    ]
    context = multiprocessing.get_context("spawn")  # a forked copy of torch's threads would not run
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count() or 1, context) as pool:
        return list(pool.map(_compile_one, *zip(*work, strict=True), chunksize=4))


def _compile_one(module: str, index: int, target: int) -> Report:
    return compile_variant(declared(module)[index], target)


def main() -> None:
    """Compile all variants for all targets and print what came of it."""
    parser = argparse.ArgumentParser(prog="python -m kernels.aot", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--only", default=",".join(MODULES), help="files of this folder, by name")
    parser.add_argument("--waiting", action="store_true", help="kernels that nothing calls yet, instead of the others")
    parser.add_argument("--targets", default=",".join(map(str, TARGETS)), help="compute capabilities, e.g. 80,90")
    arguments = parser.parse_args()
    modules = waiting_files() if arguments.waiting else arguments.only.split(",")
    reports = compile_all(modules, [int(target) for target in arguments.targets.split(",")])
    if arguments.json:
        print(json.dumps([dataclasses.asdict(report) for report in reports], indent=2))
        return
    columns = "{:<7} {:<28} {:<52} {:>5} {:>6} {:>7}  {}"
    print(columns.format("target", "kernel", "variant", "regs", "spill", "shared", "matrix instruction"))
    for r in reports:
        values = (r.target, r.kernel, r.label, r.registers, r.spill_bytes, r.shared_bytes, r.matrix_instruction or "–")
        print(columns.format(*values))


if __name__ == "__main__":
    main()
