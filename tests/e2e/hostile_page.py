"""A page for the browser test of hostile text: every element that renders Markdown, once with each hostile string."""

from __future__ import annotations

import streamlit as st

from pages.shared.text import badge_label, code, harmless, plain

HOSTILE = (
    "![evil](http://evil.example/x.png) [evil](http://evil.example/a)",
    "[evil][r] ![evil][r] [r]: http://evil.example",
    "<img src=http://evil.example/y.png> <a href='http://evil.example'>evil</a> <script>alert(1)</script>",
    "https://evil.example/path HTTP://evil.example www.evil.example _www.evil.example",
    "me@evil.example mailto:me@evil.example <http://evil.example> xmpp:me@evil.example",
    ":red[evil] :blue-badge[evil] :small[evil] :help[evil] ::evil[x] :material/delete: :smile: :+1: :streamlit:",
    r"$evil^2$ $$\includegraphics{http://evil.example/x.png}$$ \(evil\) \href{http://evil.example}{x}",
    "# evil **evil** *evil* ~~evil~~ `evil` &lt;evil&gt; | evil |",
    r"\![evil](http://evil.example) \\[evil](http://evil.example)",
)


def main() -> None:
    """Draw them all."""
    for number, text in enumerate(HOSTILE):
        shown = plain(text)
        st.markdown(shown)
        st.caption(shown)
        st.error(f"**{shown}**: {shown}")
        st.markdown(f":small[:gray[{shown}]]")
        st.badge(badge_label(text))
        st.metric(shown, shown, shown, help=shown)
        st.subheader(shown, anchor=False)
        st.table({shown: shown, code(text): code(text)}, hide_header=True)
        st.button(shown, key=f"button-{number}")
        st.text_input(shown, key=f"input-{number}")
        st.progress(0.5, text=shown)
        with st.expander(shown, expanded=True):
            st.text(text)
        st.tabs([shown])
        with st.chat_message("assistant", avatar=":material/smart_toy:"):
            st.markdown(harmless(f"{text}\n\n- {text}\n\n> {text}\n\n| a |\n|---|\n| {text} |\n\n```\n{text}\n```"))
        st.toast(shown)
    st.text("the end")


main()
