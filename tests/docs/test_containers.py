"""What is built elsewhere (images, compose, continuous integration) names only what is in this repository."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILES = ("Dockerfile", "Dockerfile.cuda")


def instructions(name: str) -> list[tuple[str, str]]:
    """(instruction, arguments) of a Dockerfile, continued lines joined."""
    lines = [line for line in (ROOT / name).read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()]


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.parametrize("name", DOCKERFILES)
def test_hadolint_finds_nothing(name):
    hadolint = Path(sys.executable).with_name("hadolint")
    command = str(hadolint) if hadolint.exists() else shutil.which("hadolint")
    assert command, "hadolint is missing: install requirements-dev"
    done = subprocess.run([command, str(ROOT / name)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", DOCKERFILES)
def test_every_file_that_an_image_copies_exists(name):
    for instruction, arguments in instructions(name):
        if instruction == "COPY":
            *sources, _ = arguments.split()
            for source in sources:
                assert (ROOT / source).exists(), source


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_does_not_run_as_root_and_says_when_it_is_well(name):
    found = dict(instructions(name))
    assert found["USER"] not in ("root", "0")
    assert "_stcore/health" in found["HEALTHCHECK"]
    assert found["VOLUME"] in found["ENV"], "HEADROOM_HOME is the volume"


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_starts_a_command_that_exists(name):
    command = json.loads(dict(instructions(name))["CMD"])
    assert command[0] == "headroom"
    done = subprocess.run(
        [sys.executable, "-m", "engine", command[1], "--help"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert all(option in done.stdout for option in command if option.startswith("--"))


def test_the_images_differ_in_the_build_of_torch_and_the_gpu_settings_only():
    cpu, cuda = (instructions(name) for name in DOCKERFILES)
    differing = {left[0] for left, right in zip(cpu, cuda, strict=True) if left != right}
    assert differing == {"RUN", "ENV"}


def test_compose_publishes_on_this_machine_only_and_its_volumes_exist():
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
    for name, service in compose["services"].items():
        assert all(str(port).startswith("127.0.0.1:") for port in service.get("ports", ())), name
        for volume in service.get("volumes", ()):
            assert volume.partition(":")[0] in compose["volumes"], volume
    assert compose["services"]["postgres"]["profiles"], "PostgreSQL is optional"


def test_continuous_integration_and_hooks_run_make_targets_and_nothing_else():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    commands += [hook["entry"] for repository in hooks["repos"] for hook in repository["hooks"]]
    targets = {command.removeprefix("make ") for command in commands}
    assert all(command.startswith("make ") for command in commands)
    assert targets <= make_targets()
    assert {"check", "test", "docs"} <= targets
