"""What a loss of quality is counted from: the weights as the file has them, which may be rounded already."""

from __future__ import annotations

import re

from pages.services import Services

_PLAIN = re.compile(r"\b(BF16|F16|F32|F64)\b")
_SAME_GRID = re.compile(r"\b(Q4_0|Q4_1)\b")  # blocks of 32 with a scale, Q4_1 with a minimum too: INT4's own grid


def reference_note(stored_as: str) -> str:
    """A sentence to stand next to a lossy setting or a figure of quality.

    Args:
        stored_as: see :func:`engine.models.checkpoint.stored_as`.

    >>> reference_note("BF16 (safetensors)")
    'Losses are counted from the weights as the file stores them: BF16 (safetensors).'
    >>> reference_note("Q4_1 (GGUF)").partition(". ")[2]
    'INT4 in groups of 32 is nearly the same grid: its loss here says nothing of other models.'
    """
    if not stored_as:
        return "What the file stores its weights as is not known: losses are counted from that."
    note = f"Losses are counted from the weights as the file stores them: {stored_as}."
    if _SAME_GRID.search(stored_as):
        return f"{note} INT4 in groups of 32 is nearly the same grid: its loss here says nothing of other models."
    if not _PLAIN.search(stored_as):
        return f"{note} They are rounded already: a loss here says little of models that are not."
    return note


def stored_note(services: Services) -> str:
    """What a loss of the loaded model's quality is counted from, see :func:`reference_note`."""
    engine = services.feed.latest().engine
    return reference_note(str(engine.model.get("stored_as", ""))) if engine is not None else ""
