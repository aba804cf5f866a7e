"""Nothing that comes in makes the planner fail otherwise than by naming the field and the remedy."""

from __future__ import annotations

import json
import time

import pytest

from engine.capacity import model_config
from engine.cli.app import main
from tests.attack.plans import as_file, check_finite, plan_config_mutations

H100 = {"gpu": "H100 SXM 80GB", "context": "4096"}


def run(tmp_path, capfd, config, options) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of ``plan --json``."""
    file = tmp_path / "config.json"
    file.write_bytes(as_file(config))
    flags = [f"--{name}={value}" for name, value in options.items()]
    code = main(["plan", "--model", str(file), *flags, "--json"])
    return code, *capfd.readouterr()


@pytest.mark.parametrize("seed", range(3))
def test_hostile_plans_are_planned_in_finite_numbers_or_explained(tmp_path, capfd, seed: int):
    codes = {0: 0, 2: 0}
    for name, config, options in plan_config_mutations(seed, 50):
        started = time.process_time()
        code, out, err = run(tmp_path, capfd, config, options)
        assert time.process_time() - started < 20, (name, config, options)
        assert code in codes, (name, config, options, err)
        assert "Traceback" not in err
        codes[code] += 1
        if code == 0:
            check_finite(json.loads(out))
        else:
            error = json.loads(out)["error"]
            assert error["field"], (name, config, options)
            assert error["remedy"] or "Traceback" not in error["message"]
            assert len(out) < 6000
    assert codes[0] >= 3
    assert codes[2] >= 20


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e308", "-1", "0", "1000000000", "9" * 30])
@pytest.mark.parametrize(
    "option",
    ["tp", "dp", "rate", "concurrency", "context", "gpu-memory-gib", "input-cv", "burstiness", "slo-ttft-ms", "price",
     "token-budget", "draft-length", "acceptance", "prefix-hit-rate", "lora-rank"],
)  # fmt: skip
def test_every_number_of_the_command_line_has_bounds(tmp_path, capfd, option: str, value: str):
    started = time.process_time()
    code, out, _ = run(tmp_path, capfd, model_config("Llama-3.1-8B"), H100 | {option: value})
    assert time.process_time() - started < 10
    assert code in (0, 2)
    if code == 0:
        assert value not in ("nan", "inf", "-inf")
        check_finite(json.loads(out))
    else:
        assert json.loads(out)["error"]["field"] == option.replace("-", "_")


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_hidden_layers", 10**9), ("vocab_size", 10**400), ("hidden_size", float("nan")), ("head_dim", float("inf"))],
)
def test_absurd_field_is_named(tmp_path, capfd, field: str, value):
    code, out, _ = run(tmp_path, capfd, model_config("Llama-3.1-8B") | {field: value}, H100)
    assert code == 2
    assert json.loads(out)["error"]["field"] == field


@pytest.mark.parametrize("content", [b"", b"[", b"\xff\xfe", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"])
@pytest.mark.parametrize("name", ["config.json", "hf_quant_config.json"])
def test_broken_file_is_explained(tmp_path, capfd, content: bytes, name: str):
    (tmp_path / "config.json").write_bytes(as_file(model_config("Llama-3.1-8B")))
    (tmp_path / name).write_bytes(content)
    assert main(["plan", "--model", str(tmp_path), "--gpu", "H100 SXM 80GB"]) == 2
    assert "is not JSON" in capfd.readouterr().err
