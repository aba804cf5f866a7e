"""What each setting of ours costs in quality, measured in the same run as its speed, on the bundled text.

    run.py ──JSON list of settings' knobs──> python -m tests.benchmarks.quality in.json out.json ──> {label: figures}

The reference is the model as its file stores it (for the default model mostly Q4_1), every product in float32, whatever
precision a setting computes in: so bfloat16 shows its own cost too. Windows and figures are those of
``engine.measure.quality``. The execution mode is left out: prompt logits do not depend on it but for rounding.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from engine.config import EngineConfig
from engine.core import Engine
from engine.measure.prompts import corpus_documents, opening_tokens
from engine.measure.quality import QualityAccumulator, windows
from engine.models.gguf_file import GGUFFile
from engine.status import path_of
from tests.benchmarks.settings import REFERENCE_KNOBS, label

MAX_TOKENS, WINDOW, STRIDE = 768, 256, 128


@dataclasses.dataclass(frozen=True, slots=True)
class Quality:
    """Figures of one combination of knobs, see :class:`engine.measure.quality.QualityStats`."""

    perplexity: float
    perplexity_se: float
    kl_mean: float
    same_top_percent: float
    tokens: int


def stored_as(gguf: Path) -> str:
    """How a file stores its weights, by bytes, in words.

    >>> stored_as(path)  # doctest: +SKIP
    'Q4_1 (token_embd: Q8_0)'
    """
    file = GGUFFile(gguf)
    matrices = {name: tensor for name, tensor in file.tensors.items() if len(tensor.shape) > 1}
    sizes: Counter[str] = Counter()
    for tensor in matrices.values():
        sizes[tensor.kind.name] += tensor.num_bytes
    main = sizes.most_common(1)[0][0]
    others = [f"{name.removesuffix('.weight')}: {t.kind.name}" for name, t in matrices.items() if t.kind.name != main]
    return main + (f" ({', '.join(others[:3])}{', …' if len(others) > 3 else ''})" if others else "")


def measure(model: str, shared: Mapping[str, Any], combinations: Sequence[Mapping[str, Any]]) -> dict[str, Quality]:
    """Figures of every combination, and of the reference, by label.

    Args:
        model: as the knob takes it.
        shared: knobs that all have in common.
        combinations: knobs of each.
    """
    reference: list[torch.Tensor] = []
    found: dict[str, Quality] = {}
    for knob_values in (REFERENCE_KNOBS, *combinations):
        if label(knob_values) not in found:
            engine = Engine.load(EngineConfig.from_mapping({"model": model} | dict(shared) | dict(knob_values)))
            found[label(knob_values)] = _score(engine, reference)
            del engine
    return found


def _score(engine: Engine, reference: list[torch.Tensor]) -> Quality:
    """Figures of an engine; the first one's logits become the reference."""
    tokenizer = engine.model.tokenizer
    documents = [tokenizer.encode(document, add_special_tokens=False) for document in corpus_documents()]
    share = -(-MAX_TOKENS // len(documents))
    text = (opening_tokens(tokenizer) + [token for document in documents for token in document[:share]])[:MAX_TOKENS]
    collected = QualityAccumulator()
    for number, window in enumerate(windows(len(text), WINDOW, STRIDE)):
        logits = engine.prompt_logits(text[window.start : window.end])
        # the distribution after token i − 1 predicts token i; the last one predicts what is not in the window
        scored = logits[window.first_scored - 1 - window.start : window.end - window.start - 1].float().cpu().clone()
        if len(reference) == number:
            reference.append(scored)
        collected.add(scored, reference[number], torch.tensor(text[window.first_scored : window.end]))
    stats = collected.stats({}, path_of(engine))
    return Quality(stats.perplexity, stats.perplexity_se, stats.kl_mean, stats.same_top_percent, stats.tokens)


def main() -> None:
    """Read what to measure (argument 1), write the figures (argument 2)."""
    order = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(order["threads"])
    with torch.inference_mode():
        found = measure(order["model"], order["shared"], order["combinations"])
    Path(sys.argv[2]).write_text(json.dumps({name: dataclasses.asdict(item) for name, item in found.items()}))


if __name__ == "__main__":
    main()
