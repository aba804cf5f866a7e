"""`make check` leaves out by mark what takes long or needs more than Python; groups of tests stay together."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from tests import durations, marks

ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass
class FakeItem:
    nodeid: str
    fixturenames: tuple[str, ...] = ()
    found: tuple[pytest.MarkDecorator, ...] = ()

    def iter_markers(self):
        return iter([mark.mark for mark in self.found])

    def get_closest_marker(self, name):
        return next((mark for mark in self.iter_markers() if mark.name == name), None)


@pytest.mark.parametrize(("fixture", "mark"), marks.MARK_OF.items())
def test_a_test_that_uses_a_heavy_fixture_without_its_mark_is_a_mistake(fixture: str, mark: str):
    assert marks.mistake(FakeItem("a.py::test", (fixture,))) == f"a.py::test needs the mark {mark}."
    assert marks.mistake(FakeItem("a.py::test", (fixture,), (getattr(pytest.mark, mark),))) is None


def test_collection_ends_with_an_error_where_the_mark_of_the_default_model_is_forgotten(tmp_path: Path):
    forgetful = tmp_path / "test_forgetful.py"
    forgetful.write_text("def test_model(default_gguf):\n    pass\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "tests.conftest", "--collect-only"]
    command += ["-c", str(ROOT / "pyproject.toml"), str(forgetful)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "::test_model needs the mark model." in run.stdout + run.stderr
    assert run.returncode == pytest.ExitCode.USAGE_ERROR


def test_what_measures_servers_runs_in_one_process_and_the_tests_of_a_file_together():
    served = [f"tests/{room}/test_a.py::test[1]" for room in ("e2e", "server", "attack")]
    assert [marks.group(nodeid) for nodeid in served] == ["served"] * 3
    assert marks.group("tests/storage/test_a.py::test[x::y@z]") == "tests/storage/test_a.py"


def test_files_that_are_named_for_their_length_exist():
    assert [path for path in (*marks.LONG, *marks.REFERENCED, *marks.SERVED) if not (ROOT / path).exists()] == []


def test_long_groups_begin_first_in_parallel_and_commands_are_asked_for_last_in_one_process():
    beside = FakeItem("tests/gpu/a.py::test", (), (pytest.mark.beside("proof"),))
    served, plain = FakeItem("tests/server/test_a.py::test"), FakeItem("tests/storage/test_a.py::test")
    long = FakeItem(f"{marks.LONG[0]}::test")
    items = [plain, beside, long, served]
    assert sorted(items, key=lambda item: marks.rank(item, in_parallel=True)) == [served, beside, long, plain]
    assert sorted(items, key=lambda item: marks.rank(item, in_parallel=False)) == [plain, long, served, beside]


def test_processes_that_share_the_suite_are_handed_whole_groups():
    split = marks.group_scheduling()._split_scope
    assert split(None, "tests/storage/test_a.py::Some::test_b[c]") == "tests/storage/test_a.py"
    assert split(None, "tests/server/test_a.py::test") == split(None, "tests/e2e/test_b.py::test")


def test_the_table_of_the_slowest_adds_set_up_to_the_test():
    reports = [
        FakeReport("a.py::test_1", "setup", 2.0),
        FakeReport("a.py::test_1", "call", 1.5),
        FakeReport("b.py::test_2", "call", 3.0),
        FakeReport("b.py::test_3", "call", 0.5),
    ]
    assert durations.table(reports, rows=2).splitlines() == [
        "3 tests, 7 s in all.",
        "",
        "| seconds | test |",
        "|--:|---|",
        "| 3.50 | `a.py::test_1` |",
        "| 3.00 | `b.py::test_2` |",
    ]


def test_the_table_of_the_suite_is_not_overwritten_by_a_run_of_a_few_tests(tmp_path: Path):
    table = tmp_path / "artifacts" / "slowest.md"
    durations.write([FakeReport(f"a.py::test_{index}", "call", 1.0) for index in range(41)], table)
    durations.write([FakeReport("b.py::test", "call", 9.0)], table)
    assert table.read_text().startswith("41 tests, 41 s in all.")


@dataclasses.dataclass
class FakeReport:
    nodeid: str
    when: str
    duration: float
