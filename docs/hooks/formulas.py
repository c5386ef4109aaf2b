"""Formulas as MathML, which browsers render without scripts or fonts to fetch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import unescape
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.pages import Page
from mkdocs.structure.toc import AnchorLink

INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)
IN_CONTENTS = re.compile(r"\\\((.*?)\\\)")


def on_page_content(html: str, page: Page, **_: Any) -> str:
    """Replace formulas marked by arithmatex, in the text and in the table of contents."""
    _in_contents(page.toc)
    html = BLOCK.sub(lambda match: f'<div class="formula">{_mathml(match, display="block")}</div>', html)
    return INLINE.sub(_mathml, html)


def _in_contents(entries: Iterable[AnchorLink]) -> None:
    for entry in entries:
        entry.title = IN_CONTENTS.sub(_mathml, entry.title)
        _in_contents(entry.children)


def _mathml(match: re.Match[str], display: str = "inline") -> str:
    return str(convert(unescape(match[1]), display=display))
