"""The notebooks of tutorials/ as pages: what they say, what they run, and what that put out when they were last run."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter
from nbformat import NotebookNode

FOLDER = "tutorials"
LINK = re.compile(r"\]\(([\w.-]+)\.ipynb")
INDEX = f"{FOLDER}/index.md"
INTRODUCTION = """# Tutorials

Notebooks that were run from the first cell to the last, shown with what they put out. Their sources are in
`tutorials/` of the repository, where `make tutorials` runs them anew.
"""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put every notebook into the navigation, in reading order, after the section's own page."""
    for entry in config.nav or ():
        if isinstance(entry, dict) and "Tutorials" in entry:
            entry["Tutorials"] += [f"{FOLDER}/{path.stem}.md" for path in _notebooks(config)]
    config.watch.append(str(_root(config) / FOLDER))
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each notebook, its pictures, and a page that lists them."""
    listed = [INTRODUCTION]
    for path in _notebooks(config):
        notebook = nbformat.read(path, as_version=4)
        text, resources = MarkdownExporter().from_notebook_node(
            notebook, resources={"output_files_dir": path.stem, "unique_key": path.stem}
        )
        text = LINK.sub(r"](\1.md", text)
        files.append(File.generated(config, f"{FOLDER}/{path.stem}.md", content=text))
        for name, content in resources["outputs"].items():
            files.append(File.generated(config, str(PurePosixPath(FOLDER, name)), content=content))
        listed.append(f"- [{_title(notebook)}]({path.stem}.md)")
    files.append(File.generated(config, INDEX, content="\n".join(listed) + "\n"))
    return files


def _root(config: MkDocsConfig) -> Path:
    return Path(config.docs_dir).parent


def _notebooks(config: MkDocsConfig) -> list[Path]:
    return sorted((_root(config) / FOLDER).glob("[0-9]*.ipynb"))


def _title(notebook: NotebookNode) -> str:
    """The heading that a notebook begins with."""
    return str(notebook.cells[0].source.splitlines()[0].lstrip("# "))
