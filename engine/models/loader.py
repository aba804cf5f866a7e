"""From a name to a model that can run: find the checkpoint, read it, build the decoder, load the tokenizer."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import math
import platform
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from engine.capacity import ModelSpec
from engine.capacity.model.parameters import parameter_count
from engine.capacity.text import GIB
from engine.config import DEFAULT_MODEL
from engine.device import has_bfloat16, num_gpus
from engine.errors import CapacityError, ConfigError, ModelLoadError
from engine.models import weight_swap
from engine.models.checkpoint import Checkpoint
from engine.models.config_rules import config_warnings, tensor_warning, unknown_to
from engine.models.decoder import Decoder
from engine.models.decoder_config import DecoderConfig, read_decoder_config
from engine.models.default import fetch_default_model
from engine.models.fallback import (
    TransformersDecoder,
    context_of,
    fields_known,
    load_transformers_decoder,
    spec_of,
)
from engine.models.families import Family
from engine.models.gguf_checkpoint import GGUFCheckpoint
from engine.models.safetensors_checkpoint import SafetensorsCheckpoint
from engine.models.tokenizer import check_vocabulary, eos_token_ids, load_tokenizer
from engine.models.weight_reader import WeightSource
from engine.models.weight_swap import PreparedWeights, planned_bytes
from engine.quantization.error import QuantizationError
from engine.quantization.formats import dtype_name
from engine.quantization.registry import WeightChoice

Progress = Callable[[str, float], None]
"""(what is being done, fraction done from 0 to 1)."""

ChooseWeights = Callable[[torch.device, torch.dtype, str | None], WeightChoice]
"""Formats and kernels of a model that is about to be read, whose name is given if transformers will compute it.

