"""The sections of the package's docstrings that griffe does not know by the names they have here."""

from __future__ import annotations

import re
from textwrap import dedent
from typing import Any

import griffe

EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)
OWN = re.compile(r"^(Shapes|Cost|Reference):((?:[ ]+\S.*\n?)?(?:(?!\w+:)\S.*\n?|[ ]+\S.*\n?|\n(?=[ ]))*)", re.MULTILINE)


class Sections(griffe.Extension):
    """Makes `Example:` a section of code, and Shapes, Cost and Reference paragraphs with their name in front."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of whatever griffe has read."""
        if obj.docstring is not None:
            text = EXAMPLE.sub("Examples:", obj.docstring.value)
            obj.docstring.value = OWN.sub(_paragraph, text)


def _paragraph(match: re.Match[str]) -> str:
    first, _, rest = match[2].partition("\n")
    text = "\n".join(filter(None, (first.strip(), dedent(rest).strip())))
    return f"**{match[1]}:** {text}\n\n"
