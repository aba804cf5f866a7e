"""Tables in the long form that charts take, and the short names of events in them. Pure: no Streamlit, no I/O."""

from __future__ import annotations

import numpy as np
import pandas as pd

from engine.outputs import EngineEvent


def short_label(event: EngineEvent) -> str:
    """What fits beside a mark: ``int4`` or ``batching static`` rather than the whole sentence."""
    changed = event.detail.get("changed") if event.kind == "reconfigure" else None
    if not changed:
        return event.kind
    name, (_, new) = next(iter(changed.items()))
    shown = {True: "on", False: "off"}.get(new, new) if isinstance(new, bool) else new
    more = f" +{len(changed) - 1}" if len(changed) > 1 else ""
    return f"{name.replace('_', ' ')} {shown}{more}"


def long(table: pd.DataFrame, columns: dict[str, str]) -> pd.DataFrame:
    """Long form for Altair: ``t``, ``series`` (the label of the column) and ``value``."""
    # By hand: DataFrame.melt takes ten times as long, and this is done for every chart every second
    return pd.DataFrame(
        {
            "t": np.tile(table["t"].to_numpy(), len(columns)),
            "series": np.repeat(np.array(list(columns.values()), dtype=object), len(table)),
            "value": np.concatenate([table[name].to_numpy() for name in columns]),
        }
    )
