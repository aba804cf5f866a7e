"""The KV cache as a map of blocks, and the memory of the engine, with what can be done about them."""

from __future__ import annotations

import streamlit as st

from engine.outputs import EngineStatus
from pages.live.block_map import block_map
from pages.live.memory import memory_bar
from pages.live.toasts import add_toast
from pages.services import Services
from pages.shared.messages import bytes_text
from pages.shared.text import plain


def _prefix_hits(engine: EngineStatus) -> str:
    asked, hits = (engine.totals.get(f"prefix_{name}_tokens", 0) for name in ("query", "hit"))
    share = f"{100 * hits / asked:.0f} % of {asked:,} prompt tokens" if asked else "no prompt looked up yet"
    return f"prefix hits: {share}"


def _reset_prefix_cache(services: Services) -> None:
    try:
        text = f"Prefix cache reset: {services.client.reset_prefix_cache():,} blocks forgotten."
    except Exception as error:  # the worker may be gone
        text = f"The prefix cache could not be reset: {plain(error)}"
    add_toast(text)


def _resize(services: Services) -> None:
    try:
        before, after = services.client.resize().changed.get("num_blocks", (0, 0))
        text = (
            f"The KV cache holds {after:,} blocks now (before: {before:,})." if after else "Nothing to take any more."
        )
    except Exception as error:  # memory that is not there after all, or the worker may be gone
        text = f"The KV cache stays as it is: {error}"
    add_toast(text)


def cache_and_memory(services: Services, engine: EngineStatus) -> None:
    """Draw the map of blocks and the bar of memory, each with its button."""
    with st.container(border=True):
        with st.container(horizontal=True, horizontal_alignment="distribute", vertical_alignment="center"):
            st.markdown(f"**KV cache blocks** · {_prefix_hits(engine)}", width="content")
            st.button(
                "Reset",
                key="reset-prefix-cache",
                icon=":material/mop:",
                help="Forget every reusable prefix. Requests in flight keep their blocks.",
                on_click=_reset_prefix_cache,
                args=(services,),
            )
        block_map(engine.blocks, engine.block_size)
    with st.container(border=True):
        st.markdown("**Memory**")
        memory_bar(engine.memory)
        if engine.resize:
            tokens = engine.resize["num_blocks"] * engine.block_size
            gained = bytes_text(engine.resize["gained_bytes"])
            st.button(
                f"Give the KV cache {gained} more",
                key="resize-cache",
                icon=":material/expand:",
                help=f"Lighter weights have left this memory: {tokens:,} tokens would fit. Running requests are "
                "computed again with the tokens they have; heavier weights take the memory back.",
                on_click=_resize,
                args=(services,),
            )
