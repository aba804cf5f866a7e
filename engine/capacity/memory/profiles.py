"""How serving engines spend memory besides the KV cache: one row each.

usable memory ─┬─ reserved      (1 - utilization): the engine leaves it alone
               ├─ weights       as resident after loading
               ├─ activations   peak of the engine's largest step
               ├─ non-torch     CUDA context, communication buffers, libraries
               └─ KV cache      what is left, in whole blocks
"""

from __future__ import annotations

import dataclasses
import re

from engine.capacity.formats import ComputeDtype, WeightPrecision
from engine.capacity.memory.activation import LargestStep, activation_bytes, forward_bytes
from engine.capacity.memory.weights import SizedTensor, sized_tensors
from engine.capacity.model.layers import MixtureOfExperts
from engine.capacity.model.sharding import WHOLE, Shard
from engine.capacity.model.spec import ModelSpec
from engine.capacity.text import GIB
from engine.errors import ConfigError

MIB = 2**20
#: Rotary tables of longer contexts are not made at once (Llama 4: 10 million positions).
_LONGEST_TABLE = 2**20


@dataclasses.dataclass(frozen=True, slots=True)
class Profile:
    """One row.

    Attributes:
        name: canonical name, e.g. ``"vllm-0.19"``.
        label: for display.
        utilization, max_num_seqs, token_budget, block_size: the engine's defaults; ``token_budget`` None: a step takes
            a whole prompt of the planned context.
        frees_windows: gives back KV blocks that have slid out of a layer's window.
        shares_tables: all layers share a request's blocks, so none is given back where one layer sees everything.
        groups_layers: layers with and without a window share one pool of equal groups.
        expands_latent: caches full keys and values where a model has latent attention.
        torch_cuda: weights are counted as torch's CUDA allocator does, with vLLM's rotary table and padded vocabulary.
        logits_fit: (GiB, bytes per sequence and vocabulary entry) of the measured activation peak, or None: counted.
        non_torch_gib: on one GPU, and on each of several.
        batch_is_concurrency: there is no scheduler: all sequences are one batch, prefilled in one pass.
        text_only: runs the language model of a multimodal one alone.
        zero_point_bits: of the zero point of a group of INT4 weights: 4 packed, 16 next to the scale.
        caps_cache: allocates no more blocks than ``max_num_seqs`` sequences of the planned context can use.
        assumptions: what the rows rest on, for display.
    """

    name: str
    label: str
    utilization: float
    max_num_seqs: int
    token_budget: int | None
    block_size: int
    frees_windows: bool
    torch_cuda: bool
    logits_fit: tuple[float, float] | None
    non_torch_gib: tuple[float, float]
    groups_layers: bool = False
    shares_tables: bool = False
    expands_latent: bool = False
    batch_is_concurrency: bool = False
    text_only: bool = False
    caps_cache: bool = False
    zero_point_bits: int = 4
    assumptions: tuple[str, ...] = ()

    @property
    def vocab_multiple(self) -> int:
        """Vocabulary rows are padded to a multiple of it."""
        return 64 if self.torch_cuda else 1

    def frees_windows_of(self, spec: ModelSpec) -> bool:
        """True if blocks that have slid out of the windows of this model are given back."""
        return self.frees_windows and not (self.shares_tables and spec.num_sliding_layers < spec.num_attention_layers)


_VLLM_WEIGHTS = (
    "Weights as vLLM reports them after loading: parameters, rotary table, rounding of torch's CUDA allocator.",
)
_CUDA_GRAPHS = "CUDA graphs are captured after the KV cache is sized, from the memory outside the utilization."

