"""The locks hold what the requirements say: the same versions, a hash for each file, no address."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOCKS = sorted(ROOT.glob("requirements*.lock"))
CUDA_LIBRARIES = re.compile(r"(nvidia-(?!ml-py)|cuda-)")


def pins(path: Path) -> dict[str, str]:
    """Versions by the names of packages, of those that this platform may get."""
    lines = [line.split(" ;")[0].strip(" \\") for line in path.read_text().splitlines() if line[:1].isalpha()]
    return {re.sub(r"[_.]", "-", name.split("[")[0]).lower(): version for name, version in map(_split, lines)}


def _split(line: str) -> tuple[str, str]:
    name, _, version = line.partition("==")
    return name, version


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
def test_every_package_of_a_lock_has_a_version_and_a_hash(lock: Path):
    blocks = re.split(r"\n(?=[a-z])", lock.read_text().partition("\n#")[2].partition("\n")[2])
    assert blocks
    assert all(re.match(r"[a-z0-9-]+==\S+", block) and "--hash=sha256:" in block for block in blocks)


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
def test_lock_names_no_address(lock: Path):
    assert not re.search(r"://|^--|^-", lock.read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("name", ["requirements.lock", "requirements-cpu.lock"])
def test_lock_has_the_versions_of_the_requirements(name: str):
    locked, wanted = pins(ROOT / name), pins(ROOT / "requirements.txt")
    assert {package: locked[package].removesuffix("+cpu") for package in wanted} == wanted


def test_lock_of_development_has_its_tools_and_nothing_that_is_installed_anyway():
    locked, wanted = pins(ROOT / "requirements-dev.lock"), pins(ROOT / "requirements-dev.txt")
    assert {package: locked[package] for package in wanted} == wanted
    assert not locked.keys() & pins(ROOT / "requirements.lock").keys()


def test_machines_without_a_gpu_get_no_cuda_library():
    default, cpu = pins(ROOT / "requirements.lock"), pins(ROOT / "requirements-cpu.lock")
    libraries = {name for name in default if CUDA_LIBRARIES.match(name)}
    assert len(libraries) > 10
    assert default.keys() - cpu.keys() == libraries
    assert cpu["torch"] == f"{default['torch']}+cpu"
