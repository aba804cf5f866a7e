"""The command line keeps its contract: results on standard output alone, errors that say what to do, exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.cli import console
from tests.cli.conftest import GENERATE_KEYS, REPOSITORY, Run, in_subprocess


@pytest.mark.slow
def test_json_is_all_there_is_on_standard_output(tiny_llama: Path):
    arguments = ("generate", "--model", tiny_llama, "--prompt", "hello", "--max-tokens", 6, "--greedy", "--json")
    done = in_subprocess("-m", "engine", *arguments, "--dtype", "float32", "--set", "speculation=ngram")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document.keys() == GENERATE_KEYS
    assert document["metrics"].keys() == {"ttft_ms", "tpot_ms", "output_tokens_s"}
    assert all(value > 0 for value in document["metrics"].values())
    assert document["prompt_token_ids"] == [ord(letter) - 33 for letter in "hello"]  # one token a byte
    assert len(document["token_ids"]) == 6
    assert document["finish_reason"] == "length"
    assert document["config"]["speculation"] == "ngram"
    assert document["path"]["dtype"] == "float32"
    assert document["path"]["attention"].startswith(("native", "sdpa"))


def test_what_libraries_and_children_print_does_not_reach_standard_output(capfd: pytest.CaptureFixture[str]):
    with console.standard_output() as out:
        print("from Python")
        os.write(1, b"from C\n")
        subprocess.run(["echo", "from a child"], check=True)
        console.write_json(out, {"result": "é"})
    print("afterwards")
    captured = capfd.readouterr()
    assert captured.out == '{"result": "\\u00e9"}\nafterwards\n'
    assert all(f"from {who}" in captured.err for who in ("Python", "C", "a child"))


def test_help_and_mistakes_need_no_torch():
    check = (
        "import sys; from engine.cli.app import main; code = main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    assert in_subprocess("-c", check, "generate", "--help").returncode == 0
    done = in_subprocess("-c", check, "generate", "--prompt", "x", "--set", "batchin=static", "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["field"] == "batchin"


@pytest.mark.slow
def test_reader_that_leaves_early_causes_no_traceback(tiny_llama: Path):
    command = f'"{sys.executable}" -m engine generate --model "{tiny_llama}" --prompt a --max-tokens 300 --ignore-eos'
    done = subprocess.run(
        ["bash", "-c", f"{command} | head -c 1"], cwd=REPOSITORY, capture_output=True, check=False, timeout=300
    )
    assert b"Traceback" not in done.stderr
    assert len(done.stdout) == 1


def test_prompt_must_be_given_once(error_of: Callable[..., dict[str, Any]], tmp_path: Path):
    assert error_of("generate")["field"] == "prompt"
    assert error_of("generate", "--prompt", "a", "--prompt-file", tmp_path / "b")["field"] == "prompt"


def test_prompt_file_that_cannot_be_used(error_of: Callable[..., dict[str, Any]], tmp_path: Path):
    latin = tmp_path / "latin.txt"
    latin.write_bytes("café".encode("latin-1"))
    for path, reason in ((tmp_path / "absent", "No such file"), (tmp_path, "directory"), (latin, "not UTF-8")):
        error = error_of("generate", "--prompt-file", path)
        assert error["field"] == "prompt_file"
        assert reason in error["message"]
        assert str(path) in error["message"]


@pytest.mark.parametrize(
    ("setting", "field"),
    [
        ("batchin=static", "batchin"),
        ("batching=sometimes", "batching"),
        ("token_budget=0", "token_budget"),
        ("token_budget=99999999", "token_budget"),
        ("max_running=-1", "max_running"),
        ("memory_limit_gib=nan", "memory_limit_gib"),
    ],
)
def test_knobs_are_checked(run: Run, error_of: Callable[..., dict[str, Any]], setting: str, field: str):
    assert error_of("generate", "--prompt", "x", "--set", setting)["field"] == field
    assert error_of("bench", "--workload", "quick", "--set", setting)["field"] == field
    code, out, err = run("serve", "--set", setting)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {field}: ")


def test_model_and_dtype_may_not_contradict_set(error_of: Callable[..., dict[str, Any]]):
    error = error_of("generate", "--prompt", "x", "--dtype", "float32", "--set", "dtype=bfloat16")
    assert error["field"] == "dtype"


def test_unknown_model(error_of: Callable[..., dict[str, Any]], tmp_path: Path):
    for command in (("generate", "--prompt", "x"), ("bench", "--workload", "quick")):
        error = error_of(*command, "--model", tmp_path / "nowhere")
        assert error["field"] == "model"
        assert "nowhere" in error["message"]
    assert error_of("fetch", "no-such-model")["field"] == "model"


def test_what_does_not_fit_the_context(error_of: Callable[..., dict[str, Any]], tiny_llama: Path):
    command = ("generate", "--model", tiny_llama)
    assert error_of(*command, "--prompt", "x" * 600)["field"] == "prompt"
    error = error_of(*command, "--prompt", "x" * 500, "--max-tokens", 100)
    assert error["field"] == "max_tokens"
    assert "12" in error["remedy"]
    assert error_of(*command, "--prompt", "x", "--set", "memory_limit_gib=0.001")["field"] == "memory_limit_gib"


def test_sampling_options_are_checked(error_of: Callable[..., dict[str, Any]]):
    for option, value in (("--temperature", -1), ("--top-p", 2), ("--min-p", -0.5), ("--max-tokens", 0)):
        assert error_of("generate", "--prompt", "x", option, value)["field"] == option[2:].replace("-", "_")
    assert error_of("generate", "--prompt", "x", "--greedy", "--top-k", 4)["field"] == "top_k"


def test_command_lines_that_cannot_be_parsed(error_of: Callable[..., dict[str, Any]]):
    assert error_of("bench")["field"] == "workload"
    assert error_of("generate", "--prompt", "x", "--max-tokens", "many")["field"] == "max_tokens"
    assert error_of("generate", "--prompts", "x")["field"] == "--prompts"
    assert "nosuch" in error_of("nosuch")["message"]


def test_unknown_workload(error_of: Callable[..., dict[str, Any]], tmp_path: Path):
    assert "quick" in error_of("bench", "--workload", "quik")["remedy"]
    broken = tmp_path / "broken.json"
    broken.write_text('{"num_requests": ')
    assert error_of("bench", "--workload", broken)["field"] == "workload"


def test_bug_is_told_from_wrong_input(run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    def broken(config: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("engine.cli.generate.load_engine", broken)
    code, out, _ = run("generate", "--prompt", "x", "--json")
    assert code == 1
    assert json.loads(out)["error"]["message"] == "RuntimeError: a bug"
    assert "Traceback" in caplog.text, "the remedy points to it"
