"""Which weights a checkpoint means by a list of modules (``ignore``, ``exclude_modules`` and the like)."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator

from engine.capacity.text import shown

#: Paths of a role's modules below ``model.layers.N``, in all spellings of families; ``{e}`` is an expert's number. The
#: lists name modules of the model at hand, so that spellings of other families match nothing.
_PATHS: dict[str, tuple[str, ...]] = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.qkv_proj",
            "self_attention.query_key_value", "mixer.q_proj", "mixer.k_proj", "mixer.v_proj"),
    "attention_output": ("self_attn.o_proj", "self_attn.dense", "self_attention.dense", "mixer.o_proj",
                         "self_attn.o_b_proj"),
    "output_down": ("self_attn.o_a_proj",),
    "compress_values": ("self_attn.compressor.kv_proj",),
    "compress_gates": ("self_attn.compressor.gate_proj",),
    "query": ("self_attn.q_proj",),
    "query_down": ("self_attn.q_a_proj", "self_attn.fused_qkv_a_proj"),
    "query_up": ("self_attn.q_b_proj",),
    "kv_down": ("self_attn.kv_a_proj_with_mqa", "self_attn.fused_qkv_a_proj"),
    "kv_up": ("self_attn.kv_b_proj",),
    "mlp_up": ("mlp.gate_proj", "mlp.up_proj", "mlp.gate_up_proj", "mlp.fc1", "mlp.c_fc", "mlp.dense_h_to_4h",
               "feed_forward.gate_proj", "feed_forward.up_proj", "mixer.up_proj", "shared_mlp.input_linear"),
    "mlp_down": ("mlp.down_proj", "mlp.fc2", "mlp.c_proj", "mlp.dense_4h_to_h", "feed_forward.down_proj",
                 "mixer.down_proj", "shared_mlp.output_linear"),
    "shared_up": ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_experts.gate_proj",
                  "mlp.shared_experts.up_proj", "feed_forward.shared_expert.gate_proj",
                  "feed_forward.shared_expert.up_proj", "mixer.shared_experts.up_proj", "shared_mlp.input_linear"),
    "shared_down": ("mlp.shared_expert.down_proj", "mlp.shared_experts.down_proj",
                    "feed_forward.shared_expert.down_proj", "mixer.shared_experts.down_proj",
                    "shared_mlp.output_linear"),
    "expert_up": ("mlp.experts.{e}.gate_proj", "mlp.experts.{e}.up_proj", "mlp.experts.gate_up_proj",
                  "feed_forward.experts.gate_up_proj", "feed_forward.experts.{e}.gate_proj",
                  "block_sparse_moe.experts.{e}.w1", "block_sparse_moe.experts.{e}.w3",
                  "block_sparse_moe.input_linear", "mixer.experts.{e}.up_proj"),
    "expert_down": ("mlp.experts.{e}.down_proj", "mlp.experts.down_proj", "feed_forward.experts.down_proj",
                    "feed_forward.experts.{e}.down_proj", "block_sparse_moe.experts.{e}.w2",
                    "block_sparse_moe.output_linear", "mixer.experts.{e}.down_proj"),
    "latent_down": ("mixer.fc1_latent_proj",),
    "latent_up": ("mixer.fc2_latent_proj",),
    "index_query": ("self_attn.indexer.wq_b",),
    "index_key": ("self_attn.indexer.wk",),
    "attention_linear": ("self_attn.linear_attn",),
    "mlp_linear": ("mlp.linear_mlp",),
    "per_layer_gate": ("per_layer_input_gate",),
    "per_layer_projection": ("per_layer_projection",),
    "recurrent_input": ("linear_attn.in_proj_qkvz", "linear_attn.in_proj_qkv", "linear_attn.in_proj_z",
                        "mamba.in_proj", "mixer.in_proj"),
    "gates": ("linear_attn.in_proj_ba", "linear_attn.in_proj_b", "linear_attn.in_proj_a"),
    "recurrent_output": ("linear_attn.out_proj", "mamba.out_proj", "mixer.out_proj"),
}  # fmt: skip
_ROOTS = ("model.layers", "model.language_model.layers", "language_model.model.layers", "backbone.layers")
_HEADS = ("lm_head", "language_model.lm_head", "model.lm_head")
ROLES = (*_PATHS, "head")
#: A regular expression of a file is used only where matching it cannot take long: no repeated groups, few repeats.
_LONGEST_PATTERN = 200
_MOST_REPEATS = 3
_MOST_PATTERNS = 256
#: Layers above are all taken to be alike: no real model has as many.
_MOST_LAYERS = 512


@functools.cache
def module_paths(role: str, layer: int) -> tuple[str, ...]:
    """Full names that the modules of a role may have in a layer, e.g. ``model.layers.0.mlp.down_proj``."""
    if role == "head":
        return _HEADS
    return tuple(f"{root}.{layer}.{path.format(e=0)}" for root in _ROOTS for path in _PATHS[role])


class ModuleList:
    """A list of modules as checkpoints write them.

    An entry is a name or a run of its parts (``lm_head``, ``self_attn``, ``model.layers.0.mlp``), a pattern with ``*``
    or ``?`` for a module and what is below it, or a regular expression after ``re:``.

    >>> ignored = ModuleList(["lm_head", "re:.*self_attn.*", "model.layers.3*"])
    >>> [ignored.holds("head", 0), ignored.holds("qkv", 7), ignored.holds("mlp_up", 3), ignored.holds("mlp_up", 4)]
    [True, True, True, False]

    Attributes:
        unread: entries that cannot be used.
    """

    def __init__(self, entries: Iterable[object]) -> None:
        self.unread: list[str] = []
        self._names: set[str] = set()
        self._patterns: list[re.Pattern[str]] = []
        for entry in entries:
            self._add(entry)
        written = {int(digits) for name in self._texts() for digits in re.findall(r"\d{1,6}", name)}
        # [3-9] and the like mean numbers that are not written.
        ranges = any(re.search(r"\[[^\]]*\d", pattern.pattern) for pattern in self._patterns)
        self._numbers = set(range(_MOST_LAYERS)) if ranges else {number for number in written if number < _MOST_LAYERS}
        self._known: dict[tuple[str, int], bool] = {}

    def holds(self, role: str, layer: int) -> bool:
        """True if the list means the modules of ``role`` in ``layer``."""
        # Layers that no entry names by number are all alike.
        asked = (role, layer if layer in self._numbers else -1)
        if asked not in self._known:
            self._known[asked] = any(self._means(path) for path in module_paths(role, layer))
        return self._known[asked]

    def _texts(self) -> Iterator[str]:
        yield from self._names
        yield from (pattern.pattern for pattern in self._patterns)

    def _add(self, entry: object) -> None:
        if not isinstance(entry, str) or not entry or len(entry) > _LONGEST_PATTERN:
            self.unread.append(shown(entry))
            return
        if not entry.startswith("re:") and not set("*?") & set(entry):
            self._names.add(entry.strip("."))
            return
        pattern = _regex(entry.removeprefix("re:") if entry.startswith("re:") else _from_wildcards(entry))
        if pattern is None or len(self._patterns) >= _MOST_PATTERNS:
            self.unread.append(shown(entry))
        else:
            self._patterns.append(pattern)

    def _means(self, path: str) -> bool:
        parts = path.split(".")
        runs = (parts[start:stop] for start in range(len(parts)) for stop in range(start + 1, len(parts) + 1))
        if self._names and any(".".join(run) in self._names for run in runs):
            return True
        return any(pattern.match(path) for pattern in self._patterns)


def _from_wildcards(text: str) -> str:
    """The expression of a pattern with ``*`` and ``?``, for a module and what is below it."""
    parts = (".*" if letter == "*" else "." if letter == "?" else re.escape(letter) for letter in text)
    return "".join(parts).removesuffix(".*") + (".*$" if text.endswith("*") else r"($|\.)")


def _regex(text: str) -> re.Pattern[str] | None:
    """The compiled expression; None where it is none, or matching it could take long."""
    repeats = len(re.findall(r"(?<!\\)[*+{]", text.replace(r"\d+", "0")))
    if re.search(r"\)\s*[*+{?]", text) or repeats > _MOST_REPEATS:
        return None
    try:
        return re.compile(text)
    except (re.error, RecursionError, OverflowError):
        return None
