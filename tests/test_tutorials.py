"""The notebooks: stored outputs are complete, imported names exist, and the script that runs them works.

`make tutorials` runs all of them.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import struct
import sys
from base64 import b64decode
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

FOLDER = Path(__file__).parent.parent / "tutorials"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MACHINE = re.compile(r"/(tmp|home|root|usr|opt|work|Users)/|site-packages|[A-Z]:\\|0x[0-9a-f]{8}|\x1b\[")
LINK = re.compile(r"\]\((?!http)([^)#]+)\)")
WIDEST = 900
MOST_BYTES = 4_000_000


@pytest.fixture(scope="module")
def runner() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("run_tutorials", FOLDER / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("run_tutorials", None)


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def code_of(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def python_of(notebook: NotebookNode) -> str:
    """Code of all cells, without lines of IPython commands."""
    lines = "\n".join(cell.source for cell in code_of(notebook)).splitlines()
    return "\n".join(line for line in lines if not line.startswith("%"))


def shown(cell: NotebookNode) -> str:
    """All text output of a cell."""
    return "\n".join(output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in cell.outputs)


# -- the notebooks -----------------------------------------------------------------------------------------------------


def test_there_are_notebooks_and_the_folder_is_small() -> None:
    assert len(NOTEBOOKS) >= 7
    assert sum(path.stat().st_size for path in NOTEBOOKS) < MOST_BYTES


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_was_run_once_and_in_order(path: Path) -> None:
    counts = [cell.execution_count for cell in code_of(read(path))]
    assert counts == list(range(1, len(counts) + 1))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_cell_fails_warns_or_shows_the_machine(path: Path, runner: ModuleType) -> None:
    notebook = read(path)
    assert runner.complaints(notebook) == []
    for cell in code_of(notebook):
        assert {output.output_type for output in cell.outputs} <= {"stream", "display_data", "execute_result"}
        assert not MACHINE.search(shown(cell))
        assert {kind for output in cell.outputs for kind in output.get("data", {})} <= {"text/plain", "image/png"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_notebooks_are_in_normal_form(path: Path, runner: ModuleType) -> None:
    nbformat.validate(read(path))
    assert path.read_text(encoding="utf-8") == runner.written(read(path))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_there_are_pictures_and_they_are_of_the_size_of_a_screen(path: Path) -> None:
    outputs = [output for cell in code_of(read(path)) for output in cell.outputs]
    pictures = [b64decode(output.data["image/png"]) for output in outputs if "image/png" in output.get("data", {})]
    assert pictures
    for picture in pictures:
        (width,) = struct.unpack(">I", picture[16:20])
        assert width <= WIDEST


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_imported_names_exist(path: Path) -> None:
    """Imported names exist; `make tutorials` tests how they are used."""
    imports = [node for node in ast.walk(ast.parse(python_of(read(path)))) if isinstance(node, ast.ImportFrom)]
    ours = [node for node in imports if node.module.partition(".")[0] == "pyro_maf"]
    assert ours
    for node in ours:
        module = import_module(node.module)
        for alias in node.names:
            assert hasattr(module, alias.name) or import_module(f"{node.module}.{alias.name}")


@pytest.mark.parametrize("path", [*NOTEBOOKS, FOLDER / "README.md"], ids=lambda path: path.stem)
def test_links_are_valid(path: Path) -> None:
    is_notebook = path.suffix == ".ipynb"
    texts = [cell.source for cell in read(path).cells if cell.cell_type == "markdown"] if is_notebook else []
    for target in LINK.findall("\n".join(texts or [path.read_text(encoding="utf-8")])):
        assert (FOLDER / target).exists(), target


def test_the_readme_has_every_notebook_in_reading_order() -> None:
    listed = re.findall(r"\]\((\d\d-[^)]+\.ipynb)\)", (FOLDER / "README.md").read_text(encoding="utf-8"))
    assert listed == [path.name for path in NOTEBOOKS]


# -- the script --------------------------------------------------------------------------------------------------------


@pytest.fixture
def notebook(tmp_path: Path) -> Path:
    path = tmp_path / "notebook.ipynb"
    cells = [new_markdown_cell("# A sum"), new_code_cell("a = 1\nprint(a)\nprint(a + 1)"), new_code_cell("a + 2")]
    path.write_text(nbformat.writes(new_notebook(cells=cells)), encoding="utf-8")
    return path


def change_last_cell(path: Path, source: str) -> str:
    changed = read(path)
    changed.cells[-1].source = source
    path.write_text(nbformat.writes(changed), encoding="utf-8")
    return path.read_text(encoding="utf-8")


def test_a_notebook_is_written_with_what_it_puts_out(notebook: Path, runner: ModuleType) -> None:
    assert runner.main([str(notebook)]) == 0
    first, second = code_of(read(notebook))
    assert shown(first) == "1\n2\n"
    assert shown(second) == "3"
    assert [first.execution_count, second.execution_count] == [1, 2]
    assert notebook.read_text(encoding="utf-8") == runner.written(read(notebook))


@pytest.mark.parametrize(
    ("source", "message"),
    [("1 / 0", "ZeroDivisionError"), ("import sys; print('beware', file=sys.stderr)", "wrote to stderr: beware")],
)
def test_a_notebook_that_fails_or_warns_is_unchanged(
    notebook: Path, runner: ModuleType, capsys: pytest.CaptureFixture[str], source: str, message: str
) -> None:
    before = change_last_cell(notebook, source)
    assert runner.main([str(notebook)]) == 1
    assert message in capsys.readouterr().err
    assert notebook.read_text(encoding="utf-8") == before
    assert list(notebook.parent.iterdir()) == [notebook]


def test_that_kernels_are_compiled_is_no_warning_and_is_not_stored(notebook: Path, runner: ModuleType) -> None:
    message = "pyro-maf compiles its kernels for this machine and single precision, once: about 15 seconds."
    change_last_cell(notebook, f"import sys; print({message!r}, file=sys.stderr)")
    assert runner.main([str(notebook)]) == 0
    assert code_of(read(notebook))[-1].outputs == []


def test_the_last_state_of_an_overwritten_line_is_shown(runner: ModuleType) -> None:
    counted = new_output("stream", name="stdout", text="\r epoch 1\r epoch 2\r done\nend\n")
    cell = new_code_cell("a", execution_count=1, outputs=[counted])
    assert shown(runner.tidied(new_notebook(cells=[cell])).cells[0]) == " done\nend\n"


def test_outputs_that_show_nothing_are_left_out(runner: ModuleType) -> None:
    """Such as a bar's widget, which a stored notebook does not contain, and the empty output after it."""
    blank = [
        new_output("display_data", {"text/plain": "Output()", "application/vnd.jupyter.widget-view+json": {}}),
        new_output("display_data", {"text/plain": "", "text/html": "<pre style='white-space:pre'></pre>\n"}),
        new_output("execute_result", {"text/plain": ""}, execution_count=1),
        new_output("display_data", {}),
        new_output("stream", name="stdout", text="\n"),
    ]
    seen = [
        new_output("display_data", {"text/html": "<b>bold</b>"}),
        new_output("display_data", {"image/png": "iVBORw0KGgo="}),
        new_output("error", ename="ValueError", evalue="", traceback=[]),
        new_output("stream", name="stdout", text=" a\n"),
    ]
    cell = new_code_cell("a", execution_count=1, outputs=[*blank, *seen])
    assert runner.tidied(new_notebook(cells=[cell])).cells[0].outputs == seen
