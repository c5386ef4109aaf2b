"""The examples of README.md run, section by section, and print what it says they print."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
HEADING_OR_BLOCK = re.compile(r"^#+ (?P<heading>[^\n]*)$|^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
PRINTED = re.compile(r"^print\(.*\)  # (.*)$", re.MULTILINE)


def sections() -> dict[str, str]:
    """The code of each section of README.md by its heading, on the lines where it stands in the file."""
    text = README.read_text(encoding="utf-8")
    found: dict[str, str] = {}
    heading = ""
    for match in HEADING_OR_BLOCK.finditer(text):
        if match["heading"]:
            heading = match["heading"]
            continue
        before = found.get(heading, "")
        line = text.count("\n", 0, match.start("code"))
        found[heading] = before + "\n" * (line - before.count("\n")) + match["code"]
    return found


@pytest.mark.parametrize("heading", sections())
def test_examples_print_what_they_say(heading: str) -> None:
    code = sections()[heading]
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(code, str(README), "exec"), {"__name__": "readme"})
    expected = PRINTED.findall(code)
    assert expected
    assert output.getvalue().splitlines() == expected
