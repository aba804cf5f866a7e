"""Fixtures shared by all rooms: the default model, a tiny checkpoint, references from transformers.

Nothing here downloads weights at test time: `make setup-dev` has fetched the real models, hubs are switched off.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from engine.config import DEFAULT_MODEL
from tests import durations, marks
from tests.beside import PATIENCE_S, ROOT, Beside

#: This is one of several processes that share the suite (pytest-xdist).
IN_PARALLEL = "PYTEST_XDIST_WORKER" in os.environ
_BESIDE = pytest.StashKey[Beside]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Check the marks and order the groups of tests."""
    mistakes = [mistake for item in items if (mistake := marks.mistake(item)) is not None]
    if mistakes:
        raise pytest.UsageError("\n".join(mistakes))
    for item in items:
        if item.get_closest_marker("beside") is not None:
            item.add_marker(pytest.mark.timeout(PATIENCE_S + 30))
    items.sort(key=lambda item: marks.rank(item, in_parallel=IN_PARALLEL))  # stable


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hand whole groups to the processes that share the suite (``--dist loadscope``)."""
    return marks.group_scheduling()(config, log) if config.getoption("dist") == "loadscope" else None


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the commands that the collected tests ask for, or leave each to the first test that asks for it."""
    if session.config.option.collectonly:
        return
    markers = (item.get_closest_marker("beside") for item in session.items)
    names = list(dict.fromkeys(marker.args[0] for marker in markers if marker is not None))
    if names:
        beside = session.config.stash[_BESIDE] = Beside(Path(tempfile.mkdtemp(prefix="headroom-beside-")))
        if not IN_PARALLEL:
            beside.start(names)


def pytest_unconfigure(config: pytest.Config) -> None:
    """End them with the suite."""
    beside = config.stash.get(_BESIDE, None)
    if beside is not None:
        beside.close()
        shutil.rmtree(beside.folder("."), ignore_errors=True)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Write what took longest; printed by ``--durations``, kept for whoever makes the suite quicker."""
    reports = [report for found in terminalreporter.stats.values() for report in found if hasattr(report, "when")]
    durations.write(reports, ROOT / "tests" / "artifacts" / "slowest.md")


@pytest.fixture(scope="session")
def beside(request: pytest.FixtureRequest) -> Beside:
    """The commands that run next to the suite, for tests marked ``beside("name")``."""
    return request.config.stash[_BESIDE]


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    """Many tests run next to worker processes that compute as well: do not fight over the cores."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or max(1, min(4, os.cpu_count() or 1))))


@pytest.fixture(scope="session")
def default_gguf() -> Path:
    """The default model's file, as fetched by `make setup`."""
    from engine.models import fetch_default_model

    return fetch_default_model()


@pytest.fixture(scope="session")
def hf_default_model(default_gguf: Path) -> Any:
    """The default model in transformers, float32: the reference of the correctness contract."""
    from transformers import AutoModelForCausalLM, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        str(default_gguf.parent),
        gguf_file=default_gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    return model.eval()


@pytest.fixture(scope="session")
def default_model_float32(default_gguf: Path) -> Any:
    """The default model in our engine's form, float32. Tests that swap its weights must swap them back."""
    from engine.models import load_model

    return load_model(DEFAULT_MODEL, dtype="float32", device="cpu")


def byte_tokenizer() -> Any:
    """A byte-level tokenizer without merges: every byte a token, plus one end-of-sequence token (id 256)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    backend.add_special_tokens(["<|end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return tokenizer


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer Llama (grouped queries, 257 tokens): runs thousands of tokens a second."""
    return save_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))


def save_tiny_llama(folder: Path) -> Path:
    """Write the model of the fixture ``tiny_llama`` into a folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,  # wide logits: no near ties that rounding could turn
        eos_token_id=256,
        bos_token_id=None,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).eval().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
