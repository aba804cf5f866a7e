"""Checkpoints: weights and configuration on disk, which can be read again at any time.

Every checkpoint answers with Hugging Face tensor names and layouts, whatever its file format, and with norm weights as
they multiply (also where a file holds w for a factor of 1 + w), so that one decoder serves all. Nothing is kept in
memory between reads: going back from quantized weights re-reads, bit for bit.
"""

from __future__ import annotations

import abc
import functools
import hashlib
import json
import math
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import torch

from engine.errors import ModelLoadError
from engine.models.checksums import remembered, remembered_sha256
from engine.models.config_fields import positive, shown
from engine.models.families import Family, family_of, family_of_gguf, unsupported
from engine.models.safetensors_file import SafetensorsFile

if TYPE_CHECKING:
    from engine.models.gguf_file import GGUFFile

_FULL_HASH_LIMIT_BYTES = 1 << 30
_SAMPLE_BYTES = 1 << 20
_NUM_SAMPLES = 64
_INDEX = "model.safetensors.index.json"
_LONGEST_JSON = 256 << 20
_NEARLY_ALL = 0.99  # the rest are norms and biases


class Checkpoint(abc.ABC):
    """One model on disk.

    Attributes:
        path: the file or folder.
        source: ``"safetensors"`` or ``"gguf"``.
        config: the configuration with the field names of a Hugging Face ``config.json``.
        family: the row of the family table it belongs to; None if our decoder has none for it.
        rope_factors: float32 [head_dim / 2] by which rotary frequencies are divided, or None.
        warnings: what the files state besides the configuration and is not followed, a sentence each.
    """

    path: Path
    source: str
    config: dict[str, Any]
    family: Family | None
    rope_factors: torch.Tensor | None = None
    warnings: tuple[str, ...] = ()

    def __init__(self, files: list[Path]) -> None:
        self._files = files
        self._stamps = self._current_stamps()

    @abc.abstractmethod
    def names(self) -> frozenset[str]:
        """All tensor names, as Hugging Face has them."""

    @abc.abstractmethod
    def tensor(self, name: str) -> torch.Tensor:
        """A fresh copy of a tensor on the CPU, in its stored float dtype (float32 if stored quantized).

        Raises:
            ModelLoadError: if it is not there or cannot be read.
        """

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, from the file's header where it has one.

        Raises:
            ModelLoadError: if it is not there.
        """
        return tuple(self.tensor(name).shape)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows ``start`` … ``stop`` - 1 of what :meth:`tensor` gives; nothing else is read where the file allows it."""
        return self.tensor(name)[start:stop]

    @functools.cached_property
    def stored_elements(self) -> Mapping[str, int]:
        """``{dtype as the file names it: elements}``, from the headers; empty for weights that are in no file."""
        return {}

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 (hex) that identifies the content; quick when the files are unchanged since the last call."""

    def unused(self, used: Collection[str]) -> set[str]:
        """Tensors that are there and not among the ``used`` names."""
        return set(self.names()) - set(used)

    def check_unchanged(self) -> None:
        """Raises ModelLoadError if a file has changed since this checkpoint was opened."""
        if self._current_stamps() != self._stamps:
            raise ModelLoadError(
                f"{self.path} has changed on disk since it was loaded.",
                field="model",
                remedy="Load the model again.",
            )

    def _current_stamps(self) -> list[tuple[int, int]] | None:
        try:
            return [(status.st_size, status.st_mtime_ns) for status in (path.stat() for path in self._files)]
        except OSError:
            return None


class SafetensorsCheckpoint(Checkpoint):
    """A folder with ``config.json`` and one or more ``*.safetensors`` (with an index, if there is one)."""

    source = "safetensors"

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.config = read_json(folder / "config.json", "config.json")
        self.family = family_of(self.config)
        self._file_of = self._locate()
        super().__init__(sorted({file.path for file in self._file_of.values()}))
        untied = self.family is not None and not self.family.complete(self.config).get("tie_word_embeddings", False)
        if untied and "lm_head.weight" not in self._file_of:
            raise _incomplete(folder, "lacks lm_head.weight although its config.json does not tie the head")

    def names(self) -> frozenset[str]:
        return frozenset(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file(name).tensors[name].shape

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._file(name).rows(name, start, stop)

    def tensor(self, name: str) -> torch.Tensor:
        tensor = self._file(name).rows(name)
        if self.family is not None and self.family.norm_offset and name.endswith("norm.weight"):
            return tensor.float() + self.family.norm_offset  # in float32: 1 + w has more digits than w
        return tensor

    @functools.cached_property
    def stored_elements(self) -> Mapping[str, int]:
        counts: Counter[str] = Counter()
        for file in dict.fromkeys(self._file_of.values()):
            for _, tensor in sorted(file.tensors.items()):
                counts[tensor.dtype] += math.prod(tensor.shape)
        return counts

    def _file(self, name: str) -> SafetensorsFile:
        if name not in self._file_of:
            raise _incomplete(self.path, f"lacks the tensor {name!r}")
        return self._file_of[name]

    def fingerprint(self) -> str:
        return remembered("safetensors-v1", [self.path / "config.json", *self._files], self._hash)

    def _hash(self) -> str:
        """Over the configuration and, per file, its name, size and content; of a file above 1 GiB its header and
        64 samples of 1 MiB stand for the content."""
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        for path in self._files:
            size = path.stat().st_size
            digest.update(f"{path.name}:{size}\n".encode())
            with path.open("rb") as stream:
                if size <= _FULL_HASH_LIMIT_BYTES:
                    digest.update(hashlib.file_digest(stream, "sha256").digest())
                    continue
                header_bytes = 8 + int.from_bytes(stream.read(8), "little")
                stream.seek(0)
                digest.update(stream.read(header_bytes))
                for index in range(_NUM_SAMPLES):
                    stream.seek(header_bytes + (size - header_bytes - _SAMPLE_BYTES) * index // (_NUM_SAMPLES - 1))
                    digest.update(stream.read(_SAMPLE_BYTES))
        return digest.hexdigest()

    def _locate(self) -> dict[str, SafetensorsFile]:
        """Tensor name → its file, from the index where there is one, else from the files' own headers."""
        index = self.path / _INDEX
        if index.exists():
            return self._follow(read_json(index, _INDEX).get("weight_map"))
        files = sorted(self.path.glob("*.safetensors"))
        if not files:
            raise _incomplete(self.path, "contains no *.safetensors files")
        return {name: file for file in map(SafetensorsFile, files) for name in file.tensors}

    def _follow(self, weight_map: Any) -> dict[str, SafetensorsFile]:
        """The index's own table, each entry found in the file that it names."""
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise _incomplete(self.path, f"has an {_INDEX} without a weight_map of tensor and file names")
        files = {name: SafetensorsFile(self._shard(name)) for name in sorted(set(weight_map.values()))}
        for tensor, name in weight_map.items():
            if tensor not in files[name].tensors:
                raise _incomplete(
                    self.path, f"has an {_INDEX} that looks for {tensor[:200]!r} in {name}, which lacks it"
                )
        return {tensor: files[name] for tensor, name in weight_map.items()}

    def _shard(self, name: str) -> Path:
        """The place of a file that the index names; it names none outside the folder."""
        parts = PurePosixPath(name.replace("\\", "/"))
        if not parts.parts or parts.is_absolute() or ".." in parts.parts or "\0" in name or ":" in parts.parts[0]:
            raise ModelLoadError(
                f"{self.path / _INDEX} names {name[:200]!r}, which is not in its folder.",
                field=_INDEX,
                remedy="Let it name files of its own folder, or download the model again.",
            )
        path = self.path / name
        try:
            if path.is_file():
                return path
        except OSError:  # a name that no file system takes
            pass
        raise _incomplete(self.path, f"lacks {name[:200]}, which {_INDEX} names")


