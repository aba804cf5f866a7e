"""Text from elsewhere on a page: names, labels and errors as they are written, answers as harmless Markdown.

Streamlit renders Markdown nearly everywhere: labels, captions, badges, metrics, tables, tooltips, toasts. Whatever a
model, a file, a person or another program has written goes through :func:`plain` (or :func:`code`) on its way there,
an answer of a model through :func:`harmless`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable

from markdown_it import MarkdownIt
from markdown_it.tree import SyntaxTreeNode

#: Shown as nothing. It stands where a backslash would not help: emoji, icons and bare addresses are sought in the text
#: that is left when the backslashes have gone.
JOINER = "\u2060"
_TIED = re.compile(r":(?=[A-Za-z/]|[\w+-]+:)|(?<=www)(?=\.)|@(?=[\w-])", re.IGNORECASE)
_MARKUP = re.compile(r"[\\`*\[\]{}<>~$|&]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
_BLOCK = re.compile(r"^(\d*)([#+=.)-])(?=[#+=\s-]|$)")  # at the start of a line: a heading, a list, a rule
# Control characters, and those that turn the direction of what follows
_UNSEEN = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]")
_LANGUAGE = re.compile(r"[\w+#.-]+")
_DRAWN = ("mermaid",)  # code blocks that Streamlit draws instead of showing them


def plain(text: object) -> str:
    r"""Markdown that shows ``text`` as it is written, on one line: no markup, image, link, formula, icon or emoji.

    >>> plain("![x](http://evil.example/x.png)").replace(JOINER, "|")
    '!\\[x\\](http:|//evil.example/x.png)'
    >>> plain("weights: int4, 2.5 ms")
    'weights: int4, 2.5 ms'
    """
    return _escaped(" ".join(str(text).split()), at_start=True)


def badge_label(text: object) -> str:
    """As :func:`plain`, for ``st.badge``: Streamlit escapes brackets itself there, and twice is not at all."""
    return plain(text).replace("\\[", "[").replace("\\]", "]")


def code(text: object) -> str:
    """Markdown that shows ``text`` as code, whatever backticks it has.

    >>> code("a`b")
    '``a`b``'
    """
    line = " ".join(_UNSEEN.sub("", str(text)).split())
    fence = "`" * (_longest_run(line) + 1)
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{pad}{line}{pad}{fence}" if line else ""


@functools.lru_cache(maxsize=256)  # a conversation is drawn again at each poll while its last answer grows
def harmless(markdown: str) -> str:
    r"""The same Markdown without images, links, HTML, formulas and drawings: these are shown as they are written.

    >>> harmless("**Look** ![](http://evil.example/x)").replace(JOINER, "|")
    '**Look** !\\[\\](http:|//evil.example/x)'
    """
    return "\n".join(_blocks(SyntaxTreeNode(_PARSER.parse(_UNSEEN.sub("", markdown)))))


# What is not parsed stays text, and text is escaped when it is written again.
_PARSER = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
_PARSER.disable(["image", "link", "autolink", "html_inline", "html_block", "reference"])


def _escaped(text: str, *, at_start: bool) -> str:
    text = _TIED.sub(lambda found: f"{found.group()}{JOINER}", _UNSEEN.sub("", text))
    text = _MARKUP.sub(r"\\\g<0>", text)
    return _BLOCK.sub(r"\1\\\2", text) if at_start else text


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def _blocks(parent: SyntaxTreeNode, *, tight: bool = False) -> list[str]:
    """The lines of a container's blocks, with an empty line between two of them unless ``tight``."""
    lines: list[str] = []
    for block in parent.children:
        if lines and not tight:
            lines.append("")
        lines += _block(block)
    return lines


def _block(node: SyntaxTreeNode) -> list[str]:
    if node.type == "heading":
        title = " ".join(_inline(node).splitlines())
        return [f"{'#' * int(node.tag[1:])} {title}"]
    if node.type in ("bullet_list", "ordered_list"):
        return _list(node)
    if node.type == "blockquote":
        return [f"> {line}".rstrip() for line in _blocks(node)]
    if node.type in ("fence", "code_block"):
        return _fence(node)
    if node.type == "hr":
        return ["---"]
    if node.type == "table":
        return _table(node)
    return _inline(node).splitlines()


def _list(node: SyntaxTreeNode) -> list[str]:
    """A list with its own marker a point; what belongs to a point is indented under it."""
    number = int(node.attrs.get("start", 1)) if node.type == "ordered_list" else None
    tight = all(block.hidden for item in node.children for block in item.children if block.type == "paragraph")
    lines: list[str] = []
    for place, item in enumerate(node.children):
        marker = "- " if number is None else f"{number + place}. "
        if lines and not tight:
            lines.append("")
        first, *rest = _blocks(item, tight=tight) or [""]
        lines.append(marker + first)
        lines += [" " * len(marker) + line if line else "" for line in rest]
    return lines


def _fence(node: SyntaxTreeNode) -> list[str]:
    fence = "`" * max(3, _longest_run(node.content) + 1)
    named = _LANGUAGE.match(node.info.strip()) if node.info else None
    language = named.group() if named and named.group().lower() not in _DRAWN else ""
    return [fence + language, *node.content.rstrip("\n").split("\n"), fence]


def _table(node: SyntaxTreeNode) -> list[str]:
    rows = [row for part in node.children for row in part.children]
    lines = [f"| {' | '.join(_inline(cell) for cell in row.children)} |" for row in rows]
    return [lines[0], "|" + " --- |" * len(rows[0].children), *lines[1:]]


def _inline(node: SyntaxTreeNode) -> str:
    """The text of a paragraph, heading or cell."""
    return "".join(_spans(child for inline in node.children for child in inline.children))


def _spans(nodes: Iterable[SyntaxTreeNode]) -> Iterable[str]:
    at_start = True
    for node in nodes:
        if node.type in ("softbreak", "hardbreak"):
            yield "\n" if node.type == "softbreak" else "  \n"
        elif node.type in ("strong", "em", "s"):
            mark = {"strong": "**", "em": "*", "s": "~~"}[node.type]
            yield f"{mark}{''.join(_spans(node.children))}{mark}"
        elif node.type == "code_inline":
            yield code(node.content)
        else:
            yield _escaped(node.content, at_start=at_start)
        at_start = node.type in ("softbreak", "hardbreak")
