"""The command line keeps its contract: results on standard output alone, errors that say what to do, exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from engine.cli import app as cli
from engine.cli import console
from engine.config import DEFAULT_MODEL
from engine.measure.metrics import METRICS
from engine.server.limits import ServerLimits
from tests.server.conftest import TOKEN

REPOSITORY = Path(__file__).resolve().parents[2]
GENERATE_KEYS = {"text", "token_ids", "prompt_token_ids", "finish_reason", "config", "path", "metrics"}
WORKLOAD = {"name": "tiny", "num_requests": 3, "prompt_tokens": 12, "output_tokens": 5, "warmup_requests": 1}

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process: its exit code, standard output and standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        return code, *capfd.readouterr()

    return call


@pytest.fixture
def error_of(run: Run) -> Callable[..., dict[str, Any]]:
    """Run a command that must refuse its input, both ways: the JSON error, after checking the line for people."""

    def call(*arguments: object) -> dict[str, Any]:
        code, out, err = run(*arguments)
        assert code == 2
        assert out == ""
        assert "Traceback" not in err
        line = err.strip().splitlines()[-1]
        code, out, err = run(*arguments, "--json")
        assert code == 2
        document = json.loads(out)
        assert document.keys() == {"error"}
        error = document["error"]
        assert error.keys() == {"message", "field", "remedy"}
        assert line.startswith("error: ")
        assert error["message"] in line
        assert error["remedy"] in line
        assert "Traceback" not in err
        return error

    return call


def in_subprocess(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False, timeout=300, **options)


@pytest.fixture
def workload_file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny-workload.json"
    path.write_text(json.dumps(WORKLOAD))
    return path


# -- what is on which stream -----------------------------------------------------------------------------------


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


# -- generate --------------------------------------------------------------------------------------------------


def generate(run: Run, model: Path, *arguments: object) -> dict[str, Any]:
    code, out, err = run("generate", "--model", model, "--dtype", "float32", "--json", *arguments)
    assert code == 0, err
    document = json.loads(out)
    assert document.keys() == GENERATE_KEYS
    return document


def test_greedy_tokens_are_those_of_transformers(run: Run, tiny_llama: Path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prompt = "Paged attention"
    document = generate(run, tiny_llama, "--prompt", prompt, "--max-tokens", 24)
    tokenizer = AutoTokenizer.from_pretrained(str(tiny_llama))
    model = AutoModelForCausalLM.from_pretrained(str(tiny_llama), dtype=torch.float32)
    inputs = tokenizer(prompt, return_tensors="pt")
    expected = model.generate(
        inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=24, do_sample=False
    )
    assert document["prompt_token_ids"] == inputs.input_ids[0].tolist()
    assert document["token_ids"] == expected[0, inputs.input_ids.shape[1] :].tolist()


def test_text_is_streamed_as_it_is_in_the_document(run: Run, tiny_llama: Path, tmp_path: Path):
    file = tmp_path / "prompt.txt"
    file.write_text("a prompt\n", encoding="utf-8")
    common = ("--prompt-file", file, "--max-tokens", 20, "--ignore-eos")
    document = generate(run, tiny_llama, *common)
    assert document["prompt_token_ids"] == generate(run, tiny_llama, "--prompt", "a prompt\n")["prompt_token_ids"]
    code, out, err = run("generate", "--model", tiny_llama, "--dtype", "float32", *common)
    assert code == 0
    assert out == document["text"] + "\n"
    assert "20 tokens (length)" in err
    assert "tokens/s" in err


def test_sampling_is_off_unless_asked_for_and_repeats_with_its_seed(run: Run, tiny_llama: Path):
    def tokens(*arguments: object) -> list[int]:
        return generate(run, tiny_llama, "--prompt", "hello", "--max-tokens", 16, "--ignore-eos", *arguments)[
            "token_ids"
        ]

    greedy = tokens("--greedy")
    assert tokens() == tokens("--seed", 5) == greedy
    hot = ("--temperature", 3, "--seed")
    assert tokens(*hot, 5) == tokens(*hot, 5)
    assert tokens(*hot, 5) != tokens(*hot, 6)
    assert tokens("--top-p", 0.9999, "--seed", 5) == tokens("--top-p", 0.9999, "--temperature", 1, "--seed", 5)
    assert tokens("--top-k", 1, "--seed", 5) == greedy
    assert tokens("--repetition-penalty", 50) != greedy


def test_chat_fills_the_template_in(run: Run, tiny_llama: Path):
    plain = generate(run, tiny_llama, "--prompt", "user: hi\nassistant: ", "--max-tokens", 1)
    chat = generate(run, tiny_llama, "--prompt", "hi", "--chat", "--max-tokens", 1)
    assert chat["prompt_token_ids"] == plain["prompt_token_ids"]
    assert chat["metrics"]["tpot_ms"] is None  # one token has no time per further token


def test_stop_string_ends_the_text(run: Run, tiny_llama: Path):
    whole = generate(run, tiny_llama, "--prompt", "hello", "--max-tokens", 60, "--ignore-eos")["text"]
    stop = next(letter for letter in whole[3:] if letter.isascii() and letter.isprintable())
    document = generate(run, tiny_llama, "--prompt", "hello", "--max-tokens", 60, "--ignore-eos", "--stop", stop)
    assert document["finish_reason"] == "stop"
    assert document["text"] == whole[: whole.index(stop)]


def test_default_length_shrinks_to_the_context(run: Run, tiny_llama: Path):
    document = generate(run, tiny_llama, "--prompt", "x" * 500, "--ignore-eos")
    assert len(document["token_ids"]) == 12
    assert document["finish_reason"] == "length"


@pytest.mark.model
def test_default_model_generates(run: Run):
    code, out, _ = run(
        "generate", "--prompt", "The capital of France is", "--max-tokens", 8, "--dtype", "float32", "--json"
    )
    assert code == 0
    document = json.loads(out)
    assert "Paris" in document["text"]
    assert document["config"]["model"] == DEFAULT_MODEL


# -- wrong input -----------------------------------------------------------------------------------------------


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


def test_bug_is_told_from_wrong_input(run: Run, monkeypatch: pytest.MonkeyPatch):
    def broken(config: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("engine.cli.generate.load_engine", broken)
    code, out, err = run("generate", "--prompt", "x", "--json")
    assert code == 1
    assert json.loads(out)["error"]["message"] == "RuntimeError: a bug"
    assert "Traceback" in err


# -- serve, fetch ----------------------------------------------------------------------------------------------


def test_serve_hands_its_options_on_and_takes_the_token_from_the_environment(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    calls: list[tuple[Any, dict[str, Any]]] = []
    module = ModuleType("engine.server.run")
    module.serve = lambda config, **options: calls.append((config, options))  # type: ignore[attr-defined]
    module.door_settings = lambda host, **options: (host, options)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "engine.server.run", module)
    monkeypatch.setenv("HEADROOM_ADMIN_TOKEN", "secret")
    ready = tmp_path / "ready.json"
    options = ("--port", 0, "--parent-pid", 77, "--ready-file", ready, "--set", "max_running=8")
    options += ("--max-choices", 7, "--allowed-host", "gpu.lab")
    assert run("serve", "--model", "some.gguf", *options)[0] == 0
    config, given = calls[0]
    assert (config.model, config.max_running) == ("some.gguf", 8)
    assert given == {
        "host": "127.0.0.1",
        "port": 0,
        "admin_token": "secret",
        "parent_pid": 77,
        "ready_file": ready,
        "limits": ServerLimits(max_choices=7),
        "door": ("127.0.0.1", {"hosts": ["gpu.lab"], "api_key": None, "cors_origins": (), "served_names": ()}),
    }
    monkeypatch.setenv("HEADROOM_ADMIN_TOKEN", "")
    run("serve")
    assert calls[1][1]["admin_token"] is None


def test_fetch_names_the_file_and_its_checksum(run: Run, tiny_llama: Path):
    code, out, _ = run("fetch", tiny_llama, "--json")
    document = json.loads(out)
    assert code == 0
    assert document.keys() == {"model", "path", "source", "sha256"}
    assert (document["path"], document["source"], len(document["sha256"])) == (str(tiny_llama), "safetensors", 64)


@pytest.mark.model
def test_fetch_is_quick_once_the_model_is_there(run: Run, default_gguf: Path):
    began = time.monotonic()
    code, out, _ = run("fetch", DEFAULT_MODEL, "--json")
    assert code == 0
    assert time.monotonic() - began < 10
    assert json.loads(out)["path"] == str(default_gguf)


# -- plan ------------------------------------------------------------------------------------------------------

LLAMA_70B = ("plan", "--model", "Llama-3.1-70B", "--gpu", "H100 SXM 80GB", "--context", 8192)


def test_plan_of_llama_70b_on_h100(run: Run):
    code, out, _ = run(*LLAMA_70B, "--tp", 4, "--json")
    assert code == 0
    document = json.loads(out)
    assert {"parameters", "memory", "limits", "fits", "warnings", "assumptions"} <= document.keys()
    assert document["parameters"].keys() == {"total", "active", "by_part"}
    assert document["parameters"]["total"] == 70_553_706_496  # the model card's 70.6 B
    wanted = "weights_gib activation_gib non_torch_gib kv_gib kv_bytes_per_token kv_tokens kv_blocks"
    assert set(wanted.split()) <= document["memory"].keys()
    assert document["memory"]["kv_bytes_per_token"] == 2 * 80 * 8 * 128 * 2 // 4
    assert document["fits"] is True
    assert document["limits"]["max_concurrency"] == document["memory"]["kv_tokens"] // 8192
    assert document["what_would_fit"] == []


def test_plan_that_does_not_fit_says_by_how_much_and_what_would(run: Run):
    code, out, _ = run(*LLAMA_70B, "--json")
    assert code == 0
    document = json.loads(out)
    assert document["fits"] is False
    assert document["memory"]["shortfall_gib"] > 50
    changes = [remedy["changes"] for remedy in document["what_would_fit"]]
    assert any("tp" in change for change in changes)
    code, out, _ = run(*LLAMA_70B)
    assert code == 0
    assert "does not fit" in out
    assert "would fit: " in out


def test_plan_takes_a_configuration_file_and_every_option(run: Run, tiny_llama: Path):
    options = ["--gpu-memory-gib", 2, "--tp", 2, "--pp", 2, "--dtype", "float32", "--weights", "int8"]
    options += ["--kv-dtype", "fp8", "--context", 256, "--max-num-seqs", 4, "--gpu-memory-utilization", 0.5]
    options += ["--profile", "headroom", "--concurrency", 3, "--json"]
    for model in (tiny_llama, tiny_llama / "config.json"):
        code, out, err = run("plan", "--model", model, *options)
        assert code == 0, err
        request = json.loads(out)["request"]
        expected = {"tp": 2, "pp": 2, "context": 256, "concurrency": 3, "max_num_seqs": 4, "utilization": 0.5}
        assert request.items() >= {**expected, "profile": "headroom", "dtype": "float32"}.items()


def test_plan_prints_every_part_of_its_contract(run: Run):
    lengths = ("--input-tokens", 3000, "--output-tokens", 1000)
    code, out, _ = run(*LLAMA_70B[:-2], "--tp", 4, *lengths, "--rate", 2, "--slo-ttft-ms", 500, "--json")
    assert code == 0
    document = json.loads(out)
    assert document["request"]["context"] == 4000
    assert {"ttft_ms", "tpot_ms", "decode_step_ms", "output_tokens_s"} <= document["latency"].keys()
    assert document["latency"]["output_tokens_s"] == pytest.approx(2000, rel=0.01)
    assert document["latency"]["ttft_p95_ms"] > document["latency"]["ttft_ms"] > 0
    assert document["cost"]["per_hour"] == 4 * document["cost"]["price_per_gpu_hour"]
    assert {"max_concurrency", "max_context"} <= document["limits"].keys()
    assert document["slo"]["ttft_ms"] == pytest.approx(500)
    assert document["launch"]["vLLM"].startswith("vllm serve")


def test_plan_without_a_known_speed_gives_memory_and_says_what_is_missing(run: Run):
    code, out, _ = run("plan", "--model", "Llama-3.1-8B", "--gpu-memory-gib", 40, "--context", 4096, "--json")
    assert code == 0
    document = json.loads(out)
    assert document["fits"] is True
    assert document["latency"]["ttft_ms"] is None
    assert any("not known" in warning for warning in document["warnings"])


def test_plan_above_what_can_be_served_does_not_fit_and_still_prints_json(run: Run):
    lengths = ("--input-tokens", 1000, "--output-tokens", 200, "--rate", 100_000)
    code, out, _ = run("plan", "--model", "Llama-3.1-8B", "--gpu", "L4 24GB", *lengths, "--json")
    assert code == 0
    document = json.loads(out)
    assert document["fits"] is False
    assert document["latency"]["ttft_ms"] is None


@pytest.mark.parametrize("form", ["markdown", "yaml", "table"])
def test_plan_is_printed_as_a_document(run: Run, form: str):
    code, out, _ = run(*LLAMA_70B, "--tp", 8, "--format", form)
    assert code == 0
    assert "Llama-3.1-70B" in out


def test_plan_refuses_nonsense(error_of: Callable[..., dict[str, Any]], tmp_path: Path):
    assert error_of(*LLAMA_70B, "--tp", 3)["field"] == "tp"
    assert error_of(*LLAMA_70B, "--context", -1)["field"] == "context"
    assert error_of("plan", "--model", "Llama-3.1-8B")["field"] == "gpu"
    assert error_of("plan", "--model", "Llama-3.1-8B", "--gpu", "abacus")["field"] == "gpu"
    assert error_of("plan", "--model", "Lama-9", "--gpu", "H100 SXM 80GB")["field"] == "model"
    assert error_of(*LLAMA_70B, "--tp", 4, "--concurrency", 1, "--rate", 1)["field"] == "rate"
    assert error_of(*LLAMA_70B, "--tp", 4, "--slo-ttft-ms", -1)["field"] == "slo_ttft_ms"
    assert error_of(*LLAMA_70B, "--tp", 4, "--ep", 4)["field"] == "ep"
    assert error_of(*LLAMA_70B, "--tp", 4, "--draft", "Qwen3-0.6B")["field"] == "draft"
    assert error_of(*LLAMA_70B, "--tp", 4, "--input-tokens", 9000)["field"] == "context"
    broken = tmp_path / "config.json"
    for content in ('{"model_type": ', "[1]", '{"model_type": "llama"}', "[" * 100_000):
        broken.write_text(content)
        error_of("plan", "--model", broken, "--gpu", "H100 SXM 80GB")
    assert error_of("plan", "--model", tmp_path / "absent.json", "--gpu", "H100 SXM 80GB")["field"] == "model"


# -- bench -----------------------------------------------------------------------------------------------------


def test_bench_measures_and_records(run: Run, tiny_llama: Path, workload_file: Path, tmp_path: Path):
    database = f"sqlite:///{tmp_path}/history.db"
    command = ("bench", "--model", tiny_llama, "--workload", workload_file, "--seed", 3, "--label", "a label")
    code, out, err = run(*command, "--set", "batching=static", "--record", database, "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document["status"] == "completed"
    assert (
        {"output_tokens_s", "ttft_ms_p50", "tpot_ms_mean", "itl_ms_p99"} <= document["metrics"].keys() <= METRICS.keys()
    )
    assert document["metrics"]["output_tokens"] == 15
    assert len(document["requests"]) == 3
    provenance = document["provenance"]
    assert (provenance["seed"], provenance["config"]["batching"]) == (3, "static")
    listed = in_subprocess("-m", "storage", "list", "--db", database, "--json")
    rows = json.loads(listed.stdout)
    assert [(row["run_id"], row["label"], row["status"]) for row in rows] == [
        (document["run_id"], "a label", "completed")
    ]


def test_bench_shows_a_table_with_units(run: Run, tiny_llama: Path, workload_file: Path):
    code, out, _ = run("bench", "--model", tiny_llama, "--workload", workload_file)
    assert code == 0
    line = next(line for line in out.splitlines() if line.startswith(METRICS["output_tokens_s"].label))
    assert line.split()[-1] == "tokens/s"
    assert float(line.split()[-2].replace(",", "")) > 0
    assert "tiny on" in out.splitlines()[0]


def test_run_that_cannot_be_recorded_is_kept(
    run: Run, tiny_llama: Path, workload_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HEADROOM_HOME", str(tmp_path / "home"))
    blocked = tmp_path / "a-file"
    blocked.write_text("not a folder")
    command = ("bench", "--model", tiny_llama, "--workload", workload_file, "--json")
    code, out, err = run(*command, "--record", f"sqlite:///{blocked}/history.db")
    assert code == 1
    document = json.loads(out)
    kept = tmp_path / "home" / "unsaved" / f"headroom-run-{document['run_id']}.json"
    assert json.loads(kept.read_text()) == document
    assert list(folder.iterdir()) == []  # the current folder may be anybody's
    assert str(kept) in err
    assert "could not be put on record" in err
    recorded = in_subprocess(
        "-m", "storage", "record", "--db", f"sqlite:///{tmp_path}/other.db", input=kept.read_text()
    )
    assert recorded.returncode == 0, recorded.stderr


def test_interrupted_run_is_still_printed_and_recorded(run: Run, tiny_llama: Path, tmp_path: Path):
    endless = tmp_path / "endless.json"
    endless.write_text(json.dumps({**WORKLOAD, "num_requests": 500, "output_tokens": 400}))
    before = signal.getsignal(signal.SIGINT)

    def interrupt() -> None:
        while signal.getsignal(signal.SIGINT) is before:  # until the run has taken it over
            time.sleep(0.01)
        time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    database = f"sqlite:///{tmp_path}/history.db"
    code, out, _ = run("bench", "--model", tiny_llama, "--workload", endless, "--record", database, "--json")
    thread.join()
    assert code == 130
    document = json.loads(out)
    assert document["status"] == "cancelled"
    assert len(document["requests"]) == 500
    assert signal.getsignal(signal.SIGINT) is before
    listed = in_subprocess("-m", "storage", "list", "--db", database, "--json")
    assert [row["status"] for row in json.loads(listed.stdout)] == ["cancelled"]


def test_prefix_cache_of_a_running_worker_is_reset_from_the_command_line(
    run: Run, served: Any, monkeypatch: pytest.MonkeyPatch
):
    served.client.complete(list(range(40)), max_tokens=2, temperature=0)
    monkeypatch.setenv("HEADROOM_ADMIN_TOKEN", TOKEN)
    code, out, _ = run("reset-prefix-cache", "--url", served.url, "--json")
    assert code == 0
    assert json.loads(out)["blocks"] >= 10
    monkeypatch.setenv("HEADROOM_ADMIN_TOKEN", "wrong")
    assert run("reset-prefix-cache", "--url", served.url)[0] == 2
