"""Tables of measured configurations: the user's own before the shipped one before the rule."""

import json
import time

import pytest
import torch

from kernels import paged_attention, scaled_linear, tune, tuning, weight_only_linear
from kernels.expert_linear import CONFIGS as EXPERT_CONFIGS

CUDA = torch.device("cuda:0")
KEY = (16, 4096, "int4")


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """(own, shipped): the files of a GPU called H200, not there yet."""
    monkeypatch.setenv("HEADROOM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H200")
    tuning.gpu_slug.cache_clear()
    tuning.forget()
    yield tmp_path / "home" / "tuned" / "nvidia-h200.json", tmp_path / "shipped" / "nvidia-h200.json"
    tuning.gpu_slug.cache_clear()
    tuning.forget()


def write(path, config):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"linear": {"16 4096 int4": {"config": config, "us": 3.0}}}))
    tuning.forget()


def test_the_own_table_comes_before_the_shipped_one_and_both_before_the_rule(tables):
    own, shipped = tables
    assert tuning.select("linear", KEY, "rule", CUDA) == "rule"
    write(shipped, "shipped")
    assert tuning.select("linear", KEY, "rule", CUDA) == "shipped"
    write(own, "own")
    assert tuning.select("linear", KEY, "rule", CUDA) == "own"
    assert tuning.select("linear", (17, 4096, "int4"), "rule", CUDA) == "rule"
    assert tuning.select("other", KEY, "rule", CUDA) == "rule"


def test_a_device_that_is_no_gpu_follows_the_rule(tables):
    write(tables[1], "shipped")
    assert tuning.select("linear", KEY, "rule", torch.device("cpu")) == "rule"


def test_the_quickest_configuration_that_runs_is_kept():
    def broken():
        raise RuntimeError("out of shared memory")

    seconds = {"slow": 3e-3, "quick": 1e-3}
    launches = {name: (lambda name=name: name) for name in seconds} | {"broken": broken}
    told = []
    found = tune.tune(iter([(KEY, launches)]), lambda launch: seconds[launch()], time.monotonic() + 60, told.append)
    assert found == {"16 4096 int4": {"config": "quick", "us": 1000.0}}
    assert any("broken does not run" in words for words in told)


def test_no_problem_is_begun_after_the_deadline():
    assert tune.tune(iter([(KEY, {"one": lambda: None})]), lambda launch: 1.0, time.monotonic() - 1, print) == {}


def test_a_new_measurement_keeps_the_other_shapes_of_a_table(tmp_path):
    path = tmp_path / "gpu.json"
    tune.merge(path, {"linear": {"1": {"config": "a", "us": 1.0}}, "other": {"9": {"config": "c", "us": 1.0}}}, {})
    tune.merge(path, {"linear": {"2": {"config": "b", "us": 1.0}}}, {"gpu": "H200"})
    table = json.loads(path.read_text())
    assert table["linear"].keys() == {"1", "2"}
    assert table["other"]["9"]["config"] == "c"
    assert table["provenance"] == {"gpu": "H200"}


def test_every_matrix_kernel_can_be_tuned():
    assert {name for name, _ in tune.tunable()} == {
        "paged_attention",
        "weight_only_linear",
        "scaled_linear",
        "expert_linear",
    }


def test_every_rule_names_a_configuration_that_exists():
    for dtype in (torch.float32, torch.bfloat16):
        for head_dim in (64, 80, 128, 256):
            for decode in (True, False):
                for capability in (80, 89, 90, 100):
                    for quantized in (True, False):
                        asked = (decode, head_dim, dtype, quantized, capability)
                        assert paged_attention.default_config(*asked) in paged_attention.CONFIGS
    for rows in (1, 2, 16, 17, 64, 128, 129, 5000):
        assert weight_only_linear.default_config(rows) in weight_only_linear.CONFIGS
        assert scaled_linear.default_config(rows) in scaled_linear.CONFIGS
    from kernels.expert_linear import default_config

    assert all(default_config(pairs, torch.bfloat16) in EXPERT_CONFIGS for pairs in (1, 16, 64, 512, 5000))


def test_shipped_tables_name_configurations_that_exist_and_say_where_they_were_measured():
    known = {
        "paged_attention": paged_attention.CONFIGS,
        "weight_only_linear": weight_only_linear.CONFIGS,
        "scaled_linear": scaled_linear.CONFIGS,
        "expert_linear": EXPERT_CONFIGS,
    }
    for path in tuning.SHIPPED.glob("*.json"):
        table = json.loads(path.read_text(encoding="utf-8"))
        assert table.pop("provenance").keys() >= {"gpu", "torch", "date"}
        for kernel, entries in table.items():
            assert {entry["config"] for entry in entries.values()} <= set(known[kernel])
