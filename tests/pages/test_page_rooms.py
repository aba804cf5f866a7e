"""The rooms of the dashboard: a page's folder is its own, and what two pages use is in ``pages/shared``."""

from __future__ import annotations

import ast
import doctest
import importlib
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest
from streamlit.util import calc_hash

from pages.shared import links
from storage import Store
from tests.pages.engine_fakes import PAGES, fake_run

FOLDERS = ("plan", "live", "compare", "history")
SOURCES = sorted(PAGES.rglob("*.py"))
#: Where the files at the top of ``pages/`` are: the frame and the services, which every page uses.
FRAME = "frame"


def imported(path: Path) -> set[str]:
    """The modules of the dashboard that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    return {name for name in found if name.startswith("pages.")}


def room(path: Path) -> str:
    """The page that a file belongs to, ``shared``, ``background``, or the frame for what lies at the top."""
    parts = path.relative_to(PAGES).parts
    return parts[0] if len(parts) > 1 else FRAME


def users_of(module: str) -> set[str]:
    """The rooms that use a module, also by way of other modules of ``shared``."""
    rooms, seen, waiting = set(), set(), [module]
    while waiting:
        name = waiting.pop()
        for path in SOURCES:
            if name in imported(path) and path not in seen:
                seen.add(path)
                if room(path) == "shared":
                    waiting.append(f"pages.shared.{path.stem}")
                else:
                    rooms.add(room(path))
    return rooms


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_page_imports_the_folder_of_another(folder):
    others = tuple(f"pages.{other}" for other in FOLDERS if other != folder)
    found = {path.name: imported(path) for path in (PAGES / folder).glob("*.py")}
    assert len(found) > 5
    strangers = {name: [module for module in modules if module.startswith(others)] for name, modules in found.items()}
    assert not any(strangers.values()), strangers


def test_nothing_that_all_pages_share_imports_a_page():
    pages = tuple(f"pages.{folder}" for folder in FOLDERS)
    common = [path for path in SOURCES if room(path) not in FOLDERS]
    assert {(path.name, module) for path in common for module in imported(path) if module.startswith(pages)} == set()


def test_what_is_shared_is_used_by_two_pages_or_by_the_frame_of_all():
    users = {path.stem: users_of(f"pages.shared.{path.stem}") for path in (PAGES / "shared").glob("[a-z]*.py")}
    assert {name: rooms for name, rooms in users.items() if len(rooms) < 2 and FRAME not in rooms} == {}


@pytest.mark.parametrize("entry", links.PAGES, ids=lambda entry: entry.title)
def test_every_page_has_its_file_and_its_address(entry):
    assert (PAGES / entry.file).is_file()
    assert entry.file == f"{entry.url_path}/page.py"


def opened(url_path: str) -> AppTest:
    """A page in its frame, as its address opens it."""
    frame = AppTest.from_file(str(PAGES / "frame.py"), default_timeout=60)
    frame._page_hash = calc_hash(url_path)  # AppTest itself names a page by its file only
    return frame.run()


def linked(frame: AppTest) -> set[tuple[str, str]]:
    return {(item.proto.label, item.proto.page) for item in frame.get("page_link")}


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADROOM_HOME", str(tmp_path))
    monkeypatch.delenv("HEADROOM_DB", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("url_path", "shown"),
    [
        ("plan", "I want to serve"),
        ("live", "**Changes**"),
        ("compare", "**Nothing compared yet**"),
        ("history", "Every measured run is kept here"),
        ("", "I want to serve"),
    ],
)
def test_every_address_opens_its_page(services, home, url_path, shown):
    page = opened(url_path)
    assert not page.exception
    assert any(shown in item.value for item in page.markdown)


def test_an_empty_history_leads_to_the_pages_that_fill_it(services, home):
    assert linked(opened("history")) == {("Open Live", "live"), ("Open Compare", "compare")}


def test_a_comparison_leads_to_its_runs_in_history(services, store: Store, home):
    for arm in "AB":
        store.save_run(fake_run(f"{arm}0", arm=arm, repeat=0, comparison_id="c1"))
    page = opened("compare")
    assert linked(page) == {("Open in History", "history")}
    assert page.get("page_link")[0].proto.query_string == "comparison=c1"


def modules_with_examples() -> list[str]:
    root = PAGES.parent
    sources = [*SOURCES, *(root / "storage").glob("*.py")]
    return [
        ".".join(path.relative_to(root).with_suffix("").parts)
        for path in sources
        if ">>>" in path.read_text() and path.name != "page.py"  # a page draws itself when it is imported
    ]


@pytest.mark.parametrize("module", modules_with_examples())
def test_the_examples_in_the_docstrings_hold(module):
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted > 0
    assert result.failed == 0
