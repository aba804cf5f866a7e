"""The documentation site builds strictly, from the repository alone, and what the texts name exists."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.config import knob

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
ROOT_TEXTS = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture
def sources(tmp_path):
    shutil.copy(ROOT / "zensical.toml", tmp_path)
    shutil.copytree(DOCS, tmp_path / "docs")
    return tmp_path


def test_the_site_builds_strictly_and_asks_nothing_of_other_hosts(sources):
    done = build(sources)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {path.relative_to(sources / "site").with_suffix(".md") for path in (sources / "site").rglob("*.html")}
    assert {path.relative_to(DOCS) for path in DOCS.rglob("*.md")} <= pages
    loaded = re.compile(
        r'<(?:script|img|iframe|source)[^>]* src="(https?:)?//|<link[^>]* rel="(?:stylesheet|preconnect)"[^>]*//'
    )
    for page in (sources / "site").rglob("*.html"):
        assert not loaded.search(page.read_text(encoding="utf-8")), page


@pytest.mark.parametrize("broken", ["[x](nowhere.md)", "[x](plan.md#no-such-heading)", "[x][no-such-reference]"])
def test_a_broken_link_fails_the_build(sources, broken):
    with (sources / "docs" / "index.md").open("a", encoding="utf-8") as page:
        page.write(f"\n{broken}\n")
    assert build(sources).returncode != 0


def test_every_page_stands_in_the_navigation():
    navigation = re.findall(r'"([\w/-]+\.md)"', (ROOT / "zensical.toml").read_text(encoding="utf-8"))
    assert sorted(navigation) == sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))


def test_every_image_that_a_page_shows_exists():
    for page in (*DOCS.rglob("*.md"), ROOT / "README.md"):
        for target in re.findall(r"!\[[^\]]*\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).is_file(), f"{page.name}: {target}"


@pytest.mark.parametrize("name", ROOT_TEXTS)
def test_links_of_the_texts_at_the_root_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text(encoding="utf-8")):
        assert target.startswith("https://") or (ROOT / target).exists(), target


# Paths as the texts write them: `engine/…`, with braces or stars for several.
PATH = re.compile(r"`((?:engine|kernels|storage|pages|tests|docs)/[\w./*-]+)`")


def test_every_path_that_the_texts_name_exists():
    texts = [*DOCS.rglob("*.md"), *(ROOT / name for name in ROOT_TEXTS if name != "CHANGELOG.md")]
    missing = {
        f"{text.relative_to(ROOT)}: {path}"
        for text in texts
        for path in PATH.findall(text.read_text(encoding="utf-8"))
        if not any(ROOT.glob(path.rstrip("/")))
    }
    assert not missing


def test_the_example_of_an_extension_works():
    (block,) = re.findall(r"```python\n(.*?)```", (DOCS / "extending.md").read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(block, names)
    assert "echo" in knob("speculation").choices
    names["remove"]()
    assert "echo" not in knob("speculation").choices
