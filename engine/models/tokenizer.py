"""Tokenizers and chat templates, through transformers; a GGUF file's tokenizer is converted once and kept."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from engine.errors import ModelLoadError
from engine.models.checkpoint import Checkpoint, read_json
from engine.models.gguf_checkpoint import GGUFCheckpoint
from engine.models.gguf_pretokenizers import pre_tokenizer_of, set_pre_tokenizer
from engine.paths import cache_dir, private_dir
from kernels.trust import tighten

_CONVERSION = 2
"""Counts the ways in which tokenizers of GGUF files were converted: what another way made is not used any more."""
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
    """Token ids that end a generation: those of the checkpoint's generation settings, and the tokenizer's own.

    A chat fine-tune is often saved with the generation settings of its base model (end of text) next to a tokenizer of
    its own (end of turn): either ends an answer.
    """
    found: list[Any] = []
    if isinstance(checkpoint, GGUFCheckpoint):
        metadata = checkpoint.file.metadata
        found = [metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
    else:
        generation = checkpoint.path / "generation_config.json"
        settings = read_json(generation, generation.name) if generation.exists() else {}
        eos = settings.get("eos_token_id", checkpoint.config.get("eos_token_id"))
        found = list(eos) if isinstance(eos, list) else [eos]
    found.append(tokenizer.eos_token_id)
    return tuple(dict.fromkeys(token_id for token_id in found if type(token_id) is int and token_id >= 0))


def check_vocabulary(tokenizer: Any, vocab_size: int, path: Path) -> list[str]:
    """Hold a tokenizer against the rows of the embedding that its ids look up.

    Returns:
        A sentence for tokens that were added behind the embedding's last row: texts with them are refused.

    Raises:
        ModelLoadError: if its vocabulary itself has ids that the embedding lacks.
    """
    added = {int(token_id) for token_id in getattr(tokenizer, "added_tokens_decoder", {})}
    largest = max((token_id for token_id in tokenizer.get_vocab().values() if token_id not in added), default=-1)
    if largest >= vocab_size:
        raise ModelLoadError(
            f"the tokenizer in {path} has token ids up to {largest:,}, but the embedding has {vocab_size:,} rows.",
            field="vocab_size",
            remedy="The tokenizer belongs to another model: take the one that these weights came with.",
        )
    beyond = sorted(token_id for token_id in added if token_id >= vocab_size)
    if not beyond:
        return []
    return [
        f"{len(beyond):,} added tokens of the tokenizer (id {beyond[0]:,} first) have no row in the embedding of "
        f"{vocab_size:,}: texts with them are refused."
    ]


def _load_from_folder(folder: Path) -> Any:
    from transformers import AutoTokenizer  # takes a second to import: only where a model is really loaded

    try:
        # Never code of the checkpoint's own, and no question on the terminal whether to run it.
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except BaseException as error:  # transformers raises whatever its parts raise
        _pass_on_what_is_no_defect(error)
        raise ModelLoadError(
            f"the tokenizer in {folder} cannot be loaded ({_first_line(error)}).", field="model", remedy=_REMEDY
        ) from error


def _load_from_gguf(checkpoint: GGUFCheckpoint) -> Any:
    pre_tokenizer_of(checkpoint.file.metadata)  # refused before anything is hashed
    folder = cache_dir() / "tokenizers" / f"{checkpoint.fingerprint()}-{_CONVERSION}"
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

    path, metadata = checkpoint.path, checkpoint.file.metadata
    splitting = pre_tokenizer_of(metadata)
    kind: Any = AutoTokenizer if splitting is None else PreTrainedTokenizerFast
    options: dict[str, Any] = {}
    if splitting is not None and splitting.adds_bos and metadata.get("tokenizer.ggml.bos_token_id") is not None:
        options["add_bos_token"] = metadata.get("tokenizer.ggml.add_bos_token", True)
    try:
        tokenizer = kind.from_pretrained(
            str(path.parent), gguf_file=path.name, local_files_only=True, trust_remote_code=False, **options
        )
        if splitting is not None:
            _drop_tokens_from(tokenizer, int(metadata["tokenizer.ggml.tokens"]))
            set_pre_tokenizer(tokenizer, splitting)
        return tokenizer
    except BaseException as error:
        _pass_on_what_is_no_defect(error)
        raise ModelLoadError(
            f"the tokenizer of {path} cannot be converted ({_first_line(error)}).",
            field="model",
            remedy="Use a GGUF file that carries its tokenizer, or a folder of safetensors.",
        ) from error


def _drop_tokens_from(tokenizer: Any, first: int) -> None:
    """Take back tokens with ids from ``first`` on: transformers adds ``<|endoftext|>`` also to a vocabulary without it,
    with an id that the embedding has no row for, or another's."""
    from tokenizers import Tokenizer

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < first]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))


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


def _pass_on_what_is_no_defect(error: BaseException) -> None:
    """Re-raises what says nothing of the file. A panic of the Rust library is no ``Exception``, but a defect."""
    if isinstance(error, MemoryError) or not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
        raise error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