class GGUFCheckpoint(Checkpoint):
    """One ``.gguf`` file, presented under Hugging Face names with the query and key rows in Hugging Face order."""

    source = "gguf"
    family: Family

    def __init__(self, path: Path) -> None:
        # Here, so that only who reads such a file needs the gguf package: GPU images of torch come without it.
        from engine.models.gguf_file import GGUFFile

        self.path = path
        self.file = GGUFFile(path)
        if _whole(self.file, "split.count", 1) > 1:
            raise ModelLoadError(
                f"{path} is one part of a model that is split over several files.",
                field="model",
                remedy="Merge the parts into one file first, for example with llama-gguf-split --merge.",
            )
        architecture = str(self.file.metadata.get("general.architecture"))
        self.family = family_of_gguf(architecture)
        self.config = _config_of_gguf(self.file, architecture, self.family)
        self._gguf_name = {
            hf_name: name for name in self.file.tensors if (hf_name := _hf_name_of_gguf(name, self.family)) is not None
        }
        self._unmapped = self.file.tensors.keys() - set(self._gguf_name.values()) - {_ROPE_FACTORS}
        self.warnings = _gguf_warnings(self.file, architecture)
        self.rope_factors = _read_rope_factors(self.file, self.config)
        super().__init__([path])

    def names(self) -> frozenset[str]:
        return frozenset(self._gguf_name)

    def unused(self, used: Collection[str]) -> set[str]:
        return super().unused(used) | self._unmapped

    def shape(self, name: str) -> tuple[int, ...]:
        return self.file.tensors[self._stored(name)].shape

    def tensor(self, name: str) -> torch.Tensor:
        shape = self.shape(name)
        return self.rows(name, 0, shape[0]) if shape else self.file.read(self._stored(name))

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        stored = self._stored(name)
        rows = self._rows_of_a_head(name)
        if rows is None:
            return self.file.read(stored, start, stop)
        first = start // rows * rows
        heads = self.file.read(stored, first, -(-stop // rows) * rows)
        return _unpermute(heads, heads.shape[0] // rows)[start - first : stop - first]

    def _stored(self, name: str) -> str:
        if name not in self._gguf_name:
            raise _incomplete(self.path, f"lacks the tensor {name!r}")
        return self._gguf_name[name]

    def _rows_of_a_head(self, name: str) -> int | None:
        """Of a projection whose rows lie in GGUF's order, else None."""
        field = "num_attention_heads" if ".q_proj." in name else "num_key_value_heads"
        if not self.family.gguf_permuted or not (".q_proj." in name or ".k_proj." in name):
            return None
        heads, rows = self.config[field], self.shape(name)[0]
        if not isinstance(heads, int) or heads < 1 or rows % (2 * heads):
            raise _incomplete(self.path, f"has {rows} rows in {name!r}, which {heads} heads of even size do not divide")
        return rows // heads

    @functools.cached_property
    def stored_elements(self) -> Mapping[str, int]:
        counts: Counter[str] = Counter()
        for info in self.file.tensors.values():
            counts[info.kind.name] += math.prod(info.shape)
        return counts

    def fingerprint(self) -> str:
        return remembered_sha256(self.path)


def stored_as(checkpoint: Checkpoint) -> str:
    """What its weights are stored as, which is what a loss of quality is counted from.

    ``"BF16 (safetensors)"``, ``"mostly Q4_1 (79 %, GGUF)"`` by share of the elements, ``"quantized by gptq
    (safetensors)"``, ``"in no file"``.
    """
    container = {"gguf": "GGUF"}.get(checkpoint.source, checkpoint.source)
    method = (checkpoint.config.get("quantization_config") or {}).get("quant_method")
    if method:
        return f"quantized by {method} ({container})"
    counts = checkpoint.stored_elements
    if not counts:
        return "in no file"
    dtype = max(counts, key=lambda name: counts[name])
    share = counts[dtype] / sum(counts.values())
    return f"{dtype} ({container})" if share >= _NEARLY_ALL else f"mostly {dtype} ({100 * share:.0f} %, {container})"


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A JSON object from a file of a model folder.

    Raises:
        ModelLoadError: if it is missing, not readable or not a JSON object.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe or a device would be waited for
            raise ValueError("it is not a regular file")
        if path.stat().st_size > _LONGEST_JSON:
            raise ValueError(f"more than {_LONGEST_JSON >> 20} MiB")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _incomplete(path.parent, f"has no {what}") from None
    except (OSError, ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:300]
        raise ModelLoadError(
            f"{path} is not valid JSON ({reason}).", field=what, remedy="Correct the file or download it again."
        ) from None
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} is not a JSON object.", field=what, remedy="Correct it or download it again.")
    return value


_GGUF_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_GGUF_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _hf_name_of_gguf(name: str, family: Family) -> str | None:
    """``blk.3.attn_q.weight`` → ``model.layers.3.self_attn.q_proj.weight``; None if the decoder has no use for it."""
    if name in _GGUF_TOP:
        return _GGUF_TOP[name]
    parts = name.split(".")
    names = {**_GGUF_LAYER, **family.gguf_names}
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in names:
        return f"model.layers.{parts[1]}.{names[parts[2]]}.{parts[3]}"
    return None


def _unpermute(tensor: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Undo the row order of GGUF's Llama conversion: pairs (2i, 2i+1) of each head go back to halves (i, i + D/2)."""
    half = tensor.shape[0] // num_heads // 2
    return tensor.view(num_heads, half, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _config_of_gguf(file: GGUFFile, architecture: str, family: Family) -> dict[str, Any]:
    """The file's metadata under the field names of a ``config.json``."""
    metadata = file.metadata

    def value(key: str, default: Any = None) -> Any:
        return metadata.get(f"{architecture}.{key}", default)

    def size(key: str, default: int | None = None) -> int:
        return _whole(file, f"{architecture}.{key}", default)

    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise _incomplete(file.path, "lacks the tensor 'token_embd.weight'")
    if len(embedding.shape) != 2:
        raise _incomplete(file.path, f"has a 'token_embd.weight' of shape {list(embedding.shape)}, which is no matrix")
    num_heads, hidden_size = size("attention.head_count"), size("embedding_length")
    if value("expert_count", 0):
        raise unsupported("general.architecture", architecture, "mixtures of experts are read from safetensors only")
    head_dim = size("attention.key_length", max(hidden_size // num_heads, 1))
    if size("attention.value_length", head_dim) != head_dim:
        raise _incomplete(file.path, f"states another {architecture}.attention.value_length than key_length")
    config = {
        "architectures": [family.architectures[0]],
        "model_type": family.name,
        "_name_or_path": str(metadata.get("general.name", file.path.stem))[:200],
        "num_hidden_layers": size("block_count"),
        "hidden_size": hidden_size,
        "num_attention_heads": num_heads,
        "num_key_value_heads": size("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "intermediate_size": size("feed_forward_length"),
        "vocab_size": embedding.shape[0],
        "max_position_embeddings": size("context_length"),
        "rms_norm_eps": value("attention.layer_norm_rms_epsilon", 1e-6),
        "rope_theta": value("rope.freq_base", 10000.0),
        "sliding_window": value("attention.sliding_window"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
        "partial_rotary_factor": size("rope.dimension_count", head_dim) / head_dim,
    }
    scaling = value("rope.scaling.type", "none")
    if scaling != "none":
        original = value("rope.scaling.original_context_length")
        config["rope_scaling"] = {"rope_type": scaling, "factor": value("rope.scaling.factor", 1.0)}
        if original is not None:
            config["rope_scaling"]["original_max_position_embeddings"] = original
        for name in ("beta_fast", "beta_slow") if scaling == "yarn" else ():
            if (beta := value(f"rope.scaling.yarn_{name}")) is not None:
                config["rope_scaling"][name] = beta
    if family.attention_scalar is not None:
        # Not in the file: llama.cpp, too, knows the one size, of 62 layers, where it is not the head's.
        config[family.attention_scalar] = hidden_size // num_heads if config["num_hidden_layers"] == 62 else head_dim
    if family.local_rope:
        config["rope_local_base_freq"] = value("rope.freq_base_swa", 10000.0)
    return config


_ROPE_FACTORS = "rope_freqs.weight"


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_GGUF_READ = _names(
    "attention.head_count attention.head_count_kv attention.key_length attention.value_length block_count "
    "embedding_length feed_forward_length context_length vocab_size attention.layer_norm_rms_epsilon rope.freq_base "
    "rope.freq_base_swa rope.dimension_count rope.scaling.type rope.scaling.factor "
    "rope.scaling.original_context_length rope.scaling.yarn_beta_fast rope.scaling.yarn_beta_slow "
    "attention.sliding_window attention.sliding_window_pattern expert_count"
)
#: Of the file's making; ``finetuned`` says how the scaling came about.
_GGUF_HARMLESS = _names("rope.scaling.finetuned expert_used_count")


def _gguf_warnings(file: GGUFFile, architecture: str) -> tuple[str, ...]:
    """A sentence for every property of the model that the file states and nothing reads."""
    properties = {key.removeprefix(f"{architecture}."): value for key, value in file.metadata.items()}
    ignored = [
        f"{architecture}.{key} = {shown(value)} is not followed: {architecture} is computed without it."
        for key, value in properties.items()
        if f"{architecture}.{key}" in file.metadata and key not in _GGUF_READ and key not in _GGUF_HARMLESS
    ]
    if file.metadata.get("tokenizer.ggml.model") == "gpt2" and "tokenizer.ggml.pre" not in file.metadata:
        ignored.append("tokenizer.ggml.pre is missing: text is split as llama.cpp's type 'default' does.")
    return tuple(ignored)


def _read_rope_factors(file: GGUFFile, config: dict[str, Any]) -> torch.Tensor | None:
    """float32 [rotated dimensions / 2], all of them positive."""
    info = file.tensors.get(_ROPE_FACTORS)
    if info is None:
        return None
    wanted = int(config["head_dim"] * config["partial_rotary_factor"]) // 2
    if info.shape != (wanted,):
        raise _incomplete(file.path, f"has {_ROPE_FACTORS!r} of shape {list(info.shape)} for {wanted} rotated pairs")
    factors = file.read(_ROPE_FACTORS).float()
    if not bool((factors.isfinite() & (factors > 0)).all()):
        raise _incomplete(file.path, f"has factors in {_ROPE_FACTORS!r} that are not positive numbers")
    return factors


def _whole(file: GGUFFile, key: str, default: int | None = None) -> int:
    """A positive whole number of the file's metadata."""
    try:
        return positive(file.metadata, key, default)
    except ModelLoadError as error:
        raise ModelLoadError(
            f"{file.path}: {error.message}", field=key, remedy="Check that the file is complete, or convert it again."
        ) from None


def _incomplete(path: Path, what: str) -> ModelLoadError:
    return ModelLoadError(
        f"{path} {what}.",
        field="model",
        remedy="Give a folder with config.json, tokenizer files and *.safetensors, or a complete .gguf file.",
    )
