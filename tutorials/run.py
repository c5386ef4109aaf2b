"""Run the notebooks of this folder, each in a separate kernel, and write them with their outputs.

Run with `make tutorials`, or `python tutorials/run.py 01-flows-in-ten-minutes.ipynb` for some of them. A notebook that
fails, or that writes to stderr, is left as it was.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError
from nbformat import NotebookNode

from pyro_maf._core.files import write_whole

FOLDER = Path(__file__).parent
SECONDS_A_CELL = 600
COMPILING = re.compile(r"^pyro-maf compiles its kernels[^\n]*\n", re.MULTILINE)
"""Message of the first program on a machine, which is not a warning."""

METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def notebooks() -> list[Path]:
    """Every notebook, in reading order."""
    return sorted(FOLDER.glob("[0-9]*.ipynb"))


def executed(notebook: NotebookNode, folder: Path = FOLDER) -> NotebookNode:
    """Run a notebook from its first cell to its last in `folder`.

    Raises:
        CellExecutionError: For the first cell that raises.
        CellTimeoutError: For one that does not end.
    """
    fresh = nbformat.from_dict(notebook)
    client = NotebookClient(
        fresh,
        timeout=SECONDS_A_CELL,
        kernel_name="python3",
        record_timing=False,
        extra_arguments=["--InlineBackend.print_figure_kwargs={'dpi': 80}"],
        resources={"metadata": {"path": str(folder)}},
    )
    return client.execute()


def tidied(notebook: NotebookNode) -> NotebookNode:
    """A notebook without metadata that differ from machine to machine and run to run."""
    tidy = nbformat.from_dict(notebook)
    tidy.metadata = nbformat.from_dict(METADATA)
    for number, cell in enumerate(tidy.cells, start=1):
        cell.id, cell.metadata = f"cell-{number:02d}", NotebookNode()
        if cell.cell_type == "code":
            cell.outputs = _joined(cell.outputs)
    return tidy


def _joined(outputs: Sequence[NotebookNode]) -> list[NotebookNode]:
    """Visible outputs, with the pieces of each stream joined, and pictures without a description of their object."""
    joined: list[NotebookNode] = []
    for output in map(nbformat.from_dict, outputs):
        if output.output_type == "stream" and joined and joined[-1].get("name") == output.name:
            joined[-1].text += output.text
            continue
        if "image/png" in output.get("data", {}):
            output.data.pop("text/plain", None)
        output.pop("transient", None)
        joined.append(output)
    for output in joined:
        if output.output_type == "stream":  # a line ends up as what was written over it
            output.text = re.sub(r"[^\n]*\r(?!\n)", "", COMPILING.sub("", output.text))
    return [output for output in joined if shows_something(output)]


def shows_something(output: NotebookNode) -> bool:
    """Return whether an output is visible in a stored notebook: blanks, empty tags and widgets are not."""
    if output.output_type == "stream":
        return bool(output.text.strip())
    data = output.get("data", {})
    if any(kind.startswith("application/vnd.jupyter.widget") for kind in data):
        return False
    text = [re.sub(r"<[^>]*>", "", str(value)) if kind == "text/html" else str(value) for kind, value in data.items()]
    return output.output_type == "error" or any(part.strip() for part in text)


def written(notebook: NotebookNode) -> str:
    """Text of the file of a notebook."""
    return nbformat.writes(tidied(notebook)) + "\n"


def complaints(notebook: NotebookNode) -> list[str]:
    """Text that a notebook wrote to stderr, which a reader should not see."""
    return [
        output.text
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "stream" and output.name == "stderr"
    ]


def run(path: Path) -> None:
    """Run one notebook and write it.

    Raises:
        CellExecutionError, CellTimeoutError: As `executed`.
        RuntimeError: If it wrote to stderr.
    """
    notebook = tidied(executed(nbformat.read(path, as_version=4), path.parent))
    if errors := complaints(notebook):
        raise RuntimeError("it wrote to stderr: " + "".join(errors))
    write_whole(path, written(notebook).encode())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run notebooks one after another; return 1 if any of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, help="which to run (default: all of this folder)")
    failed = 0
    for path in parser.parse_args(arguments).notebooks or notebooks():
        started = time.monotonic()
        try:
            run(path)
        except (CellExecutionError, CellTimeoutError, RuntimeError) as error:
            failed += 1
            print(f"{path.name} failed and is left as it was: {error}", file=sys.stderr)
        else:
            print(f"{path.name}: {time.monotonic() - started:.0f} s", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
