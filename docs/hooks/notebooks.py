"""The notebooks of tutorials/ as pages with text, code and stored outputs, and a gallery of plots on the first page."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

FOLDER = "tutorials"
LINK = re.compile(r"\]\(([\w.-]+)\.ipynb")
TITLE = re.compile(r"^# (.*)$", re.MULTILINE)
BEFORE_GALLERY = "## Install"
"""Heading of the first page before which the gallery is inserted."""

GALLERY: list[str] = []
"""The last plot of each notebook, as a link to its page."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add every notebook to the navigation, in reading order, after the page of the section."""
    for entry in config.nav or ():
        if isinstance(entry, dict) and "Tutorials" in entry:
            entry["Tutorials"] += [f"{FOLDER}/{path.stem}.md" for path in _notebooks(config)]
    config.watch.append(str(_root(config) / FOLDER))
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each notebook, its plots, and the README of the folder as the page of the section."""
    GALLERY.clear()
    index = (_root(config) / FOLDER / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, f"{FOLDER}/index.md", content=_between_pages(index)))
    for path in _notebooks(config):
        notebook = nbformat.read(path, as_version=4)
        text, resources = MarkdownExporter().from_notebook_node(
            notebook, resources={"output_files_dir": path.stem, "unique_key": path.stem}
        )
        title, page = TITLE.findall(text)[0], f"{FOLDER}/{path.stem}.md"
        heading = f"# {title}\n\n[Download this notebook]({path.name}){{ .download }}"
        files.append(File.generated(config, page, content=_between_pages(text).replace(f"# {title}", heading, 1)))
        files.append(File.generated(config, f"{FOLDER}/{path.name}", abs_src_path=str(path)))
        if pictures := [name for name in resources["outputs"] if name.endswith(".png")]:
            GALLERY.append(f"[![]({FOLDER}/{pictures[-1]}) {title}]({page})")
        for name, content in resources["outputs"].items():
            files.append(File.generated(config, str(PurePosixPath(FOLDER, name)), content=content))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Show the gallery on the first page."""
    if page.file.src_uri != "index.md":
        return markdown
    pictures = "\n\n".join(GALLERY)
    gallery = f'<div class="gallery" markdown>\n\n{pictures}\n\n</div>\n\n{BEFORE_GALLERY}'
    return markdown.replace(BEFORE_GALLERY, gallery, 1)


def _root(config: MkDocsConfig) -> Path:
    return Path(config.docs_dir).parent


def _notebooks(config: MkDocsConfig) -> list[Path]:
    return sorted((_root(config) / FOLDER).glob("[0-9]*.ipynb"))


def _between_pages(text: str) -> str:
    """Replace links to notebooks by links to their pages."""
    return LINK.sub(r"](\1.md", text)
