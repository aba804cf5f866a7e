"""Commands, targets and variables that the texts name exist, and every variable of the code is documented."""

import dataclasses
import re
from pathlib import Path

import pytest
import typer

from engine.cli.app import command_line
from engine.server.limits import ServerLimits
from storage.cli import app as storage

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [
    *sorted((ROOT / "docs").rglob("*.md")),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
]
OF_OUR_PROCESSES = {"HEADROOM_PROGRAM"}  # set by one of our processes for another, not by people
VARIABLE = re.compile(r"\bHEADROOM_[A-Z_]*[A-Z]\b")


def sources() -> str:
    files = [file for folder in ("engine", "kernels", "pages", "storage") for file in (ROOT / folder).rglob("*.py")]
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


def code_of(text: Path) -> list[str]:
    """The lines of its fenced blocks and its inline code."""
    whole = text.read_text(encoding="utf-8")
    fenced = re.findall(r"^```\w*\n(.*?)^```", whole, re.DOTALL | re.MULTILINE)
    inline = re.findall(r"`([^`\n]+)`", whole)
    return [line.strip() for block in fenced for line in block.splitlines()] + inline


def options_of_commands() -> dict[str, set[str]]:
    """Options of each command by its words, ``"serve"`` or ``"history list"``."""
    root, history = typer.main.get_command(command_line(completion=True)), typer.main.get_command(storage)
    commands = {**root.commands, **{f"history {name}": command for name, command in history.commands.items()}}
    found = {name: {flag for option in command.params for flag in option.opts} for name, command in commands.items()}
    return {**found, "": {flag for option in root.params for flag in option.opts}}


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text.stem)
def test_every_command_that_a_text_names_exists_with_its_options(text):
    known = options_of_commands()
    for line in code_of(text):
        for part in re.findall(r"(?:^|\| |-m )(?:headroom|engine)((?: [^|#]*)?)", line):
            words = part.split()
            name = " ".join(word for word in words[: 2 if words[:1] == ["history"] else 1] if not word.startswith("-"))
            assert name in known or name.startswith(("http", "…")), line
            flags = {word.partition("=")[0] for word in words if word.startswith("--")}
            assert flags <= known[name] | {"--help"}, line


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text.stem)
def test_every_make_target_that_a_text_names_exists(text):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {target for line in code_of(text) for target in re.findall(r"(?:^|\s)make ([a-z-]+)", line)}
    assert named <= targets


def test_every_variable_that_the_texts_name_is_read_somewhere():
    read = set(VARIABLE.findall(sources() + (ROOT / "Makefile").read_text(encoding="utf-8")))
    read |= {f"HEADROOM_{field.name.upper()}" for field in dataclasses.fields(ServerLimits)}
    for text in TEXTS:
        assert set(VARIABLE.findall(text.read_text(encoding="utf-8"))) <= read, text.name


def test_every_variable_that_the_code_reads_is_documented():
    documented = set(VARIABLE.findall("".join(text.read_text(encoding="utf-8") for text in TEXTS)))
    assert set(VARIABLE.findall(sources())) - OF_OUR_PROCESSES <= documented
