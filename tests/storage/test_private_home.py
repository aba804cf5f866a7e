"""HEADROOM_HOME is this user's alone, whatever the umask; compiled code comes only from where nobody else writes."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.execution.base import TokenRange
from engine.execution.packages import find_shape, mark_complete, program_path
from engine.models.checksums import remembered_sha256
from engine.paths import private_dir
from engine.worker.supervisor import _log_folder
from kernels import trust
from kernels.cpu import build
from kernels.trust import why_not_trusted
from storage import open_store
from storage.spool import keep
from tests.storage.run_examples import make_run

COUNTERFEIT = b"not a library"


@pytest.fixture(params=[0o000, 0o022, 0o777])
def umask(request) -> Iterator[int]:
    """Umasks that take nothing, the usual, and everything."""
    previous = os.umask(request.param)
    yield request.param
    os.umask(previous)


def _modes(root: Path) -> dict[str, int]:
    return {str(path.relative_to(root.parent)): stat.S_IMODE(path.stat().st_mode) for path in [root, *root.rglob("*")]}


def test_everything_in_the_home_is_made_for_this_user_alone_whatever_the_umask(home, umask):
    store = open_store()
    store.save_run(make_run(1))
    keep(make_run(2))
    _log_folder()
    remembered_sha256(Path(__file__))
    modes = _modes(home)
    store.close()
    assert {"home/headroom.db", "home/headroom.db-wal", "home/unsaved", "home/logs", "home/cache"} <= set(modes)
    for name, mode in modes.items():
        assert mode == (0o700 if (home.parent / name).is_dir() else 0o600), name


def test_a_home_that_was_open_to_others_is_closed_and_folders_outside_stay_as_they_are(home, tmp_path):
    outside = tmp_path / "outside"
    for folder in (home, home / "unsaved", outside):
        folder.mkdir()
        folder.chmod(0o755)
    (home / "headroom.db").touch(mode=0o644)
    keep(make_run(1))
    open_store().close()
    open_store(f"sqlite:///{outside}/record.db").close()
    modes = _modes(home) | _modes(outside)
    assert (modes["home"], modes["home/unsaved"], modes["home/headroom.db"]) == (0o700, 0o700, 0o600)
    assert (modes["outside"], modes["outside/record.db"]) == (0o755, 0o600)


def test_a_record_that_may_only_be_read_stays_so(home):
    open_store().close()
    (home / "headroom.db").chmod(0o444)
    trust.private_file(home / "headroom.db")
    assert _modes(home)["home/headroom.db"] == 0o400


def test_what_others_share_is_never_tightened(tmp_path, monkeypatch):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    monkeypatch.setenv("HEADROOM_HOME", str(shared))
    private_dir(shared / "cache")
    assert (_modes(shared)["shared"], _modes(shared)["shared/cache"]) == (0o1777, 0o700)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    tmp_path.chmod(0o755)
    monkeypatch.setenv("HEADROOM_HOME", str(tmp_path))
    private_dir(tmp_path / "cache")
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755


def test_a_path_is_trusted_only_if_nobody_else_can_write_to_it_or_above_it(tmp_path):
    place = tmp_path / "a" / "b"
    place.mkdir(parents=True)
    file = place / "code.so"
    file.write_bytes(b"")
    assert why_not_trusted(file) is None
    for step, mode in ((file, 0o666), (file, 0o602), (place, 0o777), (place, 0o703), (place.parent, 0o777)):
        previous = step.stat().st_mode
        step.chmod(mode)
        assert str(step) in (why_not_trusted(file) or ""), (step, oct(mode))
        assert "chmod go-w" in (why_not_trusted(file) or "")
        step.chmod(previous)
    place.parent.chmod(0o1777)  # as /tmp: others cannot exchange what is in it
    assert why_not_trusted(file) is None
    place.chmod(0o1777)
    assert why_not_trusted(place) is not None  # but they can put something beside it


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_path_of_another_user_is_not_trusted(tmp_path):
    file = tmp_path / "code.so"
    file.write_bytes(b"")
    os.chown(file, 12345, -1)
    assert "belongs to another user (id 12345)" in (why_not_trusted(file) or "")
    os.chown(file, 0, -1)
    os.chown(tmp_path, 12345, -1)
    assert str(tmp_path) in (why_not_trusted(file) or "")


def test_a_link_is_judged_by_where_it_leads(tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    target.chmod(0o777)
    (tmp_path / "link").symlink_to(target)
    assert str(target) in (why_not_trusted(tmp_path / "link") or "")


def test_a_private_group_may_write_and_a_shared_one_not(tmp_path, monkeypatch):
    tmp_path.chmod(0o770)
    os.chown(tmp_path, -1, os.getegid())
    user = trust.pwd.getpwuid(os.geteuid()).pw_name

    def group(members, name=user):
        return lambda _gid: trust.grp.struct_group((name, "x", os.getegid(), members))

    monkeypatch.setattr(trust.grp, "getgrgid", group([user]))
    assert why_not_trusted(tmp_path) is None
    monkeypatch.setattr(trust.grp, "getgrgid", group([user, "another"]))
    assert why_not_trusted(tmp_path) is not None
    monkeypatch.setattr(trust.grp, "getgrgid", group([], "users"))
    assert why_not_trusted(tmp_path) is not None


def test_kernels_that_somebody_else_could_have_written_are_built_again(home, monkeypatch):
    built = []

    def compile_instead(command):
        built.append(command)
        Path(command[command.index("-o") + 1]).write_bytes(b"a library")

    monkeypatch.setattr(build, "_run", compile_instead)
    target = build._built()
    assert (stat.S_IMODE(target.stat().st_mode), len(built)) == (0o600, 2)
    assert build._built() == target
    assert len(built) == 2
    target.write_bytes(COUNTERFEIT)
    target.chmod(0o666)
    assert build._built().read_bytes() == b"a library"


def test_kernels_below_a_folder_that_others_can_write_to_are_refused_in_a_sentence(home, tmp_path):
    tmp_path.chmod(0o777)
    try:
        with pytest.raises(build.NativeBuildError) as caught:
            build._built()
    finally:
        tmp_path.chmod(0o700)
    assert str(tmp_path) in str(caught.value)
    assert "chmod go-w" in str(caught.value)


def test_a_compiled_program_that_somebody_else_could_have_written_counts_as_missing(tmp_path):
    tokens = TokenRange(1, 1)
    program = program_path(tmp_path, tokens, 0)
    program.write_bytes(COUNTERFEIT)
    mark_complete(tmp_path, tokens)
    assert find_shape(tmp_path, 1, 1) is not None
    program.chmod(0o666)
    assert find_shape(tmp_path, 1, 1) is None
