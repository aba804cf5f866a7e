"""The list of functions that wait for a feature is true, and nothing else lies unused."""

from __future__ import annotations

import re

import pytest

from kernels import waiting
from tests.uncalled import ROOT, Source, reached, uncalled

#: Called by name from `python -m kernels.aot` and `python -m kernels.tune`.
_CALLED_BY_NAME = ("aot_variants", "tuning_problems")
#: What an extension calls.
FOR_EXTENSIONS = ("register_", "add_choice")
#: Public on purpose, though no product code calls them.
ON_PURPOSE = {
    # prepare and apply in one go, for who has an engine and no loop
    ("engine.reconfigure", "reconfigure"),
    # seams: tests put something in their place
    ("engine.device", "using"),
    ("kernels.tuning", "forget"),
}
#: Published formulas for show, next to those that the planner computes with.
PUBLISHED = "engine.capacity.speed.speculation"
LISTED = {(row.module, name) for row in waiting.WAITING for name in row.names}


@pytest.fixture(scope="module")
def source() -> Source:
    return Source()


@pytest.fixture(scope="module")
def unused(source: Source) -> set[tuple[str, str]]:
    """What neither product code nor its tools call, nor the reference of anything that they call."""
    tools = {key for key in source.defined if key[1] in _CALLED_BY_NAME}
    called = reached(source, tools)
    references = {
        (module, name)
        for module, name in source.defined
        for stem in [name.removesuffix("_reference")]
        if stem != name and {(module, f"{stem}_triton"), (module, stem)} & called
    }
    return uncalled(source, ("kernels", "engine"), tools | references)


def test_every_listed_function_exists_and_nothing_calls_it(source: Source, unused: set[tuple[str, str]]):
    assert sorted(LISTED - source.defined.keys()) == []
    assert sorted(LISTED - unused) == []


def test_no_other_public_function_of_the_engine_or_the_kernels_lies_unused(unused: set[tuple[str, str]]):
    left = {key for key in unused - LISTED - ON_PURPOSE if key[0] != PUBLISHED}
    assert sorted(key for key in left if not key[1].startswith(FOR_EXTENSIONS)) == []


def test_the_readme_lists_what_waits_with_the_feature_that_will_call_it():
    text = (ROOT / "kernels" / "README.md").read_text("utf-8")
    section = text.partition("## Waiting for a caller")[2].partition("\n## ")[0]
    listed = {tuple(cell.strip() for cell in row.split("|")[1:-1]) for row in re.findall(r"^\| `.*", section, re.M)}
    assert listed == {
        (f"`{row.module}`", ", ".join(f"`{name}`" for name in row.names), row.feature) for row in waiting.WAITING
    }


def test_a_function_that_only_an_unused_function_calls_is_found(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "one.py").write_text(
        "from kernels import two\n"
        "def used(): return Kind().method()\n"
        "class Kind:\n    def method(self): return two.helper()\n    def idle(self): return lost()\n"
        "def lost(): return 1\n"
        "def first(): return second()\n"
        "def second(): return 1\n"
        "@app.get('/x')\ndef route(): return used()\n"
    )
    (tmp_path / "kernels" / "two.py").write_text("def helper(): return 1\n")
    found = {name for _, name in uncalled(Source(tmp_path), ("kernels",))}
    assert found == {"lost", "first", "second"}
