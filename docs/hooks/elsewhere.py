"""Parts of the site from outside docs/: README and changelog as pages, and the plots of the benchmarks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url

PICTURES = tuple(f"benchmarks/results/{name}.png" for name in ("directions", "guides", "simulators"))
LINK = re.compile(r"\[([^]]*)\]\(([\w/.-]+)\)")
TABLE, NAME = re.compile(r"<table>.*?</table>", re.DOTALL), re.compile(r"(?<=<code>)[^<]{14,}(?=</code>)")
JOINT = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[_(=.])(?=[A-Za-z])")
"""Places where a long name in a table may break."""

FETCHED = "https://unpkg.com/iframe-worker/shim"
"""Script that the theme loads on every page, for searching without a server."""

LOCAL = "assets/iframe-worker/shim.js"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the README as the first page, the changelog, and the benchmarks' plots under assets/."""
    root = Path(config.docs_dir).parent
    for page, source in (("index.md", "README.md"), ("changelog.md", "CHANGELOG.md")):
        config.watch.append(str(root / source))
        files.append(File.generated(config, page, content=_linked((root / source).read_text("utf-8"))))
    for picture in PICTURES:
        path = root / picture
        files.append(File.generated(config, f"assets/{path.name}", abs_src_path=str(path)))
    return files


def _linked(text: str) -> str:
    """A page of the repository with links to pages of the site; its other files are named without a link."""

    def link(match: re.Match[str]) -> str:
        text, target = match.groups()
        if target == "tutorials/README.md":
            return f"[{text}](tutorials/index.md)"
        return f"[{text}]({target.removeprefix('docs/')})" if target.startswith("docs/") else text

    return LINK.sub(link, text)


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Redirect links to repository files to their copies; rank recipes first in search, API and changelog last."""
    for start, boost in (("how-to/", 3), ("api/", 0.1), ("changelog", 0.1)):
        if page.file.src_uri.startswith(start):
            page.meta["search"] = {"boost": boost}
    markdown = markdown.replace("](../README.md", "](index.md")
    for picture in PICTURES:
        markdown = markdown.replace(f"(../{picture})", f"(assets/{Path(picture).name})")
    return markdown


def on_page_content(html: str, page: Page, **_: Any) -> str:
    """Let long names in tables break between words, and keep figures and their errors on one line."""

    def broken(table: re.Match[str]) -> str:
        return NAME.sub(lambda name: JOINT.sub("<wbr>", name[0]), table[0]).replace(
            " ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}"
        )

    return TABLE.sub(broken, html)


def on_post_page(output: str, page: Page, **_: Any) -> str:
    """Load the script from the site itself."""
    return output.replace(FETCHED, get_relative_url(LOCAL, page.url))


def on_post_template(output_content: str, **_: Any) -> str:
    """Do the same on pages without a source file."""
    return output_content.replace(FETCHED, LOCAL)
