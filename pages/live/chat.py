"""Prompts and their streaming answers. The streams run beside the script, so a toggle never cuts one off."""

from __future__ import annotations

from typing import Any

import streamlit as st

from pages.background.streams import ChatStream, start_stream
from pages.services import Services
from pages.shared.text import harmless, plain

_POLL_S = 0.4
_HEIGHT = 560
_EXAMPLES = (
    "Explain in three sentences what a KV cache is.",
    "Write a short story about a lighthouse keeper.",
    "Count from one to twenty in words.",
)


def streams() -> list[ChatStream]:
    """The streams of this browser session, oldest first."""
    found: list[ChatStream] = st.session_state.setdefault("chat_streams", [])
    return found


def chat(services: Services, *, ready: bool) -> None:
    """Draw the chat; it polls only while an answer is coming in."""
    active = any(stream.active for stream in streams())
    st.fragment(_chat, run_every=_POLL_S if active else None)(services, ready, active)


def _chat(services: Services, ready: bool, was_active: bool) -> None:
    _conversation()
    with st.container(horizontal=True, vertical_alignment="center"):
        _sampling()
        if any(stream.active for stream in streams()):
            st.button("Stop", icon=":material/stop_circle:", key="chat-stop", on_click=_stop)
        elif streams():
            st.button("Clear", icon=":material/delete_sweep:", key="chat-clear", on_click=streams().clear)
    hint = "Ask the loaded model" if ready else "The model is not ready yet"
    st.chat_input(hint, disabled=not ready, key="chat-input", on_submit=_send, args=(services,))
    if any(stream.active for stream in streams()) != was_active:
        st.rerun()  # the whole page once, so that this fragment starts to poll, or stops


def _conversation() -> None:
    with st.container(height=_HEIGHT, border=True, autoscroll=True, key="chat-log"):
        if not streams():
            st.caption("Nothing asked yet. Prompts sent while another streams run in one batch. Try:")
            for example in _EXAMPLES:
                st.markdown(f":small[:gray[{example}]]")
        for stream in streams():
            with st.chat_message("user", avatar=":material/person:"):
                st.text(stream.prompt)
            with st.chat_message("assistant", avatar=":material/smart_toy:"):
                st.markdown(harmless(stream.text + (" ▌" if stream.active else "")) or "…")
                _footer(stream)


def _footer(stream: ChatStream) -> None:
    if stream.state == "failed":
        st.error(plain(stream.error or "The stream broke."), icon=":material/error:")
        return
    facts = []
    if stream.ttft_ms is not None:
        facts.append(f"TTFT {stream.ttft_ms:.0f} ms")
    if stream.tokens_per_second is not None:
        facts.append(f"{stream.tokens_per_second:.1f} tokens/s")
    if stream.completion_tokens:
        facts.append(f"{stream.completion_tokens} tokens")
    if stream.state == "stopped":
        facts.append("stopped")
    elif stream.finish_reason == "length":
        facts.append("reached max tokens")
    st.caption(" · ".join(facts) if facts else "waiting for the first token")


def _sampling() -> None:
    with st.popover("Sampling", icon=":material/tune:"):
        st.number_input("Max tokens", 1, 100_000, 256, key="chat-max-tokens", persist_state="session")
        st.slider("Temperature", 0.0, 2.0, 0.0, 0.1, key="chat-temperature", persist_state="session")
        st.slider("Top-p", 0.05, 1.0, 1.0, 0.05, key="chat-top-p", persist_state="session")
        st.toggle("Go on past the end of the answer", key="chat-ignore-eos", persist_state="session")
        st.toggle("Remember the conversation", value=False, key="chat-memory", persist_state="session")


def _parameters() -> dict[str, Any]:
    chosen = st.session_state
    parameters: dict[str, Any] = {
        "max_tokens": int(chosen["chat-max-tokens"]),
        "temperature": chosen["chat-temperature"],
        "top_p": chosen["chat-top-p"],
    }
    return parameters | ({"ignore_eos": True} if chosen["chat-ignore-eos"] else {})


def _send(services: Services) -> None:
    """Callback of the input line: start the stream of its answer."""
    prompt = st.session_state["chat-input"]
    if prompt:
        history = [stream for stream in streams() if not stream.active] if st.session_state["chat-memory"] else []
        streams().append(start_stream(services.client, prompt, _parameters(), history))


def _stop() -> None:
    for stream in streams():
        stream.stop()
