"""The pages of docs/: code and commands have the output that they show."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import pyro_maf
from docs.hooks.links import problems
from pyro_maf.cli.commands import app
from tests.pages import ROOT, promised, run, sections, whole

PAGES = sorted((ROOT / "docs").rglob("*.md"))
RECIPES = [page for page in PAGES if page.parent.name == "how-to" and whole(page)]
WITH_CODE = [page for page in PAGES if whole(page) and page not in RECIPES]
CONSOLE = re.compile(r"^```console\n(?P<lines>.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"-?\d[\d,]*(\.\d+)?(e[-+]?\d+)?")
COMPILING = "pyro-maf compiles"


def name(page: Path) -> str:
    return page.relative_to(ROOT / "docs").as_posix()


@pytest.mark.filterwarnings("ignore:fit found heavy tails:UserWarning", "ignore:Maximum number of epochs:UserWarning")
@pytest.mark.parametrize("page", WITH_CODE, ids=name)
def test_code_prints_what_its_page_says(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = whole(page)
    assert promised(code)
    assert run(code, page) == promised(code)


@pytest.mark.filterwarnings(
    "error:fit reached max_epochs:UserWarning",
    "error:fit has its best epoch at 0:UserWarning",
    "ignore:fit found 1 of 100 rows to repeat:UserWarning",
)
@pytest.mark.parametrize("page", RECIPES, ids=name)
def test_each_recipe_runs_by_itself_after_the_first_code_of_its_page(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if pasted into a new session, and without unexpected warnings."""
    monkeypatch.chdir(tmp_path)
    start, *recipes = sections(page).values()
    common: dict[str, Any] = {"__name__": page.stem}
    assert run(start, page, common) == promised(start)
    random_state = torch.get_rng_state()
    for recipe in recipes:
        torch.set_rng_state(random_state)
        assert promised(recipe)
        assert run(recipe, page, dict(common)) == promised(recipe)


@pytest.mark.parametrize(
    "module", ["flows", "transforms", "distributions", "infer", "training", "datasets", "experiments"]
)
def test_every_public_name_has_its_place_among_the_api(module: str) -> None:
    """For pages that list names explicitly."""
    listed = set(re.split(r"[^\w]+", (ROOT / "docs" / "api" / f"{module}.md").read_text(encoding="utf-8")))
    public = importlib.import_module(f"pyro_maf.{module}").__all__
    assert set(public) - listed == set()


@pytest.mark.parametrize("page", [ROOT / "CONTRIBUTING.md", ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    """A path is relative to the repository or the package; a bare name may be in any folder."""
    named = set(re.findall(r"`([a-z_/]+\.py)`", page.read_text(encoding="utf-8")))
    folders = ("pyro_maf", "tests", "docs", "benchmarks", "examples")
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert [name for name in sorted(named) if not any(str(path).endswith(f"/{name}") for path in sources)] == []


def test_version_is_the_same_everywhere() -> None:
    released = re.search(
        r"^## \[(\d[^]]*)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert released is not None
    assert released[1] == pyro_maf.__version__
    assert f'version: {released[1]}\ndate-released: "{released[2]}"\n' in citation
    assert f"version = {{{released[1]}}}" in (ROOT / "docs" / "citation.md").read_text(encoding="utf-8")


def test_broken_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(
        '<h1 id="here"></h1><a href="page.html#here"></a><a href="https://else.where"></a>'
    )
    assert list(problems(tmp_path)) == []
    (tmp_path / "index.html").write_text(
        '<a href="none.html"></a><a href="page.html#there"></a><img src="https://else.where/picture.png">'
    )
    found = list(problems(tmp_path))
    assert [line.split()[1] for line in found] == ["fetches", "links", "links"]
    assert "none.html, which is not there" in found[1]
    assert "page.html#there, a page without that heading" in found[2]


def commands(page: Path) -> list[tuple[list[str], list[str]]]:
    """Arguments of each command on a page, and the output shown below it."""
    found: list[tuple[list[str], list[str]]] = []
    for block in CONSOLE.finditer(page.read_text(encoding="utf-8")):
        for line in block["lines"].splitlines():
            if line.startswith("$ pyro-maf "):
                found.append((line.split()[2:], []))
            else:
                found[-1][1].append(line)
    return found


def gist(line: str) -> str:
    """A line without numbers, table widths and the reason why a fit stopped, which depend on rounding."""
    line = re.sub(r"stopped: .*?\. See", "stopped: #. See", line)
    line = re.sub(r"^stopped +.*, after", "stopped #, after", line)
    return " ".join(re.sub("─+", "─", NUMBER.sub("#", line)).split())


def test_commands_do_what_their_page_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Except for numbers, which depend on the machine and its load."""
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / "command-line.md"
    run(whole(page), page)
    shown = commands(page)
    assert shown
    for arguments, lines in shown:
        output = CliRunner().invoke(app, arguments).output.splitlines()
        given = [gist(line) for line in output if not line.startswith(COMPILING)]
        assert given == [gist(line) for line in lines], " ".join(arguments)
