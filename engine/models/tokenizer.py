"""Tokenizers and chat templates, through transformers; a GGUF file's tokenizer is converted once and kept."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from engine.errors import ModelLoadError
from engine.models.checkpoint import Checkpoint, GGUFCheckpoint, read_json
from engine.paths import cache_dir, private_dir
from kernels.trust import tighten

_REMEDY = "The folder needs the tokenizer's files, usually tokenizer.json and tokenizer_config.json."


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The checkpoint's tokenizer, a transformers ``PreTrainedTokenizerBase``.

    Converting the tokenizer of a GGUF file takes seconds, so the result is kept under HEADROOM_HOME, by fingerprint.

    Raises:
        ModelLoadError: if there is none or it cannot be read.
    """
    if isinstance(checkpoint, GGUFCheckpoint):
        return _load_from_gguf(checkpoint)
    return _load_from_folder(checkpoint.path)


def eos_token_ids(checkpoint: Checkpoint, tokenizer: Any) -> tuple[int, ...]:
    """Token ids that end a generation: what the checkpoint's generation settings say, else the tokenizer's own."""
    found: list[Any] = []
    if isinstance(checkpoint, GGUFCheckpoint):
        metadata = checkpoint.file.metadata
        found = [metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
    else:
        generation = checkpoint.path / "generation_config.json"
        settings = read_json(generation, generation.name) if generation.exists() else {}
        eos = settings.get("eos_token_id", checkpoint.config.get("eos_token_id"))
        found = list(eos) if isinstance(eos, list) else [eos]
    ids = [token_id for token_id in found if isinstance(token_id, int)]
    if not ids and tokenizer.eos_token_id is not None:
        ids = [int(tokenizer.eos_token_id)]
    return tuple(dict.fromkeys(ids))


def _load_from_folder(folder: Path) -> Any:
    from transformers import AutoTokenizer  # takes a second to import: only where a model is really loaded

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers raises whatever its parts raise
        raise ModelLoadError(
            f"the tokenizer in {folder} cannot be loaded ({_first_line(error)}).", field="model", remedy=_REMEDY
        ) from error


def _load_from_gguf(checkpoint: GGUFCheckpoint) -> Any:
    folder = cache_dir() / "tokenizers" / checkpoint.fingerprint()
    if (folder / "tokenizer.json").exists():
        try:
            return _load_from_folder(folder)
        except ModelLoadError:
            shutil.rmtree(folder, ignore_errors=True)  # damaged: converted again below
    tokenizer = _convert(checkpoint)
    _keep(tokenizer, folder)
    return tokenizer


def _convert(checkpoint: GGUFCheckpoint) -> Any:
    """By transformers. For byte-level BPE the generic class gives the same tokenizer as the automatic choice, which
    would first parse the whole file in Python to learn the model type."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = checkpoint.path
    is_byte_level = checkpoint.file.metadata.get("tokenizer.ggml.model") == "gpt2"
    kind: Any = PreTrainedTokenizerFast if is_byte_level else AutoTokenizer
    try:
        return kind.from_pretrained(str(path.parent), gguf_file=path.name, local_files_only=True)
    except Exception as error:
        raise ModelLoadError(
            f"the tokenizer of {path} cannot be converted ({_first_line(error)}).",
            field="model",
            remedy="Use a GGUF file that carries its tokenizer, or a folder of safetensors.",
        ) from error


def _keep(tokenizer: Any, folder: Path) -> None:
    """Save into a temporary folder and rename, so that a crash never leaves half a tokenizer; best effort."""
    try:
        private_dir(folder.parent)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".part-"))
    except OSError:
        return  # a read-only home only costs the conversion time at each load
    try:
        tokenizer.save_pretrained(temporary)
        for file in temporary.rglob("*"):
            tighten(file)
        os.replace(temporary, folder)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)  # full disk, or another process was first


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