It raises ConfigError where what is asked for is unavailable."""


@dataclasses.dataclass
class LoadedModel:
    """A model in memory, its tokenizer, and the checkpoint it can be read from again.

    Attributes:
        name: as asked for.
        spec: its shape, as the capacity functions want it.
        eos_token_ids: ids that end a generation.
        max_position: the model's own context length, in tokens.
        fingerprint: SHA-256 (hex) over the checkpoint's content.
        source: ``"gguf"`` or ``"safetensors"``.
        family: ``"llama"``, ``"mistral"`` …; the configuration's model type.
        checkpoint: where the weights come from.
        weights_choice: the current formats.
        warnings: what the checkpoint states and is not followed, a sentence each.
    """

    name: str
    spec: ModelSpec
    decoder: Decoder | TransformersDecoder
    tokenizer: Any
    eos_token_ids: tuple[int, ...]
    max_position: int
    device: torch.device
    dtype: torch.dtype
    fingerprint: str
    source: str
    family: str
    checkpoint: Checkpoint
    weights_choice: WeightChoice = dataclasses.field(default_factory=WeightChoice)
    warnings: tuple[str, ...] = ()

    def weight_bytes(self) -> int:
        """Resident bytes of all parameters in their present formats."""
        return self.decoder.resident_bytes()

    def weights_format(self) -> str:
        """The current format: ``"model"``, ``"int8"`` or ``"int4-g64"`` …"""
        return self.weights_choice.label

    def weights_path(self) -> str:
        """What really runs in the linear layers, for the page and the record."""
        return weight_swap.describe_path(self.decoder, self.dtype)

    def left_to_torch(self) -> str:
        """Which linear layers the chosen kernels do not multiply, in a sentence; ``""`` if they multiply all."""
        return weight_swap.left_to_torch(self.decoder, self.weights_choice.linear)

    def decoder_path(self) -> str:
        """What computes the blocks, for the page and the record: our decoder, or transformers as a fallback."""
        return self.decoder.describe_path()

    def num_parameters(self) -> int:
        """Numbers in all weights; tied ones once."""
        if isinstance(self.decoder, TransformersDecoder):
            return self.decoder.num_parameters()
        return parameter_count(self.spec).total

    def prepare_weights(
        self,
        weights: str,
        group_size: int,
        progress: Callable[[float], None] | None = None,
        *,
        head: str = "model",
        linear: str = "torch",
    ) -> PreparedWeights:
        """Make another weight format from the checkpoint, in any thread, while the engine keeps running.

        Args:
            weights: a value of the knob: ``"model"``, ``"int8"``, ``"fp8"`` …
            group_size: of INT4, in weights; ignored by the others.
            progress: called with the fraction done.
            head: format of the head, ``"model"`` or ``"int8"``.
            linear: the kernels that multiply, ``"torch"``, ``"native"`` or ``"triton"``.

        Raises:
            ConfigError: if the format or group size is unknown, or the model keeps the weights it has.
            CapacityError: if the new weights do not fit into free memory next to the present ones.
            ModelLoadError: if the checkpoint is gone or has changed since it was loaded.
        """
        choice = WeightChoice(weights, group_size, head, linear)
        return weight_swap.prepare(
            self.decoder, self.checkpoint, self.spec, choice, self.weights_choice, self.device, self.dtype, progress
        )

    def repack_weights(self, linear: str) -> None:
        """Bring weights as loaded into the layout of other kernels, without reading them again."""
        assert isinstance(self.decoder, Decoder)
        weight_swap.repack(self.decoder, linear)
        _return_freed_memory()
        self.weights_choice = dataclasses.replace(self.weights_choice, linear=linear)

    def commit_weights(self, prepared: PreparedWeights) -> None:
        """Put prepared weights in place, between two steps: pointers only."""
        weight_swap.commit(self.decoder, prepared)
        self.weights_choice = prepared.choice
        threading.Thread(target=_return_freed_memory, daemon=True).start()  # the pause between two steps is not for it

    def quantization_errors(self) -> dict[str, QuantizationError]:
        """Measured weight error of every linear layer next to the published bound; reads the checkpoint again."""
        return weight_swap.measure_errors(self.decoder, self.checkpoint)


_TRIM_ELEMENTS = 1 << 23


def _return_freed_memory() -> None:
    """Give pages of freed weights back to the system: the C library keeps what lies between others (some 3 %)."""
    with contextlib.suppress(OSError, AttributeError):  # another C library has no such call
        ctypes.CDLL(None).malloc_trim(0)


def resolve(name: str, progress: Progress | None = None) -> Checkpoint:
    """The checkpoint that ``name`` stands for.

    Args:
        name: ``smollm2-135m`` (fetched if it is not there), a folder of safetensors, a ``.gguf`` file, or a hub id
            such as ``owner/model`` (downloaded if it is not in the hub's local cache).

    Raises:
        ModelLoadError: if there is no such thing, or it cannot be read.
    """
    if name == DEFAULT_MODEL:
        return GGUFCheckpoint(fetch_default_model(progress))
    try:
        path = Path(name).expanduser()
        is_folder, is_file = bool(name) and path.is_dir(), path.is_file()
    except (OSError, RuntimeError, ValueError):  # too long, an unknown user's home, a NUL byte
        is_folder = is_file = False
    if is_folder:
        return _resolve_folder(path)
    if is_file:
        if path.suffix.lower() != ".gguf":
            raise ModelLoadError(f"{path} is not a .gguf file.", field="model", remedy=_WHAT_IS_A_MODEL)
        return GGUFCheckpoint(path)
    if _looks_like_hub_id(name):
        return SafetensorsCheckpoint(_download_from_hub(name))
    raise ModelLoadError(f"there is no model {name!r}.", field="model", remedy=_WHAT_IS_A_MODEL)


def load_model(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    progress: Progress | None = None,
    choose: ChooseWeights | None = None,
) -> LoadedModel:
    """Load a model by name, each weight in its final format before the next is read.

    Peak memory of loading is what is resident afterwards, once more the largest weight (while it is brought into the
    layout of its kernels), and some 50 MiB for slices of rows; the checkpoint's pages are never mapped. With
    ``device="cuda"`` slices are quantized on the GPU: neither side ever holds the unquantized model. A model that
    transformers computes is read by transformers, in the compute dtype: on a GPU it is in the host's memory first.

    Args:
        name: see :func:`resolve`.
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``; see :func:`resolve_dtype`.
        device: ``auto`` or a torch device such as ``cuda:1``; see :func:`resolve_device`.
        progress: called with the stage's name and the fraction of the whole that is done.
        choose: decides weight formats and kernels; all in the compute dtype for torch if not given.

    Raises:
        ModelLoadError: naming what is wrong with the checkpoint.
        ConfigError: if the device or dtype is unavailable.
        CapacityError: if the weights do not fit into free memory.
    """
    report = progress or (lambda stage, fraction: None)
    torch_device = resolve_device(device)
    torch_dtype = resolve_dtype(dtype, torch_device)
    report("finding the model", 0.0)
    checkpoint = resolve(name, lambda stage, fraction: report(stage, 0.3 * fraction))
    choice = WeightChoice() if choose is None else choose(torch_device, torch_dtype, _fallback_name(checkpoint))
    if checkpoint.family is None:
        body = _load_fallback(checkpoint, torch_device, torch_dtype, report)
    else:
        body = _load_own(checkpoint, checkpoint.family, torch_device, torch_dtype, choice, report)
    _return_freed_memory()
    report("identifying the checkpoint", 0.97)
    fingerprint = checkpoint.fingerprint()
    report("ready", 1.0)
    return LoadedModel(
        name=name,
        spec=body.spec,
        decoder=body.decoder,
        tokenizer=body.tokenizer,
        eos_token_ids=eos_token_ids(checkpoint, body.tokenizer),
        max_position=body.max_position,
        device=torch_device,
        dtype=torch_dtype,
        fingerprint=fingerprint,
        source=checkpoint.source,
        family=body.spec.model_type,
        checkpoint=checkpoint,
        weights_choice=choice,
        warnings=body.warnings,
    )


def _fallback_name(checkpoint: Checkpoint) -> str | None:
    """The architecture of a checkpoint for which our decoder has no family, else None."""
    if checkpoint.family is not None:
        return None
    names = checkpoint.config.get("architectures") or [checkpoint.config.get("model_type")]
    return ", ".join(map(str, names))


@dataclasses.dataclass(frozen=True, slots=True)
class _Body:
    """What the two ways of loading have in common."""

    decoder: Decoder | TransformersDecoder
    spec: ModelSpec
    tokenizer: Any
    max_position: int
    warnings: tuple[str, ...] = ()


def _load_own(
    checkpoint: Checkpoint,
    family: Family,
    device: torch.device,
    dtype: torch.dtype,
    choice: WeightChoice,
    report: Progress,
) -> _Body:
    config = read_decoder_config(checkpoint.config, family)
    spec = _read_spec(checkpoint)
    kept = dtype_name(dtype) if choice.label == "model" else choice.label
    _check_memory(planned_bytes(spec, choice, dtype), device, kept)
    report("reading the tokenizer", 0.3)
    tokenizer = load_tokenizer(checkpoint)
    warnings = list(checkpoint.warnings)
    if not isinstance(checkpoint, GGUFCheckpoint):  # of a GGUF file the configuration is our own
        warnings += config_warnings(checkpoint.config, family)
    warnings += check_vocabulary(tokenizer, config.vocab_size, checkpoint.path)
    decoder, unused = _build_decoder(checkpoint, config, device, dtype, choice, report)
    warnings += tensor_warning(unused)
    return _Body(decoder, spec, tokenizer, config.max_position, tuple(warnings))


def _load_fallback(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, report: Progress) -> _Body:
    report("reading the weights", 0.3)
    decoder = load_transformers_decoder(
        checkpoint,
        device,
        dtype,
        lambda parameters: _check_memory(parameters * dtype.itemsize, device, dtype_name(dtype)),
    )
    report("reading the tokenizer", 0.9)
    tokenizer = load_tokenizer(checkpoint)
    spec = spec_of(decoder, checkpoint)
    known = fields_known(decoder.model.config)
    warnings = [*unknown_to(checkpoint.config, known, type(decoder.model.config).__name__)]
    warnings += check_vocabulary(tokenizer, decoder.vocab_size, checkpoint.path)
    return _Body(decoder, spec, tokenizer, context_of(decoder.model.config), tuple(warnings))


def resolve_device(device: str) -> torch.device:
    """``auto``: the first CUDA device if there is one, else the CPU.

    Raises:
        ConfigError: if torch does not know the device or cannot use it here.
    """
    if device == "auto":
        return torch.device("cuda:0" if num_gpus() else "cpu")
    try:
        # With its number: "cuda" alone means whichever GPU is current where it is used.
        resolved = torch.empty(1, device=torch.device(device)).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"{device!r} cannot be used here ({reason}).", field="device", remedy="Choose auto, cpu or a CUDA device."
        ) from None
    return resolved


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """``auto``: bfloat16 where the device has instructions for it, else float32 on a CPU and float16 on a GPU.

    Raises:
        ConfigError: if the name is unknown.
    """
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype != "auto":
        if dtype not in named:
            raise ConfigError(
                f"{dtype!r} is not available.", field="dtype", remedy="Choose auto or " + ", ".join(named)
            )
        return named[dtype]
    if device.type == "cuda":
        return torch.bfloat16 if has_bfloat16(device) else torch.float16
    return torch.bfloat16 if _cpu_computes_bfloat16() else torch.float32


def _cpu_computes_bfloat16() -> bool:
    """True on CPUs with bfloat16 dot products: oneDNN also says yes where it only emulates them, with plain AVX-512."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    onednn: Any = torch.backends.mkldnn  # torch has no types for it
    return bool(onednn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


_WHAT_IS_A_MODEL = (
    f"Give {DEFAULT_MODEL}, a folder with config.json and *.safetensors, a .gguf file, or a hub id such as owner/model."
)


def _resolve_folder(folder: Path) -> Checkpoint:
    """A folder of safetensors, or one whose only model is a single ``.gguf`` file."""
    gguf_files = sorted(folder.glob("*.gguf"))
    if not (folder / "config.json").exists() and len(gguf_files) == 1:
        return GGUFCheckpoint(gguf_files[0])
    return SafetensorsCheckpoint(folder)


def _looks_like_hub_id(name: str) -> bool:
    owner, separator, model = name.partition("/")
    parts_are_names = all(part and all(c.isalnum() or c in "-_." for c in part) for part in (owner, model))
    return bool(separator) and parts_are_names and owner not in (".", "..")


def _download_from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja", "*.txt"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["consolidated*", "original/*"]))
    except Exception as error:  # network, permissions, unknown name: the hub client has an error for each
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelLoadError(
            f"{name!r} is not a local path and could not be fetched from the model hub ({reason}).",
            field="model",
            remedy="Check the spelling and the network, or download the model and give the path of its folder.",
        ) from error


def _read_spec(checkpoint: Checkpoint) -> ModelSpec:
    try:
        return ModelSpec.from_hf_config(checkpoint.config)
    except ConfigError as error:
        raise ModelLoadError(error.message, field=error.field, remedy=error.remedy) from error
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError) as error:
        raise ModelLoadError(
            f"{checkpoint.path}: the sizes that its configuration states cannot be computed ({error}).",
            field="config.json",
            remedy="Correct the configuration, or download the model again.",
        ) from error


def _check_memory(needed: int, device: torch.device, kept: str) -> None:
    """Refuse at once what would otherwise end in the out-of-memory killer after minutes of reading."""
    free = weight_swap.free_bytes(device)
    if needed > free:
        raise CapacityError(
            f"the weights need {needed / GIB:.2f} GiB in {kept}, but {free / GIB:.2f} GiB are free.",
            field="model",
            remedy="Free memory, or choose a smaller model, a smaller dtype or quantized weights.",
        )


def _build_decoder(
    checkpoint: Checkpoint,
    config: DecoderConfig,
    device: torch.device,
    dtype: torch.dtype,
    choice: WeightChoice,
    report: Progress,
) -> tuple[Decoder, set[str]]:
    """The decoder, and the checkpoint's tensors that it has no use for."""
    total = max(len(checkpoint.names()), 1)
    read = 0
    used: set[str] = set()

    def count(names: tuple[str, ...]) -> None:
        nonlocal read
        used.update(names)
        read += sum(math.prod(checkpoint.shape(name)) for name in names)
        if read >= _TRIM_ELEMENTS:  # else holes that slices leave between finished weights add up
            _return_freed_memory()
            read = 0
        report("reading the weights", 0.4 + 0.55 * min(len(used) / total, 1.0))

    decoder = Decoder(config, WeightSource(checkpoint, device, dtype, choice, count))
    if checkpoint.rope_factors is not None:
        decoder.divide_frequencies(checkpoint.rope_factors)
    if config.tie_word_embeddings:
        used.add("lm_head.weight")  # a copy of the embedding, where a file has it
    return decoder, checkpoint.unused(used)
