"""An installed Headroom is whole: every file travels, every command works away from the source tree."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import sysconfig
import time
import zipfile
from pathlib import Path

import httpx
import psutil
import pytest

from engine import __version__
from engine.capacity import find_gpu, model_spec
from engine.capacity.advice.launch import launch_commands
from engine.capacity.memory.request import PlanRequest, complete
from engine.paths import headroom_home

pytestmark = pytest.mark.slow

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("installed")]  # one environment for all of them

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("app.py", ".streamlit/config.toml", "engine", "kernels", "storage", "pages")
LLAMA_70B = ("plan", "--model", "Llama-3.1-70B", "--gpu", "H100 SXM 80GB", "--context", "8192", "--tp", "4", "--json")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from this tree without the network: the build backend is among the requirements of development."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--quiet", "--wheel-dir", str(folder)], check=True, capture_output=True, timeout=120)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of commands of an environment that has the wheel and sees the libraries, but not the source tree."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    command = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--no-deps"]
    subprocess.run([*command, "--no-index", "--quiet", str(wheel)], check=True, capture_output=True, timeout=120)
    site = next(folder.glob("lib/python3*/site-packages"))
    (site / "libraries.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder / "bin"


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to be in that has rooms of the same names, which are not ours."""
    folder = tmp_path_factory.mktemp("elsewhere")
    for room in ("engine", "kernels", "storage", "pages"):
        (folder / room).mkdir()
        (folder / room / "__init__.py").write_text(f"raise SystemExit('the {room} of the current folder')\n")
    return folder


def environment(home: Path, **values: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HEADROOM_DB")}
    return {**inherited, "HEADROOM_HOME": str(home), **values}


def headroom(
    installed: Path, folder: Path, *arguments: str, home: Path | None = None
) -> subprocess.CompletedProcess[str]:
    command, settings = [str(installed / "headroom"), *arguments], environment(home or folder / "home")
    return subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True, check=False, timeout=300)


def test_wheel_has_every_file_of_the_rooms_and_nothing_else(wheel: Path):
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", "--", *ROOMS]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    expected = {name for name in names if name and (ROOT / name).is_file()}
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if not name.startswith(f"headroom-{__version__}.dist-info/")}
    assert packed == expected
    assert "kernels/cpu/native/native.cpp" in packed


def test_wheel_asks_for_what_the_requirements_pin(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"headroom-{__version__}.dist-info/METADATA").decode()
    wanted = {
        line.removeprefix("Requires-Dist: ") for line in metadata.splitlines() if line.startswith("Requires-Dist")
    }
    pins = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line[:1].isalpha()]
    assert {_name(line) for line in wanted} == {_name(line) for line in pins}
    assert all("==" in line for line in wanted)


def _name(requirement: str) -> str:
    return re.split(r"[=\[ ]", requirement)[0].lower().replace("_", "-")


def test_command_says_its_version(installed: Path, elsewhere: Path):
    done = headroom(installed, elsewhere, "--version")
    assert (done.returncode, done.stdout) == (0, f"headroom {__version__}\n"), done.stderr


def test_command_is_completed_by_the_shell(installed: Path, elsewhere: Path):
    command, shell = [str(installed / "headroom")], {"COMP_WORDS": "headroom re", "COMP_CWORD": "1"}
    settings = environment(elsewhere, _HEADROOM_COMPLETE="complete_bash", **shell)
    done = subprocess.run(command, env=settings, capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout.split() == ["reset-prefix-cache"], done.stderr


def test_plan_reads_its_catalog(installed: Path, elsewhere: Path):
    done = headroom(installed, elsewhere, *LLAMA_70B)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["fits"] is True
    assert document["parameters"]["total"] == 70_553_706_496


def test_plan_hands_out_a_command_that_is_one(installed: Path, elsewhere: Path):
    launches = launch_commands(complete(PlanRequest(model_spec("SmolLM2-135M"), find_gpu("L4 24GB"), context=2048)))
    program, command, *options = next(item.command for item in launches if item.engine == "Headroom").split()
    assert (program, command) == ("headroom", "serve")
    wrong = headroom(installed, elsewhere, command, *options, "--set", "nonsense=1")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "no knob named 'nonsense'" in wrong.stderr  # all that stands before it is understood


def test_run_is_measured_and_recorded(installed: Path, elsewhere: Path, tiny_llama: Path, tmp_path: Path):
    workload, database = tmp_path / "tiny.json", f"sqlite:///{tmp_path}/history.db"
    workload.write_text('{"name": "tiny", "num_requests": 2, "prompt_tokens": 12, "output_tokens": 4}')
    options = ("--workload", str(workload), "--record", database, "--label", "installed", "--json")
    # at home, where the C++ kernels of these sources have been built
    done = headroom(installed, elsewhere, "bench", "--model", str(tiny_llama), *options, home=headroom_home())
    assert done.returncode == 0, done.stderr
    provenance = json.loads(done.stdout)["provenance"]
    assert provenance["versions"]["headroom"] == __version__
    assert (provenance["code_revision"], provenance["code_dirty"]) == ("", None)  # not a checkout, and no other one's
    listed = headroom(installed, elsewhere, "history", "list", "--db", database, "--json")
    assert [row["label"] for row in json.loads(listed.stdout)] == ["installed"], listed.stderr
    assert "headroom history list [OPTIONS]" in headroom(installed, elsewhere, "history", "list", "--help").stdout


def test_dashboard_opens_and_starts_its_worker(installed: Path, elsewhere: Path, tmp_path: Path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [str(installed / "headroom"), "run", "--port", port, "--model", "./absent.gguf"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=elsewhere, env=environment(tmp_path), stdout=log, stderr=log)
    dashboard = psutil.Process(process.pid)
    try:
        answer = wait_for_page(process, f"http://127.0.0.1:{port}/", tmp_path / "log")
        assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]
        worker = next(child for child in dashboard.children() if "serve" in child.cmdline())
        assert Path(worker.cwd()) == next(installed.parent.glob("lib/python3*/site-packages"))
        assert "Welcome to Streamlit" not in (tmp_path / "log").read_text()  # our settings came along
    finally:
        family = [dashboard, *dashboard.children(recursive=True)]
        process.terminate()
        _, alive = psutil.wait_procs(family, timeout=15)
        for left in alive:
            left.kill()
    assert not alive


def wait_for_page(process: subprocess.Popen[bytes], url: str, log: Path) -> httpx.Response:
    end = time.monotonic() + 90
    while True:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        try:
            return httpx.get(url, timeout=30)
        except httpx.TransportError:
            time.sleep(0.1)
