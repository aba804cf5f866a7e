"""What loading takes at its peak: the weights as they stay, a tenth, the largest weight; never the whole original."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import save_file

from engine.errors import CapacityError
from engine.models import load_model, resolve, weight_swap
from engine.models.weight_swap import planned_bytes
from engine.quantization.registry import WeightChoice
from tests.beside import ROOT
from tests.conftest import byte_tokenizer
from tests.models.test_gguf_checkpoint import write_gguf

pytestmark = pytest.mark.slow

VOCABULARY, HIDDEN, WIDTH, LAYERS = 4096, 1024, 4096, 4
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": LAYERS,
    "hidden_size": HIDDEN,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": WIDTH,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "eos_token_id": 256,
}
ORIGINAL = 2 * (LAYERS * (3 * HIDDEN * HIDDEN + 3 * WIDTH * HIDDEN) + 2 * VOCABULARY * HIDDEN)
"""Bytes of the whole model in bfloat16: 143 million."""
LARGEST = 2 * 2 * WIDTH * HIDDEN
"""Bytes of the largest weight, gate and up as one, in bfloat16."""
SLICES = 64 << 20
"""Temporaries of a slice of rows while it is dequantized, quantized and packed."""
CASES = [
    *(("folder", weights, "torch") for weights in ("model", "int4", "int8")),
    *(("folder", weights, "native") for weights in ("model", "w4a8")),
    ("gguf", "int4", "torch"),
]
CHILD = """
import ctypes, gc, json, os, sys, threading, time
import torch
from engine.models import load_model
from engine.quantization.registry import WeightChoice
from kernels.cpu.build import native
torch.set_num_threads(1)
native()

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def settled():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return resident()

def measure(path, weights, linear):
    before, peak, done = settled(), [0], threading.Event()
    def watch():
        while not done.wait(0.001):
            peak[0] = max(peak[0], resident())
    watcher = threading.Thread(target=watch)
    watcher.start()
    choice = WeightChoice(weights, 32, "model", linear)
    model = load_model(path, dtype="bfloat16", device="cpu", choose=lambda *_: choice)
    done.set()
    watcher.join()
    assert model.weights_choice == choice
    return {"peak": peak[0] - before, "after": settled() - before, "weights": model.weight_bytes()}

cases = json.loads(sys.argv[1])
measure(*cases[0])  # what libraries take once is no part of it
print(json.dumps([measure(*case) for case in cases]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of 71 million parameters."""
    folder = tmp_path_factory.mktemp("large") / "model"
    byte_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens": (VOCABULARY, HIDDEN),
        "lm_head": (VOCABULARY, HIDDEN),
        "model.norm": (HIDDEN,),
    }
    for index in range(LAYERS):
        layer = {
            "input_layernorm": (HIDDEN,),
            "post_attention_layernorm": (HIDDEN,),
            "self_attn.q_proj": (HIDDEN, HIDDEN),
            "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
            "self_attn.v_proj": (HIDDEN // 2, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HIDDEN),
            "mlp.gate_proj": (WIDTH, HIDDEN),
            "mlp.up_proj": (WIDTH, HIDDEN),
            "mlp.down_proj": (HIDDEN, WIDTH),
        }
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    torch.manual_seed(0)
    tensors = {f"{name}.weight": torch.rand(shape).sub_(0.5).bfloat16() for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def measured(folder: Path) -> dict[tuple[str, str, str], dict[str, int]]:
    """Peak and final growth of a process that loads each case, in bytes."""
    file = write_gguf(folder.parent / "model.gguf", resolve(str(folder)), quantize=gguf.GGMLQuantizationType.Q8_0)
    places = {"folder": str(folder), "gguf": str(file)}
    arguments = json.dumps([(places[place], weights, linear) for place, weights, linear in CASES])
    command = [sys.executable, "-c", CHILD, arguments]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert child.returncode == 0, child.stderr
    return dict(zip(CASES, json.loads(child.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_loading_takes_little_more_than_what_stays(measured: dict[Any, dict[str, int]], case: tuple[str, str, str]):
    found = measured[case]
    print(case, {name: round(size / 2**20) for name, size in found.items()}, "MiB")
    assert found["after"] < 1.1 * found["weights"] + (16 << 20)
    assert found["peak"] < 1.1 * found["weights"] + LARGEST + SLICES
    if case[1] != "model":
        assert found["peak"] < ORIGINAL


def test_weights_that_fit_only_quantized_are_not_refused_and_the_refusal_names_their_format(folder, monkeypatch):
    checkpoint_spec = load_model(str(folder), dtype="bfloat16", device="cpu").spec
    int4 = WeightChoice("int4", 32)
    room = planned_bytes(checkpoint_spec, int4, torch.bfloat16)
    assert room < ORIGINAL / 2
    monkeypatch.setattr(weight_swap, "free_bytes", lambda device: room)
    assert load_model(str(folder), dtype="bfloat16", device="cpu", choose=lambda *_: int4).weight_bytes() <= room
    with pytest.raises(CapacityError, match="GiB in bfloat16"):
        load_model(str(folder), dtype="bfloat16", device="cpu")
    monkeypatch.setattr(weight_swap, "free_bytes", lambda device: room - 1)
    with pytest.raises(CapacityError, match="GiB in int4-g32"):
        load_model(str(folder), dtype="bfloat16", device="cpu", choose=lambda *_: int4)
