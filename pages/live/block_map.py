"""The KV cache as a map: one cell per block, or per group of blocks when there are too many to draw."""

from __future__ import annotations

import base64
import dataclasses

import streamlit as st

#: States in :attr:`engine.outputs.EngineStatus.blocks`, in the order in which they win a tie.
STATES = {"s": "shared", "u": "in use", "c": "cached prefix", ".": "free"}
_COLORS = {"s": "#d97706", "u": "#0d9488", "c": "#818cf8"}
_MAX_CELLS = 1536
_LEVELS = 4
_CELL = 10
_GAP = 2


@dataclasses.dataclass(frozen=True, slots=True)
class Cell:
    """A cell of the map: the most frequent state that is not free, and the part of its blocks that are not free."""

    state: str
    fill: float


def blocks_per_cell(num_blocks: int, max_cells: int = _MAX_CELLS) -> int:
    """How many blocks one cell stands for so that the whole cache fits into ``max_cells`` cells.

    >>> blocks_per_cell(1000), blocks_per_cell(50_000)
    (1, 33)
    """
    return max(1, -(-num_blocks // max_cells))


def aggregate(blocks: str, per_cell: int) -> list[Cell]:
    """The map's cells, ``per_cell`` blocks each (the last may have fewer).

    >>> aggregate("uu..cs..", 4)
    [Cell(state='u', fill=0.5), Cell(state='s', fill=0.5)]
    """
    cells = []
    for start in range(0, len(blocks), per_cell):
        part = blocks[start : start + per_cell]
        counts = {state: part.count(state) for state in "suc"}
        busy = sum(counts.values())
        state = max(counts, key=counts.__getitem__) if busy else "."
        cells.append(Cell(state, busy / len(part)))
    return cells


def svg(blocks: str, columns: int = 96) -> str:
    """The map as an SVG image of at most a dozen paths, whatever the number of blocks."""
    cells = aggregate(blocks, blocks_per_cell(len(blocks)))
    columns = min(columns, max(len(cells), 1))
    paths: dict[tuple[str, int], list[str]] = {}
    for index, cell in enumerate(cells):
        level = 0 if cell.state == "." else max(1, round(cell.fill * _LEVELS))
        x, y = (index % columns) * _CELL, (index // columns) * _CELL
        paths.setdefault((cell.state, level), []).append(f"M{x} {y}h{_CELL - _GAP}v{_CELL - _GAP}h-{_CELL - _GAP}z")
    rows = -(-len(cells) // columns)
    shapes = "".join(_path(state, level, "".join(parts)) for (state, level), parts in sorted(paths.items()))
    size = f"{columns * _CELL - _GAP} {max(rows, 1) * _CELL - _GAP}"
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}">{shapes}</svg>'


def _path(state: str, level: int, outline: str) -> str:
    if state == ".":
        return f'<path d="{outline}" fill="#808080" fill-opacity="0.16"/>'
    return f'<path d="{outline}" fill="{_COLORS[state]}" fill-opacity="{0.25 + 0.75 * level / _LEVELS:.2f}"/>'


def block_map(blocks: str, block_size: int) -> None:
    """Draw the map with its legend: how many blocks are in which state and what one cell stands for."""
    per_cell = blocks_per_cell(len(blocks))
    total = max(len(blocks), 1)
    entries = []
    for state, label in STATES.items():
        count = blocks.count(state)
        color = _COLORS.get(state, "#808080")
        opacity = "" if state in _COLORS else ";opacity:.3"
        entries.append(
            f'<span style="white-space:nowrap"><i style="display:inline-block;width:.7em;height:.7em;border-radius:2px;'
            f'background:{color}{opacity};margin-right:.35em"></i>{label} <b>{count:,}</b> '
            f"({100 * count / total:.0f} %)</span>"
        )
    picture = base64.b64encode(svg(blocks).encode()).decode()
    scale = "1 block" if per_cell == 1 else f"{per_cell} blocks"
    st.html(
        f'<div style="font-size:.85rem"><div style="display:flex;flex-wrap:wrap;gap:.2rem 1rem;margin-bottom:.4rem">'
        f'{"".join(entries)}<span style="opacity:.7">a cell is {scale} of {block_size} tokens</span></div>'
        f'<img alt="KV block map" style="width:100%" src="data:image/svg+xml;base64,{picture}"></div>'
    )
