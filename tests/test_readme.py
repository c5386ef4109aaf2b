"""The examples of README.md, run section by section, print what it shows."""

from __future__ import annotations

import pytest

from tests.pages import ROOT, promised, run, sections

README = ROOT / "README.md"


@pytest.mark.parametrize("heading", sections(README))
def test_examples_print_what_they_say(heading: str) -> None:
    code = sections(README)[heading]
    assert promised(code)
    assert run(code, README) == promised(code)
