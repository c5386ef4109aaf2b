"""Code examples of a Markdown page, and the output that the page shows."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
HEADING_OR_BLOCK = re.compile(r"^#+ (?P<heading>[^\n]*)$|^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
PRINTED = re.compile(r"^ *print\(.*\)  # (.*)$", re.MULTILINE)


def sections(page: Path) -> dict[str, str]:
    """The code of each section of a page, by heading, with the line numbers of the file."""
    text = page.read_text(encoding="utf-8")
    found: dict[str, str] = {}
    heading = ""
    for match in HEADING_OR_BLOCK.finditer(text):
        if match["heading"]:
            heading = match["heading"]
            continue
        found[heading] = _on_its_line(found.get(heading, ""), match, text)
    return found


def whole(page: Path) -> str:
    """All code of a page, with the line numbers of the file."""
    text = page.read_text(encoding="utf-8")
    code = ""
    for match in HEADING_OR_BLOCK.finditer(text):
        if match["code"]:
            code = _on_its_line(code, match, text)
    return code


def _on_its_line(before: str, match: re.Match[str], text: str) -> str:
    line = text.count("\n", 0, match.start("code"))
    return before + "\n" * (line - before.count("\n")) + match["code"]


def run(code: str, page: Path, names: dict[str, Any] | None = None) -> list[str]:
    """Run code of a page and return the lines that it prints; `names`, its namespace, is updated."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(code, str(page), "exec"), {"__name__": page.stem} if names is None else names)
    return output.getvalue().splitlines()


def promised(code: str) -> list[str]:
    """The lines that code of a page should print, by its comments."""
    return PRINTED.findall(code)
