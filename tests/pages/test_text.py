"""Text from elsewhere is shown as it is written, answers keep their Markdown without what it could load or lead to."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from pages.shared.text import JOINER, code, harmless, plain

HOSTILE = (
    "![x](http://evil.example/x.png)",
    "[here](http://evil.example)",
    "[here][r]\n\n[r]: http://evil.example",
    "<img src=http://evil.example/x.png>",
    "<http://evil.example>",
    "https://evil.example/path www.evil.example me@evil.example",
    "_www.evil.example HTTPS://evil.example",
    ":red[danger] :material/delete: :smile: :+1: :streamlit: :8ball:",
    "$x^2$ and $$y$$ and \\(z\\)",
    "**bold** *it* ~~gone~~ `code`",
    "# heading",
    "1. one",
    "- point",
    "---",
    "| a | b |\n| - | - |",
    "&lt;img&gt; &#33;[x](y)",
    "\\![x](http://evil.example)",
    "``` \n![x](http://evil.example)",
    "> quote",
    "\u202egnp.exe",
)
PIECES = st.lists(
    st.sampled_from(
        [*"![]()<>`*_~$\\|:#-+=&@./ \n1", "http", "www", "evil", ".example", "img src=", "material", "red"]
    ),
    max_size=24,
).map("".join)
# What Streamlit's frontend seeks in the text that is left after Markdown has been parsed
SOUGHT = re.compile(r"https?://|www\.|\w@\w|:material[/_]\w+:|:streamlit:|:[\w+-]+:", re.IGNORECASE)
BLOCKS = {"p", "br", "h1", "h2", "h3", "h4", "h5", "h6", "strong", "em", "s", "code", "pre", "ul", "ol", "li", "hr"}
BLOCKS |= {"blockquote", "table", "thead", "tbody", "tr", "th", "td"}


def rendered(markdown):
    """(tags, text) that CommonMark with raw HTML makes of it."""
    html = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(markdown)
    tree = ElementTree.fromstring(f"<x>{html}</x>")
    return {item.tag for item in tree.iter()} - {"x"}, "".join(tree.itertext()).strip()


def seen(text):
    """What a person sees of it on one line."""
    return " ".join(text.replace(JOINER, "").split())


@pytest.mark.parametrize("text", HOSTILE)
def test_plain_text_is_one_paragraph_that_reads_as_it_is_written(text):
    tags, shown = rendered(plain(text))
    assert tags <= {"p"}
    assert seen(shown) == seen(text.replace("\u202e", ""))
    assert not SOUGHT.search(shown)


@given(PIECES)
def test_no_text_becomes_markup(text):
    tags, shown = rendered(plain(text))
    assert tags <= {"p"}
    assert seen(shown) == seen(text)
    assert not SOUGHT.search(shown)


@given(PIECES)
def test_no_answer_becomes_an_image_a_link_or_html(text):
    tags, _ = rendered(harmless(text))  # raw HTML would be another tag, or none that can be read
    assert tags <= BLOCKS


@pytest.mark.parametrize("text", ["a`b", "`", "``x``", "x " * 3, "![](http://evil.example)", "a\nb"])
def test_code_shows_backticks_too(text):
    tags, shown = rendered(code(text))
    assert tags == {"p", "code"}
    assert shown == " ".join(text.split())


def test_an_answer_keeps_its_paragraphs_lists_tables_and_code():
    answer = (
        "# Title\n\nSome **bold** and *soft* words\non two lines, `x = 1`.\n\n- one\n- two\n  1. deep\n  2. deeper\n\n"
        "> said\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n```python\nprint('<b>')\n```\n\n~~gone~~\n\n---"
    )
    parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    assert parser.render(harmless(answer)) == parser.render(answer)


def test_an_image_a_link_and_html_in_an_answer_are_shown_as_they_are_written():
    written = 'See ![a](http://evil.example/a.png) [b](http://evil.example) <img src="x"> <script>1</script>'
    tags, shown = rendered(harmless(written))
    assert tags == {"p"}
    assert seen(shown) == written


def test_a_drawing_in_an_answer_is_shown_as_code():
    assert harmless("```mermaid\ngraph TD\n```") == "```\ngraph TD\n```"


def test_an_answer_that_is_cut_off_in_a_code_block_stays_code():
    assert harmless("```python\nprint(1)") == "```python\nprint(1)\n```"