PROFILES: tuple[Profile, ...] = (
    Profile(
        name="vllm-0.19",
        label="vLLM 0.17 and later",
        utilization=0.9,
        max_num_seqs=256,
        token_budget=8192,
        block_size=16,
        frees_windows=True,
        torch_cuda=True,
        logits_fit=(0.175, 14.1),
        groups_layers=True,
        non_torch_gib=(0.25, 2.1),
        assumptions=(
            *_VLLM_WEIGHTS,
            "Activation peak 0.175 GiB + 14.1 B × max sequences × vocabulary: fitted on 11 dense models under vLLM "
            "0.19, 4–5 % error.",
            "Outside of torch 0.25 GiB on one GPU, 2.1 GiB on each of several.",
            _CUDA_GRAPHS,
        ),
    ),
    Profile(
        name="vllm-0.16",
        label="vLLM 0.8 – 0.16",
        utilization=0.9,
        max_num_seqs=256,
        token_budget=8192,
        block_size=16,
        frees_windows=True,
        torch_cuda=True,
        logits_fit=(0.24, 37.0),
        groups_layers=True,
        non_torch_gib=(0.25, 2.1),
        assumptions=(
            *_VLLM_WEIGHTS,
            "Activation peak 0.24 GiB + 37 B × max sequences × vocabulary: fitted under vLLM 0.11 – 0.16.",
            "Outside of torch 0.25 GiB on one GPU, 2.1 GiB on each of several.",
            _CUDA_GRAPHS,
        ),
    ),
    Profile(
        name="vllm-0.6",
        label="vLLM 0.7 and earlier",
        utilization=0.9,
        max_num_seqs=256,
        token_budget=None,
        block_size=16,
        frees_windows=False,
        torch_cuda=True,
        logits_fit=None,
        non_torch_gib=(0.35, 2.1),
        assumptions=(
            *_VLLM_WEIGHTS,
            "Without chunked prefill a step takes a whole prompt: activations of one pass over the context.",
            "Outside of torch 0.35 GiB on one GPU (one measurement, RTX 3090), 2.1 GiB on each of several.",
        ),
    ),
    Profile(
        name="headroom",
        label="Headroom (this engine)",
        utilization=0.9,
        max_num_seqs=64,
        token_budget=2048,
        block_size=16,
        frees_windows=True,
        shares_tables=True,
        torch_cuda=False,
        logits_fit=None,
        non_torch_gib=(0.0, 0.0),
        text_only=True,
        caps_cache=True,
        zero_point_bits=16,
        assumptions=(
            "Sized by the function that the engine itself uses; what lies outside of torch comes from the memory "
            "outside the utilization.",
            "Blocks that slide out of the windows are given back where every layer has one, else kept.",
        ),
    ),
    Profile(
        name="transformers",
        label="transformers generate()",
        utilization=1.0,
        max_num_seqs=8,
        token_budget=None,
        block_size=1,
        frees_windows=True,
        torch_cuda=False,
        logits_fit=None,
        non_torch_gib=(0.25, 2.1),
        expands_latent=True,
        batch_is_concurrency=True,
        assumptions=(
            "One static batch: every sequence is padded to the planned context and prefilled in one pass.",
            "The cache grows by copying: one layer's keys and values exist twice for a moment.",
        ),
    ),
)

_LAST_MINOR = {"vllm-0.6": 7, "vllm-0.16": 16}


def find_profile(name: str) -> Profile:
    """The profile of that name; ``vllm-0.N`` of any version is mapped to the range that was measured, ``vllm`` to the
    newest.

    >>> find_profile("vllm-0.18").name, find_profile("vllm-0.15.1").name
    ('vllm-0.19', 'vllm-0.16')

    Raises:
        ConfigError: for any other name.
    """
    text = str(name).strip().lower()
    by_name = {profile.name: profile for profile in PROFILES}
    if text in by_name:
        return by_name[text]
    version = re.fullmatch(r"vllm(?:[- ]v?0\.(\d{1,4})(?:\.\w{1,10})*)?", text)
    if version:
        minor = int(version[1]) if version[1] else 10_000
        for older, last in _LAST_MINOR.items():
            if minor <= last:
                return by_name[older]
        return by_name["vllm-0.19"]
    raise ConfigError(
        f"{text[:40]!r} is not an engine profile.", field="profile", remedy=f"Choose one of: {', '.join(by_name)}."
    )


def profile_weight_precision(profile: Profile, name: str, spec: ModelSpec) -> WeightPrecision:
    """The weight format of that name as the engine keeps it; the model's checkpoint may have one of its own by it."""
    return spec.weight_precision(name, zero_point_bits=profile.zero_point_bits)


