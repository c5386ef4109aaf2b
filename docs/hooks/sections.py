"""Sections of docstrings that griffe does not recognise by their names."""

from __future__ import annotations

import re
from textwrap import dedent
from typing import Any

import griffe

EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)
PARAGRAPHS = re.compile(
    r"^(Shapes|Cost|Reference):((?:[ ]+\S.*\n?)?(?:(?!\w+:)\S.*\n?|[ ]+\S.*\n?|\n(?=[ ]))*)", re.MULTILINE
)


class Sections(griffe.Extension):
    """Turns `Example:` into a section of code, and Shapes, Cost, Reference into paragraphs with their name in front."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of an object that griffe has read."""
        if obj.docstring is not None:
            text = EXAMPLE.sub("Examples:", obj.docstring.value)
            obj.docstring.value = PARAGRAPHS.sub(_paragraph, text)


def _paragraph(match: re.Match[str]) -> str:
    first, _, rest = match[2].partition("\n")
    text = "\n".join(filter(None, (first.strip(), dedent(rest).strip())))
    return f"**{match[1]}:** {text}\n\n"
