"""Memory of activations: what a step needs besides weights and KV cache."""

from __future__ import annotations

import dataclasses

from engine.capacity.formats import ComputeDtype
from engine.capacity.memory.parallel import kv_heads_per_gpu
from engine.capacity.model.spec import ModelSpec

#: Bytes per logit besides the logits themselves while tokens are chosen, measured on `engine.sampling`: top-p with a
#: repetition penalty, the most expensive path (sorting in float32 with int64 indices, cumulative sums in float64)
#: needs 50, top-p alone 46, temperature alone 29, top-k 12, greedy none.
SAMPLER_BYTES_PER_LOGIT = 50
#: cos and sin of every token's angles, float32, shared by all layers.
_ROTARY_BYTES = 8


@dataclasses.dataclass(frozen=True, slots=True)
class LargestStep:
    """The largest step that an engine prepares for.

    Attributes:
        max_num_seqs: sequences in it, at most.
        token_budget: tokens of it, at most; None: a whole prompt of ``context`` tokens.
        context: planned tokens of a sequence.
    """

    max_num_seqs: int
    token_budget: int | None
    context: int


def activation_bytes(spec: ModelSpec, token_budget: int, max_num_seqs: int, dtype: ComputeDtype, tp: int = 1) -> int:
    """Peak bytes of activations in this engine's decoder (`engine.models.decoder`) for its largest step.

    The forward pass and sampling follow each other and do not add up; the larger one counts.

    * Forward: see :func:`forward_bytes`.
    * Sampling: the final hidden states, and for each sequence the logits in the model's dtype and the sampler's
      copies of them (:data:`SAMPLER_BYTES_PER_LOGIT`).

    Args:
        spec: the model.
        token_budget: tokens of the largest step.
        max_num_seqs: sequences whose next token is chosen in one step, at most.
        dtype: compute dtype.
        tp: tensor-parallel GPUs; heads and MLP are split, hidden states and logits are not.

    >>> from engine.capacity.formats import FLOAT32
    >>> from engine.capacity.model.catalog import model_spec
    >>> spec = model_spec("SmolLM2-135M")
    >>> activation_bytes(spec, 2048, 8, FLOAT32)  # 2,048 tokens · 32,000 B of the forward pass
    65536000
    >>> activation_bytes(spec, 2048, 64, FLOAT32)  # 64 sequences · 49,152 logits · 54 B, and the hidden states
    174587904
    """
    size = dtype.bytes
    rows = min(max_num_seqs, token_budget)
    sampling = token_budget * spec.hidden_size * size + rows * spec.vocab_size * (size + SAMPLER_BYTES_PER_LOGIT)
    return max(forward_bytes(spec, token_budget, dtype, tp), sampling)


def forward_bytes(spec: ModelSpec, num_tokens: int, dtype: ComputeDtype, tp: int = 1) -> int:
    """Peak bytes of one forward pass over ``num_tokens`` tokens, without the scratch of the attention backend.

    Per token: the residual stream, and the wider of the two halves of a layer ::

        attention   norm, q k v, rotated q k, attention output, its projection
        MLP         norm, gate and up, silu(gate), silu(gate)·up, down

    >>> from engine.capacity.formats import FLOAT32
    >>> from engine.capacity.model.catalog import model_spec
    >>> forward_bytes(model_spec("SmolLM2-135M"), 1, FLOAT32)  # (576 + 576 + 4·1,536 + 576) · 4 B + 8 B · 64
    32000
    """
    size = dtype.bytes
    query = -(-spec.num_heads // tp) * spec.head_dim
    keys = kv_heads_per_gpu(spec.num_kv_heads, tp) * spec.head_dim if spec.num_kv_heads else 0
    width = -(-spec.intermediate_size // tp)
    hidden = spec.hidden_size
    attention = hidden + (query + 2 * keys) + (query + keys) + query + hidden
    mlp = hidden + 2 * width + width + width + hidden
    return num_tokens * ((hidden + max(attention, mlp)) * size + _ROTARY_BYTES * spec.head_dim)