def resident_weight_bytes(
    profile: Profile, spec: ModelSpec, weights: WeightPrecision, dtype: ComputeDtype, shard: Shard = WHOLE
) -> int:
    """Bytes of weights on one GPU as the engine of the profile holds them.

    >>> from engine.capacity.formats import BFLOAT16
    >>> from engine.capacity.model.catalog import model_spec
    >>> vllm = find_profile("vllm-0.6")  # its log: "Loading model weights took 14.9888 GB" and "14.2487 GB"
    >>> round(resident_weight_bytes(vllm, model_spec("Llama-3.1-8B"), BFLOAT16.as_weights, BFLOAT16) / GIB, 4)
    14.9888
    >>> round(resident_weight_bytes(vllm, model_spec("Qwen2.5-7B"), BFLOAT16.as_weights, BFLOAT16) / GIB, 4)
    14.2487
    """
    tensors = sized_tensors(spec, weights, dtype, shard, profile.vocab_multiple)
    if not profile.torch_cuda:
        return sum(tensor.bytes * tensor.count for tensor in tensors)
    table = min(spec.max_position, _LONGEST_TABLE) * spec.rotary_dim * dtype.bytes
    return cuda_allocation(table) + sum(_allocated(stored, spec, shard.ep, dtype.bytes) for stored in tensors)


def _allocated(stored: SizedTensor, spec: ModelSpec, ep: int, plain: int) -> int:
    """Bytes that torch's CUDA allocator counts for equal tensors, with what vLLM derives from them."""
    kind, count = stored.tensor, stored.count
    if kind.part == "experts" and count > 1:
        # Experts of a layer are one allocation.
        layers = max(1, count // _local_experts(spec, ep))
        total = layers * cuda_allocation(stored.bytes * (count // layers))
    else:
        total = cuda_allocation(stored.bytes) * count
    if kind.role == "kv_up" and stored.bytes != kind.rows * kind.columns * plain:
        # Decoding multiplies by the two halves of this matrix, kept unquantized next to it.
        total += count * cuda_allocation(kind.rows * kind.columns * plain)
    return total


def _local_experts(spec: ModelSpec, ep: int) -> int:
    mixtures = [kind.mlp for kind in spec.kinds if isinstance(kind.mlp, MixtureOfExperts)]
    return -(-mixtures[0].num_experts // ep) if mixtures else 1


def cuda_allocation(size: int) -> int:
    """Bytes that torch's CUDA caching allocator counts for a tensor of ``size`` bytes.

    Sizes are rounded up to 512 B. From 10 MiB on, memory is taken from the driver in multiples of 2 MiB, and a rest of
    1 MiB or less is not split off: it stays with the tensor.

    >>> cuda_allocation(33_030_144) / MIB, cuda_allocation(25_690_112) / MIB  # 31.5 and 24.5 MiB
    (32.0, 24.5)
    """
    rounded = -(-size // 512) * 512
    if rounded < 10 * MIB:
        return rounded
    segment = -(-rounded // (2 * MIB)) * 2 * MIB
    return segment if segment - rounded <= MIB else rounded


def peak_activation_bytes(
    profile: Profile, spec: ModelSpec, step: LargestStep, dtype: ComputeDtype, shard: Shard = WHOLE
) -> int:
    """Peak bytes of activations on one GPU in the largest step that the engine prepares for.

    >>> from engine.capacity.formats import BFLOAT16
    >>> from engine.capacity.model.catalog import model_spec
    >>> step = LargestStep(max_num_seqs=1024, token_budget=None, context=8192)
    >>> round(peak_activation_bytes(find_profile("vllm-0.19"), model_spec("Llama-3.1-8B"), step, BFLOAT16) / GIB, 2)
    1.9
    """
    tp = shard.tp
    if profile.logits_fit is not None:
        base, per_logit = profile.logits_fit
        logits = per_logit * step.max_num_seqs * spec.vocab_size if shard.stage_of(spec).last else 0.0
        return int(base * GIB + logits)
    if profile.torch_cuda:
        # Gate, up and their product, the residual stream, its normalized copy and the layer's input, all alive at once.
        width = -(-spec.intermediate_size // tp)
        return max(step.context, 2048) * 3 * (width + spec.hidden_size) * dtype.bytes
    if profile.batch_is_concurrency:
        tokens = step.max_num_seqs * step.context
        copied = tokens * 2 * -(-spec.num_kv_heads // tp) * spec.head_dim * dtype.bytes
        return forward_bytes(spec, tokens, dtype, tp) + copied
    budget = step.token_budget or profile.token_budget or step.context
    return activation_bytes(spec, budget, step.max_num_seqs, dtype, tp)


def non_torch_bytes(profile: Profile, num_gpus: int) -> int:
    """Bytes on one GPU that torch does not account for."""
    return int(profile.non_torch_gib[0 if num_gpus == 1 else 1] * GIB)
